"""`rag up` as a test drives it: on free ports, with a data folder of its own."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from services.client import RagClient
from services.client.calls import Service

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
RAG = (sys.executable, "-m", "services.cli")
PATIENT = {"GENERATOR_SHED_AFTER_MS": "0"}  # callers in tests rather wait on a busy machine than be refused
START_WITHIN_S = 180.0  # the index is built at the first start, and the machine may be busy


def environment(**variables: str) -> dict[str, str]:
    """The environment without what would change the services, but for ``variables``."""
    ours = ("RAG_", "RETRIEVER_", "GENERATOR_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    # Two processes share few cores: more threads than those only wait for each other.
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"} | variables


def free_ports(n: int) -> list[int]:
    """Ports that are free now, all different."""
    probes = [socket.socket() for _ in range(n)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has asked for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], T], within_s: float, what: str) -> T:
    """What ``condition`` returns once that is true."""
    end = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {within_s} s: {what}"
        time.sleep(0.05)
    return value


@dataclass
class Up:
    """A running `rag up`."""

    process: subprocess.Popen[str]
    url: str
    retriever_url: str
    lines: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, data_dir: Path, *options: str, **variables: str) -> "Up":
        port, retriever_port = free_ports(2)
        process = subprocess.Popen(
            [*RAG, "up", "--port", str(port), "--retriever-port", str(retriever_port), *options],
            cwd=ROOT,
            env=environment(**{"RETRIEVER_DATA_DIR": str(data_dir), **PATIENT, **variables}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        up = cls(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{retriever_port}")
        threading.Thread(target=up._read, daemon=True).start()
        return up

    def wait_until_ready(self) -> "Up":
        def both_ready() -> bool:
            assert self.process.poll() is None, f"rag up ended:\n{self.log}"
            with self.client(timeout_s=5) as client:
                return all(client.ready(service).status == "ok" for service in ("retriever", "generator"))

        until(both_ready, START_WITHIN_S, "both services ready")
        until(lambda: "Ctrl-C stops" in self.log or '"event": "ready"' in self.log, 10, "rag up says so")
        return self

    def client(self, timeout_s: float = 60) -> RagClient:
        return RagClient(self.url, retriever_url=self.retriever_url, timeout_s=timeout_s)

    def rag(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command against these services."""
        addresses = environment(RAG_URL=self.url, RAG_RETRIEVER_URL=self.retriever_url)
        return subprocess.run(
            [*RAG, *arguments], cwd=ROOT, env=addresses, capture_output=True, text=True, timeout=60, check=False
        )

    def pid_of(self, service: Service) -> int:
        """The process that serves now; 0 where there is none."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            if f"{service}_svc" in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                return int(pid)
        return 0

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def stop(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()  # the services die with it
            raise

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            self.lines.extend(line.rstrip("\n") for line in lines)
