"""Builds an index file from stored embeddings, in memory that does not grow with them beyond the index itself.

Kinds whose file is a row of codes (flat, flat-fp16, sq8) are written piece by piece and never held. The others are
trained on a sample, grow in memory, and are saved on the way, so that a build goes on after a kill.
"""

import shutil
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from retriever_svc.checkpoint import GENERATION, Progress, Work
from retriever_svc.generation import describe_files
from retriever_svc.index.cagra import CAGRA, build_cagra
from retriever_svc.index.kinds import HNSW_CONSTRUCTION, Recipe, checked, core_of, empty_index, reason_of
from retriever_svc.index.vectors import VectorSource
from shared.errors import InvalidRequest
from shared.retrieval import Float32Array

INDEX = "index.faiss"
EMBEDDINGS = "embeddings.bin"
INDEXING, TRAINING = "indexing", "training"

ADD_ROWS = 16_384
SAMPLE_A_LIST = 64  # faiss asks for 39 at least, and uses 256 at most
SAMPLE_A_CODE = 64  # of a code book: its 256 are learnt four times as fast as from faiss's own 256
LEAST_SAMPLE = 256  # codes of 8 bits have so many centroids
LARGEST_SAMPLE = 2**18

SAVE_EVERY_S = 30.0
SAVING_SHARE = 0.05  # of the time, at most
SAVED_BYTES_PER_S = 200e6  # until it was measured

TRAINED = "trained.faiss"
FINISHED = f"{GENERATION}/{INDEX}"

_FAISS: Any = faiss  # its type stubs lack this


def build_index(work: Work, vectors: VectorSource, settled: Recipe, progress: Progress | None = None) -> None:
    """Bring the index of ``work`` to its end, from where an earlier run left it."""
    if work.state.added == len(vectors):
        return
    _Building(work, vectors, progress or (lambda *_: None)).run(settled)


def empty_index_of(work: Work, dimension: int) -> str:
    """Write the index of no vectors; says what it is."""
    faiss.write_index(faiss.IndexFlatIP(dimension), str(work.path / FINISHED))
    work.save(describe_files(work.path, [FINISHED]))
    return "Flat"


def take_index(work: Work, path: Path, count: int, dimension: int) -> str:
    """Serve an index of others over the same rows; says what it is.

    Raises: InvalidRequest: it cannot serve, or has other rows.
    """
    target = work.path / FINISHED
    if not work.state.added:
        shutil.copyfile(path, target)
    try:
        index = checked(faiss.read_index(str(target), faiss.IO_FLAG_MMAP_IFC), str(path))
    except RuntimeError as error:
        raise InvalidRequest(f"{path} cannot be read by this faiss: {reason_of(error)}", param="index") from None
    if (index.ntotal, index.d) != (count, dimension):
        raise InvalidRequest(
            f"{path} holds {index.ntotal} x {index.d}, the source {count} x {dimension}", param="index"
        )
    work.save(describe_files(work.path, [FINISHED]), added=count)
    return f"{type(core_of(index)).__name__} as it was"


@dataclass
class Pace:
    """When to save: now and then, and so seldom that it takes a small share of the time."""

    last: float
    cost_s: float | None = None

    def due(self, expected_bytes: float) -> bool:
        """``expected_bytes``: what a save writes, for the first one's sake."""
        cost_s = expected_bytes / SAVED_BYTES_PER_S if self.cost_s is None else self.cost_s
        return time.monotonic() - self.last >= max(SAVE_EVERY_S, cost_s / SAVING_SHARE)

    def saved(self, began: float) -> None:
        self.last = time.monotonic()
        self.cost_s = self.last - began


class _Building:
    def __init__(self, work: Work, vectors: VectorSource, progress: Progress) -> None:
        self._work, self._vectors, self._progress = work, vectors, progress
        self._count = len(vectors)
        self._pace = Pace(time.monotonic())

    def run(self, settled: Recipe) -> None:
        saved = _saved_name(self._work.state.added) if self._work.state.added else None
        if settled.kind == CAGRA:  # whole or not at all: the graph is built in one step on the GPU
            self._progress(INDEXING, 0, self._count)
            self._save(build_cagra(self._vectors, ADD_ROWS), self._count)
            self._progress(INDEXING, self._count, self._count)
            return
        if saved is not None and saved in self._work.state.files:
            index = faiss.read_index(str(self._work.path / saved))
        else:
            index = self._trained(settled)
        if isinstance(index, faiss.IndexFlat | faiss.IndexScalarQuantizer):
            self._write_codes(index)
        else:
            self._grow(index)

    def _trained(self, settled: Recipe) -> Any:
        if self._work.state.trained:
            return faiss.read_index(str(self._work.path / TRAINED))
        index = empty_index(settled.factory, self._vectors.dimension)
        rows = sample_size(index, self._count)
        if rows:
            self._progress(TRAINING, 0, rows)
        train(index, self._vectors)
        faiss.write_index(index, str(self._work.path / TRAINED))
        self._work.save(describe_files(self._work.path, [TRAINED]), trained=True)
        if rows:
            self._progress(TRAINING, rows, rows)
        return index

    def _write_codes(self, index: Any) -> None:
        """The file that faiss writes of such an index: what it knows, the number of codes, and the codes."""
        added = self._work.state.added
        file = self._work.grow(self._work.path / FINISHED)
        try:
            if not added:
                file.append(_header(index, self._count))
            self._progress(INDEXING, added, self._count)
            for piece_BD in self._vectors.pieces(added, ADD_ROWS):
                file.append(index.sa_encode(np.ascontiguousarray(piece_BD)))
                added += len(piece_BD)
                if added == self._count or self._pace.due(ADD_ROWS * index.code_size):
                    began = time.monotonic()
                    dropped = [TRAINED] if added == self._count else []
                    self._work.save({FINISHED: file.record()}, dropped, added=added)
                    self._pace.saved(began)
                self._progress(INDEXING, added, self._count)
        finally:
            file.close()

    def _grow(self, index: Any) -> None:
        core: Any = core_of(index)
        hnsw: Any = core.hnsw if isinstance(core, faiss.IndexHNSW) else None
        _reserve(core, self._count)
        added = int(index.ntotal)
        self._progress(INDEXING, added, self._count)
        for piece_BD in self._vectors.pieces(added, ADD_ROWS):
            if hnsw is not None:
                # Of its own for each piece: the state is not saved, and a build that goes on must draw the same levels.
                hnsw.rng = _FAISS.RandomGenerator(added)
            index.add(np.ascontiguousarray(piece_BD))
            added += len(piece_BD)
            if added == self._count or self._pace.due(added * _row_bytes(core)):
                self._save(index, added)
            self._progress(INDEXING, added, self._count)

    def _save(self, index: Any, added: int) -> None:
        began = time.monotonic()
        before = _saved_name(self._work.state.added)
        name = FINISHED if added == self._count else _saved_name(added)
        faiss.write_index(index, str(self._work.path / name))
        self._work.save(describe_files(self._work.path, [name]), [before, TRAINED], added=added)
        self._pace.saved(began)


