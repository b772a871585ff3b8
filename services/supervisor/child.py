"""One service as a child process of the supervisor."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from services.client.calls import Service

_TETHER = Path(__file__).with_name("tether.py")
_LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class ServiceSpec:
    """What to run (``command[0]`` is an absolute path), where it will answer, and how long it may take to drain."""

    name: Service
    command: tuple[str, ...]
    url: str
    env: Mapping[str, str] = field(default_factory=dict)
    stop_grace_s: float = 45.0


class Child:
    """A running service. Its output goes to ``on_line``, line by line, stdout and stderr alike."""

    def __init__(self, process: asyncio.subprocess.Process, on_line: Callable[[str], None]) -> None:
        self._process = process
        self._pump = asyncio.create_task(self._read_lines(on_line))

    @classmethod
    async def start(cls, spec: ServiceSpec, on_line: Callable[[str], None]) -> "Child":
        process = await asyncio.create_subprocess_exec(
            # -I -S: the tether needs nothing but the standard library, and a fast start.
            sys.executable,
            "-IS",
            str(_TETHER),
            str(os.getpid()),
            *spec.command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **spec.env},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=_LONGEST_LINE,
            # A group of its own: Ctrl-C in the terminal reaches the supervisor only, which then drains the children
            # in order; and a kill takes whatever the service may have started with it.
            start_new_session=True,
        )
        return cls(process, on_line)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """The exit code once it has ended and its last line is out; 128 + n where signal n ended it."""
        code = await self._process.wait()
        await asyncio.shield(self._pump)  # a caller that gives up waiting must not stop the reading
        return code if code >= 0 else 128 - code

    async def stop(self, grace_s: float) -> None:
        """Ask it to drain (SIGTERM), wait, and kill what is left after ``grace_s``."""
        if self._process.returncode is None:
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            self.kill()
        await self.wait()

    def kill(self) -> None:
        """End it and everything in its group, now."""
        if self._process.returncode is not None:
            return  # its number may be another's by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _read_lines(self, on_line: Callable[[str], None]) -> None:
        stdout = self._process.stdout
        assert stdout is not None  # noqa: S101  (it was started with a pipe)
        while True:
            try:
                line = await stdout.readline()
            except ValueError:  # longer than the limit: asyncio has dropped it
                line = b"(a line of more than a megabyte is left out)\n"
            if not line:
                return
            on_line(line.decode(errors="replace").rstrip("\r\n"))
