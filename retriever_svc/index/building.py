"""Builds an index file: embeddings come as a stream, memory stays bounded by the index itself.

``flat`` keeps the embeddings in its own file. Every other kind writes them to a file beside it first; then it trains on
a sample of that file and adds it piece by piece.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from retriever_svc.index.kinds import FLAT, HNSW_CONSTRUCTION, Recipe, checked, core_of, empty_index, reason_of, recipe
from retriever_svc.index.vectors import MappedVectors
from shared.errors import InvalidRequest
from shared.retrieval import Float32Array
from shared.schemas import SearchParams

INDEX = "index.faiss"
EMBEDDINGS = "embeddings.bin"

ADD_ROWS = 16_384
SAMPLE_A_LIST = 64  # faiss asks for 39 at least, and uses 256 at most
LEAST_SAMPLE = 256  # codes of 8 bits have so many centroids
LARGEST_SAMPLE = 2**18


class IndexBuilder:
    """Collects the embeddings of one generation in ``folder``, in row order."""

    def __init__(self, folder: Path, dimension: int, dtype: str, kind: str = FLAT, *, keep: bool = False) -> None:
        """``dtype``: float16 or float32, of the embeddings' own file; ``flat`` needs none, unless ``keep`` says so.

        Raises: InvalidRequest: no such kind.
        """
        recipe(kind, dimension, 1)
        self._folder, self._dimension, self._dtype, self._kind = folder, dimension, dtype, kind
        self._flat: Any = faiss.IndexFlatIP(dimension) if kind == FLAT and not keep else None
        self._file = None if self._flat is not None else (folder / EMBEDDINGS).open("wb")

    def add(self, embeddings_BD: npt.NDArray[np.floating]) -> None:
        if self._flat is not None:
            self._flat.add(np.ascontiguousarray(embeddings_BD, dtype=np.float32))
        elif self._file is not None:
            np.ascontiguousarray(embeddings_BD, dtype=self._dtype).tofile(self._file)

    def write(
        self,
        params: SearchParams | None = None,
        progress: Callable[[int, int | None], None] | None = None,
        taken: Path | None = None,
    ) -> Recipe:
        """Write the index file; says what it is and how widely it is to be searched.

        ``taken`` is an index over the same rows, which is copied instead of built.

        Raises: InvalidRequest: it cannot serve, or has other rows.
        """
        if self._file is None:
            faiss.write_index(self._flat, str(self._folder / INDEX))
            return recipe(FLAT, self._dimension, 0, params)
        self._file.close()
        vectors = MappedVectors(self._folder / EMBEDDINGS, self._dimension, self._dtype)
        settled = recipe(self._kind, self._dimension, len(vectors), params)
        if taken is not None:
            return replace(settled, factory=self._take(taken, len(vectors)))
        index = trained(settled.factory, vectors)
        for start in range(0, len(vectors), ADD_ROWS):
            index.add(vectors[slice(start, start + ADD_ROWS)])
            if progress is not None:
                progress(min(len(vectors), start + ADD_ROWS), len(vectors))
        faiss.write_index(index, str(self._folder / INDEX))
        return settled

    def _take(self, path: Path, count: int) -> str:
        shutil.copyfile(path, self._folder / INDEX)
        try:
            index = checked(faiss.read_index(str(self._folder / INDEX), faiss.IO_FLAG_MMAP_IFC), str(path))
        except RuntimeError as error:
            raise InvalidRequest(f"{path} cannot be read by this faiss: {reason_of(error)}", param="index") from None
        if (index.ntotal, index.d) != (count, self._dimension):
            raise InvalidRequest(
                f"{path} holds {index.ntotal} x {index.d}, the source {count} x {self._dimension}", param="index"
            )
        return f"{type(core_of(index)).__name__} as it was"


def trained(factory: str, vectors: MappedVectors) -> Any:
    """An empty index that knows the vectors' distribution."""
    index = empty_index(factory, vectors.dimension)
    _set_construction(index)
    index.train(_sample(vectors, index))
    return index


def _set_construction(index: Any) -> None:
    core = core_of(index)
    if isinstance(core, faiss.IndexHNSW):
        core.hnsw.efConstruction = HNSW_CONSTRUCTION
    if isinstance(core, faiss.IndexIVF):
        core.cp.min_points_per_centroid = 1  # a collection that is small is no mistake
    if isinstance(core, faiss.IndexIVFPQ):
        core.pq.cp.min_points_per_centroid = 1


def _sample(vectors: MappedVectors, index: Any) -> Float32Array:
    """Vectors to train on: spread evenly over all, repeated where there are fewer than centroids."""
    core = core_of(index)
    lists = core.nlist if isinstance(core, faiss.IndexIVF) else 1
    wanted = min(LARGEST_SAMPLE, max(LEAST_SAMPLE, SAMPLE_A_LIST * lists))
    rows = np.unique(np.linspace(0, len(vectors) - 1, min(wanted, len(vectors))).astype(np.int64))
    sample_SD = vectors[rows]
    repeats = -(-max(lists, LEAST_SAMPLE) // len(sample_SD))
    return np.ascontiguousarray(np.tile(sample_SD, (repeats, 1)))