def _saved_name(added: int) -> str:
    return f"{INDEX}.{added}"


def _row_bytes(core: Any) -> float:
    """Of a vector in a file of an index that grows."""
    if isinstance(core, faiss.IndexIVF):
        return float(core.code_size + 8)
    if isinstance(core, faiss.IndexHNSW):
        hnsw: Any = core.hnsw
        return float(_row_bytes(faiss.downcast_index(core.storage)) + 4 * hnsw.nb_neighbors(0))
    return float(core.sa_code_size())


def _header(index: Any, count: int) -> bytes:
    """What precedes the codes in a file of an index that holds nothing else.

    Source: faiss/impl/index_write.cpp: four letters, d as int32, ntotal as int64, …, the codes as a vector.
    """
    empty: bytes = faiss.serialize_index(index).tobytes()
    numbers = count * (index.d if isinstance(index, faiss.IndexFlat) else index.code_size)
    return empty[:8] + struct.pack("<q", count) + empty[16:-8] + struct.pack("<Q", numbers)


def _reserve(core: Any, count: int) -> None:
    """Memory for so many vectors at once: what doubles as it grows takes up to three times as much on the way."""
    if not isinstance(core, faiss.IndexHNSW):
        return
    storage: Any = faiss.downcast_index(core.storage)
    hnsw: Any = core.hnsw
    links, level_0 = hnsw.neighbors, hnsw.nb_neighbors(0)
    for vector, wanted in ((storage.codes, count * storage.code_size), (links, int(count * level_0 * 1.02))):
        size = vector.size()
        if wanted > size:
            vector.resize(wanted)
            vector.resize(size)  # which keeps the memory


def train(index: Any, vectors: VectorSource) -> None:
    """Let an empty index know how the vectors are distributed."""
    if isinstance(core := core_of(index), faiss.IndexHNSW):
        core.hnsw.efConstruction = HNSW_CONSTRUCTION
    if isinstance(core, faiss.IndexIVF):
        core.cp.min_points_per_centroid = 1  # a collection that is small is no mistake
    if isinstance(core, faiss.IndexIVFPQ):
        coded: Any = core
        coded.do_polysemous_training = False  # minutes, for a search by Hamming distance that nobody asks for
        coded.pq.cp.min_points_per_centroid = 1
        coded.pq.cp.max_points_per_centroid = SAMPLE_A_CODE
    if not index.is_trained:
        multiply_matrices()
        index.train(_sample(vectors, index))


def multiply_matrices() -> None:
    """Let faiss compare vectors of few numbers as matrices, too: it learns code books in a fifth of the time.

    A global of faiss, vectors times dimension from which it does so; a search sets it anew.
    """
    faiss.cvar.distance_compute_blas_threshold = 1


def sample_size(index: Any, count: int) -> int:
    """Rows that the index is trained on; 0 where it learns nothing."""
    if index.is_trained:
        return 0
    return min(count, LARGEST_SAMPLE, max(LEAST_SAMPLE, SAMPLE_A_LIST * _lists(index)))


def _sample(vectors: VectorSource, index: Any) -> Float32Array:
    """Vectors to train on: spread evenly over all, repeated where there are fewer than centroids."""
    rows = np.unique(np.linspace(0, len(vectors) - 1, sample_size(index, len(vectors))).astype(np.int64))
    sample_SD = vectors.take(rows)
    repeats = -(-max(_lists(index), LEAST_SAMPLE) // len(sample_SD))
    return sample_SD if repeats == 1 else np.tile(sample_SD, (repeats, 1))


def _lists(index: Any) -> int:
    core = core_of(index)
    return core.nlist if isinstance(core, faiss.IndexIVF) else 1
