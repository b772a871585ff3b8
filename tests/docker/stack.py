"""The stack of docker-compose.yml as a test drives it: a project of its own, on free ports, and broken on purpose."""

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from services.client import RagClient
from services.client.calls import Service
from tests.e2e.running import ROOT, free_ports, until

RETRIEVER_IMAGE = "rag-retriever:latest"
GENERATOR_IMAGE = "rag-generator:latest"
UP_WITHIN_S = 240
_LIMITS = {"RETRIEVER_MEMORY": "1g", "GENERATOR_MEMORY": "2g"}  # less than usual, to be full sooner
# Takes memory until the kernel kills something, and makes sure that it is the service and not this process.
_EAT_MEMORY = """
import pathlib
pathlib.Path("/proc/1/oom_score_adj").write_text("1000")
eaten = []
while True:
    eaten.append(b"x" * (8 << 20))
"""


def docker(*arguments: str, check: bool = True, within_s: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the docker command; what it printed is in the failure."""
    run = subprocess.run(
        ["docker", *arguments],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )
    if check:
        assert run.returncode == 0, f"docker {' '.join(arguments)}:\n{run.stdout}{run.stderr}"
    return run


@dataclass
class Stack:
    project: str
    port: int
    retriever_port: int
    variables: dict[str, str] = field(default_factory=dict)  # for Compose, besides the ports and the limits

    @classmethod
    def new(cls) -> "Stack":
        port, retriever_port = free_ports(2)
        return cls(f"rag-test-{uuid.uuid4().hex[:8]}", port, retriever_port)

    def compose(self, *arguments: str, check: bool = True, within_s: float = 120) -> str:
        ports = {"PORT": str(self.port), "RETRIEVER_PORT": str(self.retriever_port)}
        variables = ports | _LIMITS | self.variables
        run = docker("compose", "-p", self.project, *arguments, check=check, within_s=within_s, **variables)
        return run.stdout

    def up(self) -> None:
        """`docker compose up --wait`; where it fails, the containers' logs are in the failure."""
        try:
            self.compose("up", "-d", "--wait", "--no-build", within_s=UP_WITHIN_S)
        except AssertionError as failed:
            raise AssertionError(f"{failed}\n{self.logs()}") from None

    def wait_until_healthy(self, *services: Service) -> None:
        """Until Docker's own checks say so, which come every few seconds."""

        def unhealthy() -> list[str]:
            return [name for name in services if self.inspect(name)["State"]["Health"]["Status"] != "healthy"]

        until(lambda: not unhealthy(), 60, f"{' and '.join(services)} healthy")

    def logs(self) -> str:
        return self.compose("logs", "--no-color", check=False)

    def client(self, timeout_s: float = 60, api_key: str | None = None) -> RagClient:
        return RagClient(
            f"http://127.0.0.1:{self.port}",
            retriever_url=f"http://127.0.0.1:{self.retriever_port}",
            timeout_s=timeout_s,
            api_key=api_key,
        )

    def container(self, service: Service) -> str:
        return self.compose("ps", "-a", "-q", service).strip()

    def inspect(self, service: Service) -> dict[str, Any]:
        (found,) = json.loads(docker("inspect", self.container(service)).stdout)
        return dict(found)

    def python(self, service: Service, code: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run Python inside the container, as the service's user."""
        return docker("exec", self.container(service), "python", "-c", code, check=check)

    @property
    def network(self) -> str:
        return f"{self.project}_default"

    @contextmanager
    def paused(self, service: Service) -> Iterator[None]:
        container = self.container(service)
        # The kernel's older freezer gives up on a process that is just starting another one.
        until(lambda: docker("pause", container, check=False).returncode == 0, 30, f"the {service} is paused")
        try:
            yield
        finally:
            docker("unpause", container)

    @contextmanager
    def disconnected(self, service: Service) -> Iterator[None]:
        docker("network", "disconnect", self.network, self.container(service))
        try:
            yield
        finally:
            docker("network", "connect", "--alias", service, self.network, self.container(service))

    def kill(self, service: Service) -> float:
        """SIGKILL to its process, as a crash does. When it died, in seconds since the epoch.

        Not `docker kill`: that is somebody's will, after which Docker restarts nothing.
        """
        before = self.inspect(service)
        kill = f"import os; os.kill({before['State']['Pid']}, 9)"
        docker("run", "--rm", "--pid=host", "--user=0", "--network=none", RETRIEVER_IMAGE, "python", "-c", kill)
        return self._death(service, before)

    def run_out_of_memory(self, service: Service) -> float:
        """Until the kernel kills the service. When it died, in seconds since the epoch."""
        before = self.inspect(service)
        self.python(service, _EAT_MEMORY, check=False)
        return self._death(service, before)

    def _death(self, service: Service, before: dict[str, Any]) -> float:
        until(lambda: self.inspect(service)["RestartCount"] > before["RestartCount"], 60, f"{service} is started again")
        finished_at = self.inspect(service)["State"]["FinishedAt"]
        return datetime.fromisoformat(f"{finished_at[:26].rstrip('Z')}+00:00").timestamp()
