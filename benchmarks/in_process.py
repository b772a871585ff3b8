"""A rival that is a library: it lives in a process of its own and is told over a pipe what to do.

One JSON line in, one out. Several clients are threads that take turns at the library, so that it never uses more
threads than the services beside it, which have one thread for their searches.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.retriever_cells import Cell, Turn

Ask = Callable[[int, Cell], list[list[int]]]
"""Answers the ``n``-th request of a cell, and gives the ids."""


class InProcess:
    """The near end. ``module`` is run with ``arguments``, and calls `answer_turns`."""

    def __init__(self, name: str, module: str, *arguments: object) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pids: Sequence[int] = (self._process.pid,)
        self._receive()

    def turn(self, cell: Cell, seconds: float) -> Turn:
        return Turn(**self._asked({"cell": vars(cell), "seconds": seconds}))

    def ids(self, n_queries: int) -> list[list[int]]:
        found: list[list[int]] = self._asked({"n_queries": n_queries})
        return found

    def close(self) -> None:
        assert self._process.stdin is not None  # noqa: S101  it is a pipe
        self._process.stdin.close()
        self._process.wait()

    def _asked(self, message: dict[str, Any]) -> Any:
        assert self._process.stdin is not None  # noqa: S101  it is a pipe
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> Any:
        assert self._process.stdout is not None  # noqa: S101  it is a pipe
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self._process.wait()}")
        return json.loads(line)


def answer_turns(ask: Ask, in_thread: Callable[[], object] = lambda: None) -> None:
    """The far end: until the near end closes. ``in_thread`` is called first in every thread that asks."""
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        if "cell" in message:
            turn = closed_loop(ask, Cell(**message["cell"]), message["seconds"], in_thread)
            print(json.dumps(vars(turn)), flush=True)
        else:
            print(json.dumps(ask(0, Cell("", message["n_queries"], 1))), flush=True)


def closed_loop(ask: Ask, cell: Cell, seconds: float, in_thread: Callable[[], object]) -> Turn:
    one_at_a_time = threading.Lock()
    latencies_s: list[float] = []
    began_s = time.perf_counter()

    def client(number: int) -> None:
        in_thread()
        request = number
        while True:
            sent_s = time.perf_counter()
            with one_at_a_time:
                ask(request, cell)
            latencies_s.append(time.perf_counter() - sent_s)
            request += cell.clients
            if time.perf_counter() - began_s >= seconds:
                return

    if cell.clients == 1:
        client(0)
    else:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(cell.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return Turn(time.perf_counter() - began_s, latencies_s)
