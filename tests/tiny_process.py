"""The tiny service of :mod:`tests.chassis_app` as a process of its own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@dataclass
class Service:
    """The tiny service as a process, its log in a file."""

    process: subprocess.Popen[bytes]
    log_path: Path
    url: str = field(init=False)

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_path.read_text().splitlines() if line.startswith("{")]

    def wait_for(self, event: str) -> dict[str, Any]:
        until_s = time.monotonic() + 30
        while time.monotonic() < until_s:
            for entry in self.logged():
                if entry["event"] == event:
                    return entry
            assert self.process.poll() is None, self.log_path.read_text()
            time.sleep(0.02)
        raise AssertionError(f"no {event} in {self.log_path.read_text()}")


Start = Callable[..., Service]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    processes: list[subprocess.Popen[bytes]] = []

    def started(*, wait: bool = True, **settings: str) -> Service:
        variables = {"TINY_PORT": "0", "TINY_LOG_FORMAT": "json", **settings}
        log_path = tmp_path / f"log{len(processes)}"
        with log_path.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "tests.chassis_app"],
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=log,
                stderr=log,
            )
        processes.append(process)
        service = Service(process, log_path)
        if wait:
            service.url = service.wait_for("listening")["url"]
        return service

    yield started
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
