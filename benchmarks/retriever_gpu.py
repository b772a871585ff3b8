"""The retriever's search on a GPU beside raw faiss on the same GPU, and both on the CPU: part of `make gpu-check`.

Ours is what the service runs for a batch of queries: faiss for more hits than were asked for, their true embeddings
from the host, exact scores, order. Raw is faiss alone for ids and scores of as many as asked, over the same file, with
as many lists looked into and as many threads. In one process; medians after a warm-up. The file of `ivf-pq` has codes
of 128 bytes, and faiss's code for GPUs names 96 as the most: where it refuses, the service keeps the index on the CPU,
which is said at the end; ``ivf-pq96`` is made to fit.

Shapes: B queries, D dimension.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.processor import processor
from benchmarks.retriever_data import N_DOCS, WORK, Corpus, Float32Array, Int64Array, Say, corpus, true_ids
from retriever_svc import ranking
from retriever_svc.index import INDEX, PRESETS, GpuStorage, Index, use_threads
from retriever_svc.index.kinds import core_of, lists_of
from retriever_svc.index.plan import index_bytes
from retriever_svc.ranking import Segment
from shared.logs import configure_logging
from shared.schemas import SearchParams
from tests.retriever_data import write_index

RESULTS = Path(__file__).parent / "results"
DIMENSION = 768
FITTING = "ivf-pq96"
KINDS: dict[str, tuple[GpuStorage, ...]] = {
    "flat": ("float32", "float16"),
    "ivf-flat": ("float32",),
    FITTING: ("float16",),  # its tables of distances fit into a multiprocessor's shared memory in half precision only
    "ivf-pq": ("float32",),
}
JUDGED_QUERIES = 512
LEAST_RUNS = 3
GIB = 2**30

_FAISS: Any = faiss  # its type stubs lack what is there on a GPU only

Answer = Callable[[Float32Array], Int64Array]
"""The rows of the best ``N_DOCS`` of each query: (B, N_DOCS)."""


@dataclass(frozen=True)
class Figures:
    """One index on one device: milliseconds by batch, share of the true best that is found.

    ``equal``: share of the queries to which ours answers with the CPU's documents in the CPU's order. ``index_bytes``:
    what raw faiss allocated for the index on the GPU; ``held_bytes``: what ours took of it, faiss's scratch included.
    """

    kind: str
    device: str
    raw_ms: dict[int, float]
    ours_ms: dict[int, float]
    raw_recall: float
    ours_recall: float
    equal: float
    planned_bytes: float
    index_bytes: int | None = None
    held_bytes: int | None = None


@dataclass(frozen=True)
class Bench:
    """What all kinds are measured on."""

    made: Corpus
    truth: Int64Array
    max_norm: float
    batches: Sequence[int]
    seconds: float

    def figures(self, kind: str, folder: Path, storages: Sequence[GpuStorage]) -> Iterator[Figures]:
        """On the CPU first, then with each storage on the GPU, unless faiss cannot search it there."""
        on_cpu, expected = self._figures(kind, Index.read(folder, device="cpu"), _raw(folder, self._params(kind)))
        yield on_cpu
        for storage in storages:
            free = torch.cuda.mem_get_info()[0]
            index = Index.read(folder, device="cuda", gpu_storage=storage)
            held = free - torch.cuda.mem_get_info()[0]
            if index.device == "cpu":
                continue
            searcher, size = _raw_on_gpu(folder, self._params(kind), storage)
            figures, _ = self._figures(kind, index, searcher, expected)
            planned = _planned(kind, storage, self.made.count)
            yield replace(figures, planned_bytes=planned, index_bytes=size, held_bytes=held)
            del index, searcher  # before the next is measured

    def _figures(
        self, kind: str, index: Index, searcher: Any, expected: Int64Array | None = None
    ) -> tuple[Figures, Int64Array]:
        """And the rows that ours finds."""
        ours, judged = self._ours(index, self._params(kind)), self.made.queries[:JUDGED_QUERIES]

        def raw(queries_BD: Float32Array) -> Int64Array:
            rows: Int64Array = searcher.search(queries_BD, N_DOCS)[1]
            return rows

        rows = ours(judged)
        figures = Figures(
            kind,
            index.device,
            raw_ms={batch: self._median_ms(raw, batch) for batch in self.batches},
            ours_ms={batch: self._median_ms(ours, batch) for batch in self.batches},
            raw_recall=self._recall(raw(judged)),
            ours_recall=self._recall(rows),
            equal=1.0 if expected is None else float(np.all(rows == expected, axis=1).mean()),
            planned_bytes=_planned(kind, "float32", self.made.count),
        )
        return figures, rows

    def _params(self, kind: str) -> SearchParams:
        return PRESETS["ivf-pq" if kind == FITTING else kind].params(self.made.count)

    def _ours(self, index: Index, params: SearchParams) -> Answer:
        segments = [Segment(0, index, np.arange(index.count), self.max_norm)]

        def answer(queries_BD: Float32Array) -> Int64Array:
            found = ranking.search(segments, queries_BD, [N_DOCS] * len(queries_BD), params)
            return np.stack([one.rows for one in found])

        return answer

    def _median_ms(self, answer: Answer, batch: int) -> float:
        """Of runs over other queries each; the first is a warm-up."""
        queries, times_s = self.made.queries, list[float]()
        answer(queries[:batch])
        while len(times_s) < LEAST_RUNS or sum(times_s) < self.seconds:
            start = len(times_s) * batch % (len(queries) - batch + 1)
            began = time.perf_counter()
            answer(queries[start : start + batch])
            times_s.append(time.perf_counter() - began)
        return statistics.median(times_s) * 1e3

    def _recall(self, rows: Int64Array) -> float:
        pairs = zip(rows.tolist(), self.truth.tolist(), strict=True)
        return statistics.mean(len(set(found) & set(true)) / N_DOCS for found, true in pairs)


def _raw(folder: Path, params: SearchParams) -> Any:
    """faiss over the file of ours."""
    index = faiss.read_index(str(folder / INDEX))
    if params.nprobe is not None:
        core_of(index).nprobe = params.nprobe
    return index


def _raw_on_gpu(folder: Path, params: SearchParams, storage: GpuStorage) -> tuple[Any, int]:
    """And the bytes that it takes there, scratch memory aside."""
    resources, options = _FAISS.StandardGpuResources(), _FAISS.GpuClonerOptions()
    options.useFloat16 = storage == "float16"
    options.allowCpuCoarseQuantizer = True
    index = _FAISS.index_cpu_to_gpu(resources, 0, _raw(folder, params), options)
    allocated = resources.getMemoryInfo()[0].items()
    return index, sum(int(size) for name, (_, size) in allocated if not name.startswith("Temporary"))


def _factory(kind: str, count: int) -> str:
    return f"IVF{lists_of(count)}_HNSW32,PQ96" if kind == FITTING else kind


def _planned(kind: str, storage: GpuStorage, count: int) -> float:
    """Bytes that `rag index plan` would tell."""
    if kind == FITTING:
        return index_bytes("ivf-pq", count, DIMENSION) - 32 * count
    return index_bytes("flat-fp16" if (kind, storage) == ("flat", "float16") else kind, count, DIMENSION)


def times_table(found: Sequence[Figures]) -> Table:
    table = Table(
        title=f"milliseconds a batch, {N_DOCS} documents a query",
        caption="raw: faiss's ids and scores alone; ours: the search of the service, with exact scores. "
        "x CPU: our time there over ours here.",
    )
    for name in ("kind", "device"):
        table.add_column(name)
    for name in ("batch", "raw faiss", "ours", "ours / raw", "ours, queries/s", "x CPU"):
        table.add_column(name, justify="right")
    for one in found:
        on_cpu = next(other for other in found if (other.kind, other.device) == (one.kind, "cpu"))
        for batch, ours_ms in one.ours_ms.items():
            table.add_row(
                one.kind,
                one.device,
                str(batch),
                f"{one.raw_ms[batch]:.2f}",
                f"{ours_ms:.2f}",
                f"{ours_ms / one.raw_ms[batch]:.2f}",
                f"{batch / ours_ms * 1e3:.0f}",
                "" if one is on_cpu else f"{on_cpu.ours_ms[batch] / ours_ms:.1f}",
            )
    return table


def answers_table(found: Sequence[Figures]) -> Table:
    table = Table(
        title="what is found, and GPU memory in GiB",
        caption="equal: queries to which ours answers as on the CPU; held: faiss's scratch memory included.",
    )
    for name in ("kind", "device"):
        table.add_column(name)
    for name in (f"recall@{N_DOCS}, raw", "ours", "equal", "planned", "index", "held"):
        table.add_column(name, justify="right")
    for one in found:
        sizes = [one.planned_bytes, one.index_bytes, one.held_bytes]
        table.add_row(
            one.kind,
            one.device,
            f"{one.raw_recall:.3f}",
            f"{one.ours_recall:.3f}",
            f"{one.equal:.1%}",
            *("" if size is None else f"{size / GIB:.2f}" for size in sizes),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: its figures alone")
    parser.add_argument("--count", type=int, default=200_000, help="passages (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 64, 512])
    parser.add_argument("--seconds", type=float, default=0.3, help="of a measurement, at least (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of a search; 0: as the service chooses")
    parser.add_argument("--work", type=Path, default=WORK, help="where the vectors are kept (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "retriever_gpu.json")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if cuda and not (torch.cuda.is_available() and faiss.get_num_gpus()):
        print("benchmarks.retriever_gpu needs CUDA in torch and in faiss: nothing is measured")
        return
    configure_logging("warning", "auto")
    console = Console(width=None if sys.stdout.isatty() else 120)
    began_s = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[{time.monotonic() - began_s:6.1f} s] {line}", highlight=False, markup=False)

    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.retriever_gpu", *sys.argv[1:]]),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe(arguments.device) | {"cpu": processor(), "faiss": faiss.__version__},
        "count": arguments.count,
        "dimension": DIMENSION,
        "n_docs": N_DOCS,
    }
    found: list[Figures] = []
    for one in _measured(arguments, say):
        found.append(one)
        result |= {"faiss_threads": arguments.threads, "figures": [asdict(each) for each in found]}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")  # a run that is cut short leaves what it has
    console.print(times_table(found), answers_table(found))
    for kind in arguments.kinds if cuda else ():
        if all(one.device == "cpu" for one in found if one.kind == kind):
            console.print(f"{kind} stays on the CPU: faiss cannot search it on a GPU", highlight=False)
    console.print(f"written: {arguments.output}", highlight=False)


def _measured(arguments: argparse.Namespace, say: Say) -> Iterator[Figures]:
    all_threads = faiss.omp_get_max_threads()
    arguments.threads = use_threads(arguments.threads)  # from here on as many as it chose
    faiss.omp_set_num_threads(all_threads)
    made = corpus(arguments.work.resolve(), arguments.count, DIMENSION, [], say)
    truth = true_ids(made, made.queries[:JUDGED_QUERIES])
    vectors = np.array(made.vectors)
    largest = float(np.linalg.norm(vectors.astype(np.float64), axis=1).max())
    bench = Bench(made, truth, largest, arguments.batch, arguments.seconds)
    if arguments.device == "cuda":  # what the first index on the GPU brings along is not that index's memory
        _FAISS.index_cpu_to_gpu(_FAISS.StandardGpuResources(), 0, faiss.IndexFlatIP(DIMENSION))
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory(dir=made.folder) as folder:
            say(f"building {kind}")
            faiss.omp_set_num_threads(all_threads)
            write_index(Path(folder), vectors, _factory(kind, made.count))
            faiss.omp_set_num_threads(arguments.threads)
            for one in bench.figures(kind, Path(folder), KINDS[kind] if arguments.device == "cuda" else ()):
                yield one
                times = ", ".join(f"{batch}: {raw:.2f} → {one.ours_ms[batch]:.2f}" for batch, raw in one.raw_ms.items())
                say(f"{kind} on {one.device}, ms by batch, raw → ours: {times}")


if __name__ == "__main__":
    main()
