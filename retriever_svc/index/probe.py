"""What this machine does in a second, for :mod:`retriever_svc.index.plan`: measured on small indexes, here and now.

Every figure is one that a cost grows with: a row stored, a vector compared in a matrix product, a code written, a
vector visited in a graph. What lies in a cache while it is small and does not when it is large is measured apart: a
scan over more than a cache holds, and a row fetched from so much memory as the index will take.

Searches run as the service does them, with half of the threads; builds with all.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retriever_svc import ranking
from retriever_svc.checkpoint import BuildPlan, Work
from retriever_svc.index.building import EMBEDDINGS, INDEX, build_index, multiply_matrices, train
from retriever_svc.index.faiss_index import Index, use_threads
from retriever_svc.index.huge_pages import to_huge_pages
from retriever_svc.index.kinds import HNSW_CONSTRUCTION, PRESETS, empty_index, lists_of, recipe
from retriever_svc.index.vectors import MappedVectors, VectorsFile
from retriever_svc.passages import passage_schema
from retriever_svc.ranking import Segment
from retriever_svc.record import Record
from retriever_svc.source import from_parquet
from shared.retrieval import Float32Array

ROWS = (2048, 8192)  # of the small and the large probe
STORED_ROWS = (2048, 98_304)  # of those of storing, where a wait for the disk weighs more than a thousand rows
CENTRE_OF = 40  # vectors a cluster
QUERIES = 32
N_DOCS = 5
SCAN_BYTES = 2**27  # more than a cache holds
FETCH_BYTES = 2**28
BOOKS = 16  # of those of product quantization, learnt by the probe

Method = TypeVar("Method", bound=Callable[..., float])


@dataclass(frozen=True)
class Graph:
    """Of HNSW at ``ROWS[1]`` vectors: seconds to compare a visited vector while it is cached, vectors visited with each
    number of candidates, and seconds to link one vector in beside what it visits."""

    compare_s: float
    visited: dict[int, float]
    link_s: float


def _once(method: Method) -> Method:
    """Measured once for the same arguments: what is planned for two sizes differs by the sizes alone."""

    @wraps(method)
    def measured(self: "Probe", *arguments: object) -> float:
        key = (method.__name__, *arguments)
        if key not in self.measured:
            self.measured[key] = method(self, *arguments)
        return self.measured[key]

    return cast("Method", measured)


class Probe:
    """Measures when asked, once. ``text_bytes``: of a passage; ``itemsize``: bytes of a stored number."""

    def __init__(self, dimension: int, text_bytes: int, itemsize: int) -> None:
        self._dimension, self._text_bytes = dimension, text_bytes
        self._dtype = np.dtype(np.float16 if itemsize == 2 else np.float32)
        dice = np.random.default_rng(0)
        rows = max(ROWS)
        centres = dice.standard_normal((rows // CENTRE_OF, dimension), np.float32)
        noise = dice.standard_normal((rows, dimension), np.float32)
        vectors = centres[dice.integers(0, len(centres), rows)] + noise / 2
        self._vectors_ND: Float32Array = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        self.threads = faiss.omp_get_max_threads()
        self.measured: dict[tuple[object, ...], float] = {}

    # --- building ------------------------------------------------------------------------------------------

    @cached_property
    def start_s(self) -> float:
        """For a process to start."""
        return _timed(lambda: subprocess.run([sys.executable, "-c", "import retriever_svc.build"], check=True))

    @cached_property
    def _recorded(self) -> tuple[float, float, float, float]:
        small, large = (self._record(rows) for rows in STORED_ROWS)
        few, many = STORED_ROWS
        a_row_s = max(0.0, large[0] - small[0]) / (many - few)
        return max(0.0, small[0] - few * a_row_s), a_row_s, large[1] / many, large[2] / many

    @property
    def record_fixed_s(self) -> float:
        """To store any number of rows."""
        return self._recorded[0]

    @property
    def record_row_s(self) -> float:
        """To store one more."""
        return self._recorded[1]

    @property
    def table_row_bytes(self) -> float:
        return self._recorded[2]

    @property
    def write_byte_s(self) -> float:
        """To write one byte of an index and its checksum, and have it on the disk."""
        return self._recorded[3] / (4 * self._dimension)

    def _record(self, rows: int) -> tuple[float, float, float]:
        """Seconds to store rows from a file, bytes of the table, seconds to write a flat index of them."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = folder / "source.parquet"
            pq.write_table(pa.Table.from_batches(list(self._batches(rows))), path)
            began = time.perf_counter()
            source = from_parquet(path, "none")
            plan = BuildPlan(
                source="probe", schema_="", encoder="", kind="", keeps_embeddings=True, index=None, lineage=None,
                applied=0, origin="build", versions={},
            )  # fmt: skip
            work = Work.open(folder, plan)
            Record(work, source, keeps_embeddings=True).finish()
            record_s = time.perf_counter() - began
            table = sum(
                path.stat().st_size for path in (work.generation / "passages.lance").rglob("*") if path.is_file()
            )
            vectors = VectorsFile(work.generation / EMBEDDINGS, self._dimension, str(self._dtype))
            flat = recipe("flat", self._dimension, rows)
            return record_s, table, _timed(lambda: build_index(work, vectors, flat))

    def _batches(self, rows: int) -> Iterator[pa.RecordBatch]:
        dice = np.random.default_rng(1)
        words = np.array(["".join(dice.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(4096)])
        schema = passage_schema(self._dimension, str(self._dtype))
        for start in range(0, rows, 1024):
            first = start % len(self._vectors_ND)
            part = self._vectors_ND[first : first + min(1024, rows - start)].astype(self._dtype)
            n = len(part)
            texts = [
                " ".join(row) for row in words[dice.integers(0, 4096, (n, max(1, self._text_bytes // 6)))].tolist()
            ]
            embeddings = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), self._dimension)
            columns = [
                pa.array(np.arange(start, start + n)),
                pa.array([f"Title {i}" for i in range(n)]),
                pa.array(texts),
            ]
            yield pa.record_batch([*columns, embeddings], schema=schema)

    @cached_property
    def compare_s(self) -> float:
        """Seconds to compare one vector with one centroid in a matrix product, as clustering does it."""
        centroids = np.ascontiguousarray(self._vectors_ND[:1024])
        coarse = faiss.IndexFlatIP(self._dimension)
        coarse.add(centroids)
        return _best(lambda: coarse.search(self._vectors_ND, 1)) / (len(self._vectors_ND) * len(centroids))

    @cached_property
    def sample_row_s(self) -> float:
        """To read one row of those that are trained on."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / EMBEDDINGS
            self._vectors_ND.astype(self._dtype).tofile(path)
            rows = np.arange(0, len(self._vectors_ND), 4)
            return _best(lambda: VectorsFile(path, self._dimension, str(self._dtype)).take(rows)) / len(rows)

    @_once
    def encode_row_s(self, kind: str) -> float:
        """To turn one vector into its code: sq8, flat-fp16."""
        index = self._empty(kind)
        return _best(lambda: index.sa_encode(self._vectors_ND)) / len(self._vectors_ND)

    @cached_property
    def codes(self) -> tuple[float, float]:
        """Of product quantization: seconds to train its books a row, and to encode a row."""
        index: Any = self._empty("ivf-pq")
        books: Any = index.pq
        n = min(BOOKS, books.M)
        few: Any = faiss.ProductQuantizer(n * books.dsub, n, books.nbits)
        few.cp.min_points_per_centroid = 1
        multiply_matrices()
        noise = np.random.default_rng(5).standard_normal((ROWS[1], n * books.dsub), np.float32)  # as residuals are
        train_s = _timed(lambda: few.train(noise)) * books.M / n
        return train_s / len(noise), _best(lambda: books.compute_codes(self._vectors_ND[:2048])) / 2048

    @cached_property
    def append_row_s(self) -> float:
        """To put one vector into its list, once that is known."""
        index = self._lists("ivf-flat", lists_of(ROWS[0]))
        lists = np.random.default_rng(2).integers(0, index.nlist, len(self._vectors_ND)).astype(np.int64)
        adding: Any = index
        swig: Any = faiss
        return _timed(
            lambda: adding.add_core(
                len(lists), swig.swig_ptr(self._vectors_ND), None, swig.swig_ptr(lists), None
            )
        ) / len(lists)  # fmt: skip

    @_once
    def assign_row_s(self, lists: int) -> float:
        """To find the list of one vector among so many by a graph."""
        index = self._graph_of(lists)
        return _best(lambda: index.search(self._vectors_ND[:4096], 1)) / min(4096, len(self._vectors_ND))

    @_once
    def nearest_lists_s(self, lists: int, nprobe: int) -> float:
        """To find the lists that a query looks into by a graph of them."""
        index: Any = self._graph_of(lists)
        params = _swig().SearchParametersHNSW(efSearch=nprobe)
        queries_BD = self._vectors_ND[:QUERIES]
        with _searching():
            return _usual(lambda: [index.search(row[None], nprobe, params=params) for row in queries_BD]) / QUERIES

    @cached_property
    def table_s(self) -> float:
        """To multiply a query with all code books, before codes are looked up."""
        books: Any = self._empty("ivf-pq").pq
        table, pointer = np.empty((books.M, books.ksub), np.float32), _swig().swig_ptr
        with _searching():
            return _usual(lambda: books.compute_inner_prod_table(pointer(self._vectors_ND), pointer(table)))

    def _graph_of(self, lists: int) -> Any:
        index = faiss.IndexHNSWFlat(self._dimension, 32, faiss.METRIC_INNER_PRODUCT)
        index.add(self._vectors_ND[: min(lists, len(self._vectors_ND))])
        return index

    # --- searching -----------------------------------------------------------------------------------------

    @cached_property
    def graph(self) -> Graph:
        """HNSW as it grows from one probe to the other."""
        index = self._empty("hnsw")
        graph: Any = index
        stats: Any = faiss.cvar
        swig: Any = faiss
        index.add(self._vectors_ND[: ROWS[0]])
        link_s = _timed(lambda: index.add(self._vectors_ND[ROWS[0] :])) / (ROWS[1] - ROWS[0])
        visited, seconds = {}, {}
        with _searching():
            for candidates in (PRESETS["hnsw"].params(ROWS[1]).ef_search or 1, HNSW_CONSTRUCTION):
                params = swig.SearchParametersHNSW(efSearch=candidates)

                def search(params: Any = params) -> None:
                    for query_D in self._vectors_ND[:QUERIES]:
                        graph.search(query_D[None], 69, params=params)

                stats.hnsw_stats.reset()
                search()
                visited[candidates] = stats.hnsw_stats.ndis / QUERIES
                seconds[candidates] = _usual(search) / QUERIES
        most = max(visited)
        # While the graph grew it was smaller, and visited less: about as much as it held.
        searched_s = seconds[most] * min(1.0, (ROWS[0] + ROWS[1]) / 2 / visited[most])
        return Graph(seconds[most] / visited[most], visited, max(0.0, link_s * self.threads - searched_s))

    def scan_row_s(self, kind: str, count: int) -> float:
        """To compare a query with one vector of a list of them, as far from the caches as ``count`` vectors are."""
        row_bytes = int(self._empty("flat" if kind.startswith("ivf") else kind).sa_code_size())
        rows = min(count, 65_536 if kind == "ivf-pq" else SCAN_BYTES // row_bytes)
        if not kind.startswith("ivf"):
            return self._scan_row_s(kind, rows)
        return self._lists_row_s(kind, rows, max(1, rows * lists_of(count) // count))

    @_once
    def _scan_row_s(self, kind: str, rows: int) -> float:
        index = self._empty(kind)
        self._add(index, rows)
        with _searching():
            # Memory bounds it: what is measured above the best is others' work.
            return _best(lambda: index.search(self._vectors_ND[:1], 100), times=7) / rows

    @_once
    def _lists_row_s(self, kind: str, rows: int, lists: int) -> float:
        index = self._lists(kind, lists)
        params = _swig().SearchParametersIVF(nprobe=index.nlist)
        if kind == "ivf-pq":
            params.quantizer_params = _swig().SearchParametersHNSW(efSearch=index.nlist)
            _fill(index, rows)
        self._add(index, rows)
        with _searching():
            return _usual(lambda: index.search(self._vectors_ND[:1], 100, params=params)) / rows

    def _add(self, index: Any, rows: int) -> None:
        """Up to so many, as they lie in the service."""
        while index.ntotal < rows:
            index.add(self._vectors_ND[: rows - index.ntotal])
        to_huge_pages(index)

    def answer_s(self, kind: str, count: int) -> float:
        """All of a query but the search itself: the proposals ranked anew, with their rows as cold as they will be."""
        cold_s = self.fetch_s(self._dimension * self._dtype.itemsize, count)
        return self._ranking_s(kind, min(count, ROWS[1])) + (0.0 if kind == "flat" else _width(kind) * cold_s)

    @_once
    def _ranking_s(self, kind: str, rows: int) -> float:
        params = PRESETS[kind].params(rows)
        with tempfile.TemporaryDirectory() as folder, _searching():
            path = Path(folder) / EMBEDDINGS
            self._vectors_ND[:rows].astype(self._dtype).tofile(path)
            flat: Any = faiss.IndexFlatIP(self._dimension) if kind == "flat" else self._empty("sq8")
            flat.add(self._vectors_ND[:rows])
            index = Index(flat, MappedVectors(path, self._dimension, str(self._dtype)))
            segment = Segment(0, index, np.arange(rows), 2.0)
            whole_s = _usual(lambda: ranking.search([segment], self._vectors_ND[:1], [N_DOCS], params))
            search_s = _usual(lambda: index.search(self._vectors_ND[:1], _width(kind), params))
            return max(0.0, whole_s - search_s)

    def fetch_s(self, row_bytes: int, count: int) -> float:
        """What it costs more to fetch a row from ``count`` of them than from a cache."""
        near, far = (self._gathered_s(row_bytes, size) for size in (2**20, min(FETCH_BYTES, count * row_bytes)))
        return max(0.0, far - near)

    @_once
    def _gathered_s(self, row_bytes: int, size: int) -> float:
        rows = np.ones((max(1, size // row_bytes), row_bytes), np.uint8)
        wanted = np.random.default_rng(3).integers(0, len(rows), (64, 256))
        taken = np.empty((256, row_bytes), np.uint8)
        turn = iter(wanted)
        return float(np.median([_timed(lambda: rows.take(next(turn), axis=0, out=taken)) for _ in wanted])) / 256

    def _empty(self, kind: str) -> Any:
        """Trained on little, where it learns anything but lists and books."""
        index = empty_index(PRESETS[kind].factory(self._dimension, ROWS[1]), self._dimension)
        if not kind.startswith("ivf"):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / INDEX
                self._vectors_ND[:1024].tofile(path)
                train(index, VectorsFile(path, self._dimension, "float32"))
        return index

    def _lists(self, kind: str, lists: int) -> Any:
        """Inverted lists around vectors that were not clustered: their number counts, not their places."""
        count = max(39 * lists, (lists // 4) ** 2)  # which gets so many
        index: Any = empty_index(PRESETS[kind].factory(self._dimension, count), self._dimension)
        index.quantizer.add(self._vectors_ND[: index.nlist])
        if kind == "ivf-pq":
            books: Any = index.pq
            centroids = np.random.default_rng(4).standard_normal(books.M * books.ksub * books.dsub, np.float32)
            faiss.copy_array_to_vector(centroids, books.centroids)
        index.is_trained = True
        return index


def _fill(index: Any, rows: int) -> None:
    """Lists of codes that have nothing in common, as those of residuals: looking them up is what takes time."""
    dice, pointer = np.random.default_rng(6), _swig().swig_ptr
    for number, ids in enumerate(np.array_split(np.arange(rows), index.nlist)):
        codes = dice.integers(0, 256, (len(ids), index.code_size), np.uint8)
        index.invlists.add_entries(number, len(ids), pointer(ids), pointer(codes))
    index.ntotal = rows


def _width(kind: str) -> int:
    """Proposals that are ranked anew."""
    over_fetch = PRESETS[kind].params(ROWS[1]).over_fetch or 1
    return max(N_DOCS * over_fetch, N_DOCS + ranking.SPARE_HITS_INEXACT)


def _swig() -> Any:
    return faiss


class _searching:  # noqa: N801  reads as what it does
    """With the threads that a search has."""

    def __enter__(self) -> None:
        self._before = faiss.omp_get_max_threads()
        use_threads(0)

    def __exit__(self, *_: object) -> None:
        faiss.omp_set_num_threads(self._before)


def _timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _best(function: Callable[[], object], times: int = 3) -> float:
    return min(_timed(function) for _ in range(times))


def _usual(function: Callable[[], object], times: int = 7) -> float:
    return float(np.median([_timed(function) for _ in range(times)]))
