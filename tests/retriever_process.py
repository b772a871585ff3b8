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
            **{f"RETRIEVER_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self._process: subprocess.Popen[bytes] | None = None

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
        while time.monotonic() < until and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/readyz").is_success:
                    return self
            except httpx.TransportError:
                time.sleep(0.02)
        raise AssertionError(f"the retriever is not ready:\n{self.log.read_text()[-4000:]}")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL, to it and to whatever it started."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> int:
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(timeout=60)
