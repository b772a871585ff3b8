"""`make bench-retriever`: our retriever service beside raw faiss on the same index file, and beside its rivals.

A real process over loopback HTTP with httpx clients that keep their connections, against faiss in-process: queries a
second and latency, by kind of index, batch, clients, wire form and content of the answer. All systems of a kind run
from the start and take turns, in an order that changes, so that what else the machine does meets all alike; every
library and service searches with the same number of threads (Chroma's server cannot be held to it). Medians of turns.
The clients' work, writing vectors and reading answers, is in every HTTP figure, on the same cores.

What is made once (corpus, indexes, environments of rivals) is kept in the work folder; ``--prepare`` makes it and ends.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
from rich.console import Console

from benchmarks.processor import processor
from benchmarks.retriever_cells import Cell, Figures, System, Turn, figures, memory_bytes
from benchmarks.retriever_data import N_DOCS, WORK, Corpus, Int64Array, Say, corpus, true_ids
from benchmarks.retriever_peers import PEERS, PeerMissing, ours, peer, prepare, raw_faiss
from benchmarks.retriever_plot import plot
from benchmarks.retriever_tables import memory_table, peer_table, raw_table, single_table, verdicts
from shared.forms import Form
from shared.version import VERSION

RESULTS = Path(__file__).parent / "results"
KINDS = ("flat", "hnsw", "ivf-pq")
FORMS: tuple[Form, ...] = ("arrow", "base64", "json")
RECALL_QUERIES = 128


def cells_of(kind: str, arguments: argparse.Namespace) -> Iterator[Cell]:
    """Every batch and number of clients; JSON's forms not with many clients that send large batches."""
    for clients in arguments.clients:
        for batch in arguments.batch:
            for form in FORMS if clients == 1 or batch < max(arguments.batch) else ("arrow",):
                yield Cell(kind, batch, clients, form, "full")
            if clients == 1:
                yield Cell(kind, batch, clients, "arrow", "embeddings")
                yield Cell(kind, batch, clients, "arrow", "ids")


def measured(systems: Sequence[System], cell: Cell, arguments: argparse.Namespace) -> list[Figures]:
    """Every system at ``cell``, turn by turn. The first turn warms up; where it takes long, it counts."""
    warm = [system.turn(cell, 0.0) for system in systems]
    round_s = sum(max(turn.seconds, arguments.seconds) for turn in warm)
    rounds = max(1, min(arguments.turns, int(arguments.cell_seconds / round_s)))
    turns: list[list[Turn]] = [[turn] if rounds == 1 else [] for turn in warm]
    for number in range(rounds):
        order = range(len(systems))
        for i in order if number % 2 == 0 else reversed(order):
            turns[i].append(systems[i].turn(cell, arguments.seconds))
    return [figures(system.name, cell, turns[i]) for i, system in enumerate(systems)]


class Run:
    """What was found so far. Written after every cell: a run that is cut short leaves what it has."""

    def __init__(self, arguments: argparse.Namespace, say: Say) -> None:
        self.arguments = arguments
        self.say = say
        self.figures: list[Figures] = []
        self.about: list[dict[str, Any]] = []  # one line on each system: memory, recall
        self.missing: dict[str, str] = {}  # why a rival is
        self.left = sum(1 for kind in arguments.kinds for _ in cells_of(kind, arguments))
        self._load_before = os.getloadavg()

    def of_kind(self, kind: str, made: Corpus, truth: Int64Array) -> None:
        """Measure all cells of a kind."""
        with ExitStack() as stack:
            service = stack.enter_context(ours(made, kind, self.arguments.threads))
            ceilings = [
                stack.enter_context(raw_faiss(made, kind, how, self.arguments.threads)) for how in ("search", "take")
            ]
            everyone: list[System] = [service, *ceilings, *self._rivals(kind, made, stack)]
            about = [
                {"system": system.name, "kind": kind, "recall": _recall(system.ids(RECALL_QUERIES), truth)}
                for system in everyone
            ]
            done: set[tuple[int, int]] = set()
            for cell in cells_of(kind, self.arguments):
                # The others know nothing of forms; what they answer is measured once, beside the first form.
                first = (cell.batch, cell.clients) not in done
                done.add((cell.batch, cell.clients))
                found = measured(everyone if first else [service, ceilings[0]], cell, self.arguments)
                self.figures += found
                self.left -= 1
                self.write()
                said = ", ".join(f"{one.system} {one.queries_per_s:.0f}/s ({one.p50_ms:.2f} ms)" for one in found)
                shape = f"{kind}, {cell.batch} x {cell.clients} clients, {cell.form}, {cell.content}"
                self.say(f"{shape}: {said}; {self.left} to go")
            for line, system in zip(about, everyone, strict=True):
                line["rss_bytes"], line["private_bytes"] = memory_bytes(system.pids)
            self.about += about
        self.write()

    def _rivals(self, kind: str, made: Corpus, stack: ExitStack) -> Iterator[System]:
        for name in (name for name, nearest in PEERS.items() if nearest == kind and name in self.arguments.peers):
            self.say(f"{kind}: starting {name}")
            try:
                yield stack.enter_context(peer(name, made, self.arguments.threads, self.say))
            except PeerMissing as error:
                self.missing[name] = str(error)
                self.say(f"{name} is missing: {error}")

    def write(self) -> None:
        self.arguments.output.write_text(json.dumps(self._result(), indent=2) + "\n")

    def _result(self) -> dict[str, Any]:
        arguments = self.arguments
        return {
            "command": shlex.join(["python", "-m", "benchmarks.retriever", *sys.argv[1:]]),
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {
                "device": processor(),
                "threads": arguments.threads,
                # Ours alone is about two; far above, figures are of little worth.
                "load_average": {"before": self._load_before, "now": os.getloadavg()},
                "python": platform.python_version(),
                "faiss": faiss.__version__,
                "version": VERSION,
            },
            "count": arguments.count,
            "dimension": arguments.dimension,
            "n_docs": N_DOCS,
            "cells_left": self.left,
            "targets": verdicts(self.figures),
            "missing": self.missing,
            "systems": self.about,
            "figures": [asdict(one) for one in self.figures],
        }


def _recall(found: Sequence[Sequence[int]], truth: Int64Array) -> float:
    return statistics.mean(len(set(row) & set(true)) / N_DOCS for row, true in zip(found, truth.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 000 x 256 and short turns: minutes")
    parser.add_argument("--count", type=int, default=200_000, help="passages (default: %(default)s)")
    parser.add_argument("--dimension", type=int, default=768, help="default: %(default)s")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--seconds", type=float, default=0.4, help="of a turn, at least (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=9, help="of each system at each cell (default: %(default)s)")
    parser.add_argument("--cell-seconds", type=float, default=12.0, help="after which a cell's turns are fewer")
    parser.add_argument("--threads", type=int, default=1, help="of a search (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=WORK, help="where what is made once is kept (%(default)s)")
    parser.add_argument("--prepare", action="store_true", help="make what is made once, and end")
    parser.add_argument("--output", type=Path, default=RESULTS / "retriever.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.count, arguments.dimension, arguments.seconds, arguments.turns = 20_000, 256, 0.2, 3
    console = Console(width=None if sys.stdout.isatty() else 140)
    began_s = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[{time.monotonic() - began_s:6.1f} s] {line}", highlight=False, markup=False)

    made = corpus(arguments.work.resolve(), arguments.count, arguments.dimension, arguments.kinds, say)
    if arguments.prepare:
        for name in arguments.peers:
            prepare(name, made, say)
        return
    truth = true_ids(made, made.queries[:RECALL_QUERIES])
    run = Run(arguments, say)
    for kind in arguments.kinds:
        run.of_kind(kind, made, truth)
    found, about, missing = run.figures, run.about, run.missing
    plot(found, arguments.output.with_suffix(".png"))

    for table in (raw_table(found), single_table(found), peer_table(found), memory_table(about, arguments.count)):
        console.print(table)
    for name, reason in missing.items():
        console.print(f"missing: {name}: {reason}", highlight=False, markup=False)
    for line in verdicts(found):
        console.print(f"{'met   ' if line['met'] else 'missed'} {line['target']}: {line['found']}", highlight=False)
    console.print(f"written: {arguments.output} and the plot beside it", highlight=False)


if __name__ == "__main__":
    main()
