"""What is measured in `make bench-retriever`, and what comes out of it; it imports no torch, no faiss, no rival."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from shared.forms import Form

Content = Literal["full", "embeddings", "ids"]
"""What an answer holds besides ids and scores: embeddings and passages, embeddings alone, or neither."""


@dataclass(frozen=True)
class Cell:
    """``clients`` ask at once, each ``batch`` queries a request, as soon as the one before is answered."""

    kind: str
    batch: int
    clients: int
    form: Form = "arrow"
    content: Content = "full"


@dataclass(frozen=True)
class Turn:
    """One system's turn at one cell: ``seconds`` in all, and of each request."""

    seconds: float
    latencies_s: list[float]


@dataclass(frozen=True)
class Figures:
    """``queries_per_s`` is the median of the turns, latencies are of all their requests."""

    system: str
    kind: str
    batch: int
    clients: int
    form: str
    content: str
    queries_per_s: float
    p50_ms: float
    p99_ms: float
    requests: int
    turns: int


class System(Protocol):
    """Something that answers queries. ``name`` as in the tables; ``pids``: its processes."""

    name: str
    pids: Sequence[int]

    def turn(self, cell: Cell, seconds: float) -> Turn: ...

    def ids(self, n_queries: int) -> list[list[int]]:
        """What it finds for the first queries."""
        ...


def figures(system: str, cell: Cell, turns: Sequence[Turn]) -> Figures:
    latencies_s = sorted(latency for turn in turns for latency in turn.latencies_s)
    return Figures(
        system=system,
        kind=cell.kind,
        batch=cell.batch,
        clients=cell.clients,
        form=cell.form,
        content=cell.content,
        queries_per_s=statistics.median(cell.batch * len(turn.latencies_s) / turn.seconds for turn in turns),
        p50_ms=statistics.median(latencies_s) * 1e3,
        p99_ms=latencies_s[int(0.99 * (len(latencies_s) - 1))] * 1e3,
        requests=len(latencies_s),
        turns=len(turns),
    )


def memory_bytes(pids: Sequence[int]) -> tuple[int, int]:
    """Resident and private memory of the processes, as Linux counts it; files that are mapped are resident only."""
    lines = [line.split() for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    resident, private = (sum(int(line[1]) for line in lines if line[0] == name) for name in ("Rss:", "Anonymous:"))
    return resident * 1024, private * 1024
