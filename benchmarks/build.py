"""One million synthetic passages built by `rag index build`, killed twice and gone on with; and `rag index plan` held
to what each kind then takes at 10 000, 100 000 and a million passages.

``make bench-build`` takes about half an hour on two idle cores and 12 GB under ``build/bench-build``;
``make bench-build BENCH="--count 100000"`` is a trial of a few minutes. Memory is what no file backs (RssAnon); a query
is a search in this process, exact scores and passages included, as the service does it for one client. Figures are
written as they are found, to ``benchmarks/results/build.json``, with the picture beside; ``python -m
benchmarks.build_tables`` puts them into docs/index.md.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
from rich.console import Console

from benchmarks.build_data import text_bytes, write_corpus
from benchmarks.build_process import KillWhen, Watched, build, collection
from benchmarks.build_tables import deviations, plot, table, worst
from benchmarks.processor import processor
from retriever_svc.index import PRESETS
from retriever_svc.index.plan import Need, needs
from retriever_svc.index.probe import Probe
from shared.version import VERSION

RESULTS = Path(__file__).parent / "results"
KEPT = Path(__file__).parents[1] / "build" / "bench-build"
SIZES = (10_000, 100_000)
KILLED = "ivf-pq"
GRAPH_TO = 100_000  # at a million, its graph alone takes more than an hour on two cores
WIKI_DPR = 21_000_000
DIMENSION = 768
QUICK = 200_000  # so few are indexed before anything is saved
PLOTTED = 600  # samples, at least


class Bench:
    """The result, and where it is written."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._console = Console(width=None if sys.stdout.isatty() else 140)
        self._began = time.monotonic()
        self._folder: Path = arguments.folder
        self._log = self._folder / "build.log"
        self.text_bytes = text_bytes()
        self._probe = Probe(DIMENSION, self.text_bytes, 2)
        self.result: dict[str, Any] = {
            "command": shlex.join(["python", "-m", "benchmarks.build", *sys.argv[1:]]),
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {
                "device": processor(),
                "python": platform.python_version(),
                "faiss": faiss.__version__,
                "version": VERSION,
            },
            "dimension": DIMENSION,
            "text_bytes": self.text_bytes,
            "cells": [],
        }

    def say(self, line: str) -> None:
        self._console.print(f"[{time.monotonic() - self._began:6.1f} s] {line}", highlight=False, markup=False)

    def write(self) -> None:
        self.result["load_average"] = os.getloadavg()
        self._arguments.output.write_text(json.dumps(self.result, indent=1) + "\n")

    def run(self) -> None:
        count: int = self._arguments.count
        for size in sorted({size for size in (*SIZES, count) if size <= count}):
            self._size(size, killed=size == count)
        self.say(f"what {WIKI_DPR:,} passages would need")
        self.result["wiki_dpr"] = [asdict(need) for need in self._plan(WIKI_DPR)]
        self.write()

    def _plan(self, size: int) -> list[Need]:
        return list(needs(size, DIMENSION, text_bytes=self.text_bytes, probe=self._probe))

    def _size(self, size: int, *, killed: bool) -> None:
        self.say(f"planning {size:,} passages")
        plan = {need.kind: need for need in self._plan(size)}
        corpus = self._folder / f"passages-{size}.parquet"
        if not corpus.exists():
            self.say(f"writing {size:,} passages to {corpus}")
            write_corpus(corpus, size, DIMENSION)
        for kind in self._arguments.kinds:
            if kind == "hnsw" and size > self._arguments.graph_to:
                self.say(f"{kind} of {size:,} is left out: planned {plan[kind].build_s / 60:.0f} min")
                continue
            kills = self._kills(size) if killed and kind == self._arguments.killed else []
            watched, data_dir = self._built(corpus, size, kind, kills)
            if kills:
                self._describe_kills(watched, data_dir, size)
            cell = {"kind": kind, "count": size, "build_s": watched.seconds, "build_ram_bytes": watched.peak}
            self._measure({**cell, "kills": len(kills)}, data_dir, plan[kind])
        corpus.unlink()

    def _built(self, corpus: Path, size: int, kind: str, kills: list[KillWhen]) -> tuple[Watched, Path]:
        data_dir = self._folder / f"{kind}-{size}"
        shutil.rmtree(data_dir, ignore_errors=True)
        self.say(f"building {kind} of {size:,}")
        return build(corpus, data_dir, kind, kills, self._log), data_dir

    def _measure(self, cell: dict[str, Any], data_dir: Path, planned: Need) -> None:
        truth = self._folder / f"truth-{cell['count']}.npy"
        command = [
            sys.executable,
            "-m",
            "benchmarks.build_cell",
            str(collection(data_dir)),
            str(cell["count"]),
            str(truth),
        ]
        cell |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        cell |= {"planned": asdict(planned)}
        cell |= {"deviation": deviations(cell)}
        self.result["cells"].append(cell)
        self.write()
        shutil.rmtree(data_dir)
        off = ", ".join(f"{name} {value:+.0%}" for name, value in cell["deviation"].items())
        self.say(
            f"{cell['kind']} of {cell['count']:,}: {cell['build_s']:.0f} s, {cell['ram_bytes'] / 1e6:,.0f} MB, "
            f"p50 {cell['p50_ms']:.2f} ms, p99 {cell['p99_ms']:.2f} ms, recall {cell['recall']}; plan off by {off}"
        )

    def _kills(self, size: int) -> list[KillWhen]:
        """While it stores, and while it indexes."""
        return [
            lambda state: state.rows >= size // 3,
            lambda state: state.trained and (state.added > 0 or size <= QUICK),
        ]

    def _describe_kills(self, watched: Watched, data_dir: Path, size: int) -> None:
        verify = [sys.executable, "-m", "services.cli", "index", "verify", "--data-dir", str(data_dir)]
        said = subprocess.run(verify, check=True, capture_output=True, text=True).stdout
        every = max(1, len(watched.samples) // PLOTTED)
        self.result["killed"] = {
            "kind": self._arguments.killed,
            "count": size,
            "seconds": watched.seconds,
            "peak_anonymous_bytes": watched.peak,
            "kills": [{"at_s": at, "stored": rows, "indexed": added} for at, rows, added in watched.kills],
            "verify": said.splitlines()[-1],
            "samples": [[round(s.at_s, 1), s.anonymous, s.mapped] for s in watched.samples[::every]],
        }
        self.write()
        plot(self.result["killed"], self._arguments.output.with_suffix(".png"))
        for at, rows, added in watched.kills:
            self.say(f"killed after {at:.0f} s, {rows:,} stored and {added:,} indexed")
        self.say(
            f"went on to the end: {watched.seconds:.0f} s in all, {watched.peak / 1e6:,.0f} MB at most; {said.strip()}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="passages (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument(
        "--killed", choices=list(PRESETS), default=KILLED, help="kind killed twice (default: %(default)s)"
    )
    parser.add_argument("--graph-to", type=int, default=GRAPH_TO, help="most passages of hnsw (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=KEPT)
    parser.add_argument("--output", type=Path, default=RESULTS / "build.json")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments)
    try:
        bench.run()
    finally:
        for path in arguments.folder.glob("*-*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    sys.stdout.write(table(bench.result))
    bench.say(f"planned within 25 %: {worst(bench.result)}")
    bench.say(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
