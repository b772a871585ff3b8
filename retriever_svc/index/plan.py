"""What each kind of index would need for so many passages: sizes by formula, times from what this machine does.

Costs grow as the algorithms' do, from the figures of :mod:`retriever_svc.index.probe`:

    build       = start + N rows stored + training + N rows added + the index written
    training    = k-means' rounds over the sample, as matrix products; code books by the rows they learn from
    adding      = a code written; or a list found and a vector put into it; or a search with many candidates, and links
    a query     = a scan of all, or of the lists looked into; or the vectors that a graph visits; and the answer
    visited(N)  of a graph is no more than N, and tends to a number that the probe's two sizes tell
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

from retriever_svc.index.building import LARGEST_SAMPLE, LEAST_SAMPLE, SAMPLE_A_CODE, SAMPLE_A_LIST, SAVE_EVERY_S
from retriever_svc.index.kinds import CUDA_SUBQUANTIZERS, HNSW_CONSTRUCTION, PRESETS, lists_of, subquantizers
from retriever_svc.index.probe import ROWS, Probe
from retriever_svc.text_file import offsets_bytes

KMEANS_ROUNDS = 10  # of faiss's inverted lists
MOST_FOR_CODES = 256 * SAMPLE_A_CODE  # vectors that code books are learnt from
PROCESS_BYTES = 110e6  # the service without a collection, what no file backs
IDS_BYTES = 17  # id, its place in the order of ids, and whether it is alive
GRAPH_LINKS = 128
COARSE_LINKS = 32
ON_CUDA = {"flat", "flat-fp16", "sq8", "ivf-flat"}  # and ivf-pq, if its codes are of a length that faiss knows there


@dataclass(frozen=True)
class Need:
    """Of one kind. Bytes; seconds to build (all but embedding the passages); seconds a query."""

    kind: str
    ram: float
    vram: float | None
    cached: float
    disk: float
    build_s: float
    query_s: float
    recall: float


def goes_to_cuda(kind: str, dimension: int) -> bool:
    return kind in ON_CUDA or (kind == "ivf-pq" and subquantizers(dimension) in CUDA_SUBQUANTIZERS)


def index_bytes(kind: str, count: int, dimension: int) -> float:
    """Of the index file, and of memory for it."""
    lists, code = lists_of(count), subquantizers(dimension)
    graph = 4 * (2 * GRAPH_LINKS + 1) + 12  # links of the lowest level and above, offsets, level
    coarse = lists * 4 * dimension
    return {
        "flat": count * 4 * dimension,
        "flat-fp16": count * 2 * dimension,
        "sq8": count * dimension,
        "hnsw": count * (dimension + graph),
        "ivf-flat": count * (4 * dimension + 8) + coarse,
        "ivf-pq": count * (code + 8) + coarse + lists * (4 * 2 * COARSE_LINKS + 16) + 256 * 4 * dimension,
    }[kind]


def visited(seen: float, rows: int, count: int) -> float:
    """Vectors that a search in a graph of ``count`` visits, where it visited ``seen`` in one of ``rows``.

    1 / visited(N) = 1 / N + 1 / most
    """
    share = min(0.999, seen / rows)
    return 1 / (1 / count + (1 / share - 1) / rows)


def needs(
    count: int, dimension: int, *, text_bytes: int = 620, itemsize: int = 2, probe: Probe | None = None
) -> Iterator[Need]:
    """What each preset needs for ``count`` passages of ``text_bytes``, measured as it goes.

    ``itemsize``: bytes of a stored number, 2 for float16. ``probe``: of the same, where it has been measured before.
    """
    probe = probe or Probe(dimension, text_bytes, itemsize)
    raw = count * dimension * itemsize
    texts = count * text_bytes + offsets_bytes(count)
    for kind, preset in PRESETS.items():
        size = index_bytes(kind, count, dimension)
        own = 0 if kind == "flat" else raw
        costs = _Costs(probe, kind, count, dimension)
        yield Need(
            kind,
            ram=size + count * IDS_BYTES + PROCESS_BYTES,
            vram=size if goes_to_cuda(kind, dimension) else None,
            cached=own + texts,
            disk=size + own + texts + count * probe.table_row_bytes,
            build_s=costs.build_s(size),
            query_s=costs.query_s(),
            recall=preset.recall_floor,
        )


class _Costs:
    """Of one kind at one size."""

    def __init__(self, probe: Probe, kind: str, count: int, dimension: int) -> None:
        self._probe, self._kind, self._count, self._dimension = probe, kind, count, dimension
        self._lists = lists_of(count)
        self._sample = min(count, LARGEST_SAMPLE, max(LEAST_SAMPLE, SAMPLE_A_LIST * self._lists))

    def build_s(self, size: float) -> float:
        probe = self._probe
        stored_s = probe.start_s + probe.record_fixed_s + self._count * probe.record_row_s
        adding_s = self._count * self._add_row_s()
        if self._kind in ("ivf-pq", "hnsw") and adding_s > SAVE_EVERY_S:  # saved on the way
            adding_s += size / 2 * probe.write_byte_s * adding_s / max(SAVE_EVERY_S, 20 * size * probe.write_byte_s)
        return stored_s + self._training_s() + adding_s + size * probe.write_byte_s

    def _training_s(self) -> float:
        if not self._kind.startswith("ivf"):
            return 0.0
        lists_s = KMEANS_ROUNDS * self._sample * self._lists * self._probe.compare_s
        learning = min(self._sample, MOST_FOR_CODES) * self._probe.codes[0] if self._kind == "ivf-pq" else 0.0
        return self._sample * self._probe.sample_row_s + lists_s + learning

    def _add_row_s(self) -> float:
        probe, count = self._probe, self._count
        if self._kind == "flat":
            return 0.0
        if self._kind in ("flat-fp16", "sq8"):
            return probe.encode_row_s(self._kind)
        if self._kind == "ivf-flat":
            return self._lists * probe.compare_s + probe.append_row_s
        if self._kind == "ivf-pq":
            few, many = (probe.assign_row_s(lists) for lists in ROWS)
            doublings = math.log2(max(1, self._lists) / ROWS[0])
            found = few + (many - few) / math.log2(ROWS[1] / ROWS[0]) * doublings
            return max(found, few / 4) + probe.codes[1]
        graph = probe.graph
        searched = self._graph_s(HNSW_CONSTRUCTION, count * 2 // 3)  # it grows from nothing: most of it is late
        return (searched + graph.link_s) / probe.threads

    def _graph_s(self, candidates: int, count: int) -> float:
        """Of a search in a graph."""
        graph = self._probe.graph
        seen = visited(graph.visited[candidates], ROWS[1], count)
        return seen * (graph.compare_s + self._probe.fetch_s(self._dimension, count))

    def query_s(self) -> float:
        probe, count, params = self._probe, self._count, PRESETS[self._kind].params(self._count)
        answer_s = probe.answer_s(self._kind, count)
        if self._kind == "hnsw":
            return answer_s + self._graph_s(params.ef_search or 1, count)
        row_s = probe.scan_row_s(self._kind, count)
        if not self._kind.startswith("ivf"):
            return answer_s + count * row_s
        share = min(1.0, (params.nprobe or 1) / self._lists)
        coarse_s = (
            probe.nearest_lists_s(self._lists, params.nprobe or 1) + probe.table_s
            if self._kind == "ivf-pq"
            else self._lists * probe.scan_row_s("flat", self._lists)
        )
        return answer_s + coarse_s + count * share * row_s


def choose(found: list[Need], ram: float, query_s: float) -> Need | None:
    """The kind that misses least of those that fit into memory and answer in time; the quicker one of equals."""
    fitting = [need for need in found if need.ram <= ram and need.query_s <= query_s]
    return max(fitting, key=lambda need: (need.recall, -need.query_s), default=None)


def memory_of_machine() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
