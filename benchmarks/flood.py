"""A cheap HTTP client for open-loop load: requests written as bytes, answers read as far as their status and length.

It shares the machine with what it loads, so it costs little: keep-alive, one write a request, no objects for headers.
``python -m benchmarks.flood`` reads a plan from standard input and writes the samples to standard output, as JSON.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import uvloop

from benchmarks.load import arrivals

TIMEOUT_S = 30.0
MAX_CONNECTIONS = 700


@dataclass(frozen=True)
class Plan:
    """``rate`` requests a second for ``seconds``, each the next of ``bodies`` with the next of ``keys``.

    With ``callers`` it is closed-loop instead: so many callers, each asking again once it has its answer.
    """

    port: int
    path: str
    bodies: Sequence[str]
    keys: Sequence[str]
    rate: float
    seconds: float
    seed: int
    callers: int = 0


@dataclass(frozen=True)
class Sent:
    """``due_s`` since the start; ``status`` 0 where the connection failed or no answer came in time."""

    due_s: float
    seconds: float
    status: int


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[int] | None = None
        self._head = b""
        self._status = 0
        self._left: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def ask(self, request: bytes) -> "asyncio.Future[int]":
        self._answer = asyncio.get_running_loop().create_future()
        self._head, self._left = b"", None
        self.transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        if self._left is None:
            self._head += data
            head, found, body = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            self._status = int(head[9:12])
            lower = head.lower()
            at = lower.index(b"content-length: ") + 16
            self._left = int(lower[at:].split(b"\r\n", 1)[0]) - len(body)
        else:
            self._left -= len(data)
        if self._left <= 0 and self._answer is not None and not self._answer.done():
            self._answer.set_result(self._status)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("closed by the server"))


class _Client:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.samples: list[Sent] = []
        self._idle: list[_Connection] = []
        self._open = 0
        self._requests = [
            _request(plan.port, plan.path, plan.bodies[i % len(plan.bodies)], plan.keys[i % len(plan.keys)])
            for i in range(len(plan.bodies) * len(plan.keys))
        ]

    async def run(self) -> list[Sent]:
        self._began_s = time.perf_counter()
        if self.plan.callers:
            await asyncio.gather(*map(self._call, range(self.plan.callers)))
            return self.samples
        tasks: set[asyncio.Task[None]] = set()
        for index, due_s in enumerate(arrivals(self.plan.rate, self.plan.seconds, self.plan.seed)):
            wait_s = self._began_s + due_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            task = asyncio.create_task(self._send(index, due_s))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        while tasks:
            await asyncio.wait(tasks)
        return self.samples

    async def _call(self, caller: int) -> None:
        index = caller
        while (due_s := time.perf_counter() - self._began_s) < self.plan.seconds:
            await self._send(index, due_s)
            index += self.plan.callers

    async def _send(self, index: int, due_s: float) -> None:
        status, connection = 0, None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                connection = self._kept() or await self._connect()
                status = await connection.ask(self._requests[index % len(self._requests)])
        except (OSError, TimeoutError):
            if connection is not None:
                self._open -= 1
                connection.transport.abort()
        else:
            if connection.transport.is_closing():
                self._open -= 1
            else:
                self._idle.append(connection)
        self.samples.append(Sent(due_s, time.perf_counter() - self._began_s - due_s, status))

    def _kept(self) -> _Connection | None:
        """One that is still open: the server closes those that are idle for long."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
            self._open -= 1
        return None

    async def _connect(self) -> _Connection:
        if self._open >= MAX_CONNECTIONS:
            raise ConnectionError("no more connections: too many requests wait for an answer")
        self._open += 1
        try:
            _, connection = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", self.plan.port)
        except OSError:
            self._open -= 1
            raise
        return connection


def _request(port: int, path: str, body: str, key: str) -> bytes:
    content = body.encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


class Flood:
    """A plan that runs in a process of its own, from the start on."""

    def __init__(self, plan: Plan) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.flood"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None  # noqa: S101  it is a pipe
        self._process.stdin.write(json.dumps(asdict(plan)))
        self._process.stdin.close()

    def began(self) -> None:
        """Waits until it sends."""
        assert self._process.stdout is not None  # noqa: S101  it is a pipe
        self._process.stdout.readline()

    def running(self) -> bool:
        return self._process.poll() is None

    def samples(self) -> list[Sent]:
        """Waits for its end. Raises: SystemExit: it failed."""
        assert self._process.stdout is not None  # noqa: S101  it is a pipe
        written = self._process.stdout.read()
        if self._process.wait() != 0:
            raise SystemExit("the load generator failed")
        return [Sent(*row) for row in json.loads(written)]


def main() -> None:
    plan = Plan(**json.load(sys.stdin))
    client = _Client(plan)
    print(flush=True)
    samples = uvloop.run(client.run())
    json.dump([(sent.due_s, sent.seconds, sent.status) for sent in samples], sys.stdout)


if __name__ == "__main__":
    main()
