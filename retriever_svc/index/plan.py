"""What each kind of index would need for so many passages: sizes by formula, times by a probe on this machine.

A probe builds each kind over a few thousand vectors and searches it, a few seconds for all. From there on costs grow as
the algorithm's: a scan with the vectors, inverted lists with those they look through, a graph with the logarithm.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from retriever_svc.index.building import EMBEDDINGS, LARGEST_SAMPLE, LEAST_SAMPLE, SAMPLE_A_LIST, train
from retriever_svc.index.faiss_index import Index
from retriever_svc.index.kinds import PRESETS, empty_index, lists_of, recipe, subquantizers
from retriever_svc.index.vectors import MappedVectors, VectorsFile
from retriever_svc.text_file import offsets_bytes
from shared.retrieval import Float32Array

PROBE = 4096
CENTRE_OF = 40  # probe vectors a cluster
QUERIES = 64
KMEANS_ROUNDS = 25  # what faiss's clustering does
MOST_FOR_CODES = 65_536  # vectors that faiss trains codes of 8 bits on
PROCESS_BYTES = 300e6  # the service without a collection
IDS_BYTES = 17  # id, its place in the order of ids, and whether it is alive
GRAPH_LINKS = 128
COARSE_LINKS = 32
ON_CUDA = {"flat", "flat-fp16", "sq8", "ivf-flat", "ivf-pq"}


@dataclass(frozen=True)
class Need:
    """Of one kind. Bytes; seconds to build the index (embedding and storing passages come before); seconds a query."""

    kind: str
    ram: float
    vram: float | None
    cached: float
    disk: float
    build_s: float
    query_s: float
    recall: float


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


def looked_through(kind: str, count: int) -> float:
    """Vectors that a query is compared with, centroids included."""
    lists = lists_of(count)
    if kind.startswith("ivf"):
        probes = PRESETS[kind].params(count).nprobe or 1
        return lists + count * min(1.0, probes / lists)
    if kind == "hnsw":
        return 128 * math.log2(max(2, count))
    return count


def _sample_of(count: int) -> int:
    return min(count, LARGEST_SAMPLE, max(LEAST_SAMPLE, SAMPLE_A_LIST * lists_of(count)))


def _build_s(kind: str, count: int, probed: "Probed", compare_s: float) -> float:
    """Training and adding, each part as it grows."""
    growth = count / PROBE
    if not kind.startswith("ivf"):
        levels = math.log2(max(2, count)) / math.log2(PROBE) if kind == "hnsw" else 1.0
        return probed.train_s + probed.add_s * growth * levels
    coarse = [KMEANS_ROUNDS * _sample_of(n) * lists_of(n) * compare_s for n in (PROBE, count)]
    codes_s = max(0.0, probed.train_s - coarse[0]) * min(count, MOST_FOR_CODES) / PROBE if kind == "ivf-pq" else 0.0
    if kind == "ivf-pq":  # a graph finds the list
        return coarse[1] + codes_s + probed.add_s * growth * math.log2(lists_of(count)) / math.log2(lists_of(PROBE))
    assigning = [n * lists_of(n) * compare_s for n in (PROBE, count)]
    return coarse[1] + max(0.0, probed.add_s - assigning[0]) * growth + assigning[1]


def needs(count: int, dimension: int, *, text_bytes: int = 620, itemsize: int = 2) -> Iterator[Need]:
    """What each preset needs for ``count`` passages of ``text_bytes``, measured as it goes.

    ``itemsize``: bytes of a stored number, 2 for float16.
    """
    dice = np.random.default_rng(0)
    centres = dice.standard_normal((PROBE // CENTRE_OF, dimension), np.float32)
    noise = dice.standard_normal((PROBE, dimension), np.float32)
    vectors: Float32Array = (centres[dice.integers(0, len(centres), PROBE)] + noise / 2).astype(np.float32)
    compare_s = _comparison(vectors)
    for kind, preset in PRESETS.items():
        probed = _probe(kind, vectors)
        size = index_bytes(kind, count, dimension)
        raw = count * dimension * itemsize
        yield Need(
            kind,
            ram=size + count * IDS_BYTES + PROCESS_BYTES,
            vram=size if kind in ON_CUDA else None,
            cached=(0 if kind == "flat" else raw) + count * text_bytes + offsets_bytes(count),
            disk=size + (0 if kind == "flat" else raw) + raw + count * (2 * text_bytes + 20) + offsets_bytes(count),
            build_s=_build_s(kind, count, probed, compare_s),
            query_s=probed.query_s * looked_through(kind, count) / looked_through(kind, PROBE),
            recall=preset.recall_floor,
        )


def choose(found: list[Need], ram: float, query_s: float) -> Need | None:
    """The kind that misses least of those that fit into memory and answer in time; the quicker one of equals."""
    fitting = [need for need in found if need.ram <= ram and need.query_s <= query_s]
    return max(fitting, key=lambda need: (need.recall, -need.query_s), default=None)


def memory_of_machine() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@dataclass(frozen=True)
class Probed:
    """Seconds to train and to add the probe, and of one query."""

    train_s: float
    add_s: float
    query_s: float


def _probe(kind: str, vectors_ND: Float32Array) -> Probed:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / EMBEDDINGS
        vectors_ND.tofile(path)
        vectors = MappedVectors(path, vectors_ND.shape[1], "float32")
        settled = recipe(kind, vectors.dimension, len(vectors))
        began = time.perf_counter()
        host = empty_index(settled.factory, vectors.dimension)
        train(host, VectorsFile(path, vectors.dimension, "float32"))
        train_s = time.perf_counter() - began
        add_s = _timed(lambda: host.add(vectors_ND))
        index = Index(host, vectors)

        def search() -> None:
            for query_D in vectors_ND[:QUERIES]:
                index.search(query_D[None], 20, settled.params)

        search()
        return Probed(train_s, add_s, min(_timed(search) for _ in range(3)) / QUERIES)


def _comparison(vectors_ND: Float32Array) -> float:
    """Seconds to compare one vector with one centroid, as clustering does it."""
    centroids = np.ascontiguousarray(vectors_ND[: PROBE // 4])
    coarse = faiss.IndexFlatL2(vectors_ND.shape[1])
    coarse.add(centroids)
    return min(_timed(lambda: coarse.search(vectors_ND, 1)) for _ in range(3)) / (len(vectors_ND) * len(centroids))


def _timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
