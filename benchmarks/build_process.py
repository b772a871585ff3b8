"""Runs `rag index build` as a user would, watches its memory, and kills it where that is asked for."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from retriever_svc.checkpoint import CHECKPOINT, TEMPORARY, Checkpoint

NAME = "bench"
SAMPLE_EVERY_S = 0.2
IDLE_S = 2.0  # between a kill and the next run, for the picture's sake

KillWhen = Callable[[Checkpoint], bool]


@dataclass(frozen=True)
class Sample:
    """Bytes: ``anonymous`` is what the process needs, ``mapped`` pages of files that the kernel may take back."""

    at_s: float
    anonymous: int
    mapped: int


@dataclass
class Watched:
    """``kills``: seconds, rows stored and rows indexed at that moment."""

    samples: list[Sample] = field(default_factory=list)
    kills: list[tuple[float, int, int]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def peak(self) -> int:
        return max((sample.anonymous for sample in self.samples), default=0)


def build(corpus: Path, data_dir: Path, kind: str, kills: list[KillWhen], log: Path) -> Watched:
    """Build ``corpus``, killed as soon as each of ``kills`` in turn says so, and begun again.

    Raises: RuntimeError: a run failed, or ended before it was killed.
    """
    watched, began = Watched(), time.monotonic()
    command = [sys.executable, "-m", "services.cli", "index", "build", str(corpus), "--kind", kind]
    command += ["--name", NAME, "--data-dir", str(data_dir)]
    command = [sys.executable, "-m", "services.cli", "index", "build", str(corpus), "--kind", kind]
    command += ["--name", NAME, "--data-dir", str(data_dir)]
    for kill in [*kills, None]:
        _run(command, data_dir, kill, watched, began=began, log=log)
        if kill is not None:
            time.sleep(IDLE_S)
    watched.seconds = time.monotonic() - began
    return watched


def collection(data_dir: Path) -> Path:
    return data_dir / "collections" / NAME


def _run(
    command: list[str], data_dir: Path, kill: KillWhen | None, watched: Watched, *, began: float, log: Path
) -> None:
    with log.open("a") as out, subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True) as process:
        while process.poll() is None:
            if (memory := _memory(process.pid)) is not None:
                watched.samples.append(Sample(time.monotonic() - began, *memory))
            state = _state(data_dir)
            if kill is not None and state is not None and kill(state):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                watched.kills.append((time.monotonic() - began, state.rows, state.added))
                return
            time.sleep(SAMPLE_EVERY_S)
    if process.returncode or kill is not None:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}, see {log}")


def _state(data_dir: Path) -> Checkpoint | None:
    """How far the build is."""
    for path in collection(data_dir).glob(f"generations/{TEMPORARY}*/{CHECKPOINT}"):
        try:
            return Checkpoint.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None
    return None


def _memory(pid: int) -> tuple[int, int] | None:
    """Anonymous and mapped bytes of a process that lives."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    sizes = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    if "RssAnon" not in sizes:  # it has ended, and nobody has asked how
        return None
    return int(sizes["RssAnon"][0]) * 1024, int(sizes["RssFile"][0]) * 1024
