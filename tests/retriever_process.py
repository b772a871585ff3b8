"""The retriever as a process of its own, which a test may kill."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]


class RetrieverProcess:
    """``python -m retriever_svc`` on a free port; `start` again after `kill` keeps the data folder and the port."""

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = int(sock.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = data_dir.parent / f"retriever-{self.port}.log"
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RETRIEVER_PORT": str(self.port),
            "RETRIEVER_DATA_DIR": str(data_dir),
            "RETRIEVER_SEED": str(data_dir / "absent"),
            "RETRIEVER_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",  # tests share few cores: more threads than those only wait for each other
            **{f"RETRIEVER_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._orphans: list[int] = []
        self._data_dir = data_dir

    def start(self) -> "RetrieverProcess":
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "retriever_svc"],
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + 60
        with httpx.Client() as http:
            while time.monotonic() < until and self._process.poll() is None:
                try:
                    if http.get(f"{self.url}/readyz").is_success:
                        return self
                except httpx.TransportError:
                    time.sleep(0.02)
        raise AssertionError(f"the retriever is not ready:\n{self.log.read_text()[-4000:]}")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self, *, alone: bool = False) -> None:
        """SIGKILL, to it and to whatever it started, or to it ``alone``."""
        assert self._process is not None
        if alone:
            self._orphans += self.children()
            self._process.kill()
        else:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def children(self, *arguments: str) -> list[int]:
        """Processes that it started with these ``arguments`` among theirs."""
        assert self._process is not None
        of_main_thread = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return [int(pid) for pid in of_main_thread if set(arguments) <= set(_arguments(int(pid)))]

    def end(self) -> None:
        """Leave nothing behind, nor what went on when it was killed alone."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        for pid in self._orphans:  # the numbers may be those of others by now
            if any(argument.startswith(str(self._data_dir)) for argument in _arguments(pid)):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> int:
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(timeout=60)


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []
