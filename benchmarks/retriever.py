"""`make bench-retriever`: our retriever service beside raw faiss on the same index file, and beside its rivals.

A real process over loopback HTTP with httpx clients that keep their connections, against faiss in-process: queries a
second and latency, by kind of index, batch, clients, wire form and content of the answer. All systems of a kind run
from the start and take turns, so that what else the machine does meets all alike; every library and service searches
with the same number of threads (Chroma's server cannot be held to it). Medians of turns. The clients' work, writing
vectors and reading answers, is in every HTTP figure, on the same cores.
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
from benchmarks.retriever_cells import Cell, Figures, System, figures, resident_bytes
from benchmarks.retriever_data import N_DOCS, Corpus, Int64Array, Say, corpus, true_ids
from benchmarks.retriever_peers import PEERS, PeerMissing, ours, peer, raw_faiss
from benchmarks.retriever_tables import memory_table, peer_table, raw_table, single_table, verdicts
from shared.forms import Form
from shared.version import VERSION

RESULTS = Path(__file__).parent / "results"
KINDS = ("flat", "hnsw", "ivf-pq")
FORMS: tuple[Form, ...] = ("arrow", "base64", "json")
RECALL_QUERIES = 128
LONG_S = 8.0  # where one round of requests takes longer, turns are few


def cells_of(kind: str, arguments: argparse.Namespace) -> Iterator[Cell]:
    """Every batch, number of clients, form and content; many clients with large batches only in Arrow."""
    for clients in arguments.clients:
        for batch in arguments.batch:
            forms = FORMS if clients == 1 or batch < max(arguments.batch) else ("arrow",)
            for form in forms:
                yield Cell(kind, batch, clients, form, "full")
                yield Cell(kind, batch, clients, form, "embeddings")
            yield Cell(kind, batch, clients, "arrow", "ids")


def measured(systems: Sequence[System], cells: Sequence[Cell], arguments: argparse.Namespace) -> list[Figures]:
    """Every system at each of ``cells``, which differ in nothing that it knows of. The first turn warms up."""
    turns: dict[int, list[Any]] = {i: [] for i in range(len(systems))}
    asked = list(zip(systems, cells, strict=True))
    rounds = arguments.turns
    if max(system.turn(cell, 0.0).seconds for system, cell in asked) > LONG_S:
        rounds = min(rounds, 2)
    for _ in range(rounds):
        for i, (system, cell) in enumerate(asked):
            turns[i].append(system.turn(cell, arguments.seconds))
    return [figures(system.name, cell, turns[i]) for i, (system, cell) in enumerate(asked)]


def of_kind(
    kind: str, made: Corpus, truth: Int64Array, arguments: argparse.Namespace, say: Say
) -> tuple[list[Figures], list[dict[str, Any]], dict[str, str]]:
    """Figures, one line on each system (memory, recall), and why a rival is missing."""
    found: list[Figures] = []
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        service = stack.enter_context(ours(made, kind, arguments.threads))
        ceilings = [stack.enter_context(raw_faiss(made, kind, how, arguments.threads)) for how in ("search", "take")]
        rivals: list[System] = []
        for name in (name for name, nearest in PEERS.items() if nearest == kind and name in arguments.peers):
            say(f"{kind}: starting {name}")
            try:
                rivals.append(stack.enter_context(peer(name, made, arguments.threads, say)))
            except PeerMissing as error:
                missing[name] = str(error)
                say(f"{name} is missing: {error}")
        everyone: list[System] = [service, *ceilings, *rivals]
        about = []
        for system in everyone:
            ids = system.ids(RECALL_QUERIES)
            hits = [len(set(row) & set(true)) / N_DOCS for row, true in zip(ids, truth.tolist(), strict=True)]
            about.append({"system": system.name, "kind": kind, "recall": statistics.mean(hits)})
        done: set[tuple[int, int]] = set()
        for cell in cells_of(kind, arguments):
            # The others know nothing of forms; what they answer is measured once, beside the first form.
            first = (cell.batch, cell.clients) not in done
            done.add((cell.batch, cell.clients))
            systems: list[System] = everyone if first else [service, ceilings[0]]
            figures_of = measured(systems, [cell] * len(systems), arguments)
            found += figures_of
            said = ", ".join(f"{f.system} {f.queries_per_s:.0f}/s ({f.p50_ms:.2f} ms)" for f in figures_of)
            say(f"{kind}, {cell.batch} x {cell.clients} clients, {cell.form}, {cell.content}: {said}")
        for line, system in zip(about, everyone, strict=True):
            line["rss_bytes"] = resident_bytes(system.pids)
    return found, about, missing


def result_of(
    arguments: argparse.Namespace, found: Sequence[Figures], about: Sequence[dict[str, Any]], missing: dict[str, str]
) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "-m", "benchmarks.retriever", *sys.argv[1:]]),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "device": processor(),
            "threads": arguments.threads,
            "load_average": os.getloadavg(),  # ours alone is about two; far above, figures are of little worth
            "python": platform.python_version(),
            "faiss": faiss.__version__,
            "version": VERSION,
        },
        "count": arguments.count,
        "dimension": arguments.dimension,
        "n_docs": N_DOCS,
        "targets": verdicts(found),
        "missing": missing,
        "systems": about,
        "figures": [asdict(one) for one in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 000 x 256 and short turns: minutes")
    parser.add_argument("--count", type=int, default=200_000, help="passages (default: %(default)s)")
    parser.add_argument("--dimension", type=int, default=768, help="default: %(default)s")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn, at least (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="of each system at each cell (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a search (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "retriever.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.count, arguments.dimension, arguments.seconds, arguments.turns = 20_000, 256, 0.2, 3
    console = Console(width=None if sys.stdout.isatty() else 140)
    began_s = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[{time.monotonic() - began_s:6.1f} s] {line}", highlight=False, markup=False)

    made = corpus(arguments.count, arguments.dimension, arguments.kinds, say)
    truth = true_ids(made, made.queries[:RECALL_QUERIES])
    found: list[Figures] = []
    about: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for kind in arguments.kinds:
        figures_of, about_of, missing_of = of_kind(kind, made, truth, arguments, say)
        found, about, missing = found + figures_of, about + about_of, missing | missing_of
        arguments.output.write_text(json.dumps(result_of(arguments, found, about, missing), indent=2) + "\n")

    for table in (raw_table(found), single_table(found), peer_table(found), memory_table(about, arguments.count)):
        console.print(table)
    for name, reason in missing.items():
        console.print(f"missing: {name}: {reason}", highlight=False, markup=False)
    for line in verdicts(found):
        console.print(f"{'met   ' if line['met'] else 'missed'} {line['target']}: {line['found']}", highlight=False)
    console.print(f"written: {arguments.output}", highlight=False)


if __name__ == "__main__":
    main()
