"""Builds an index file: embeddings come as a stream, memory stays bounded by the index itself.

``flat`` keeps the embeddings in its own file. Every other kind writes them to a file beside it first; then it trains on
a sample of that file and adds it piece by piece.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from retriever_svc.index.kinds import FLAT, HNSW_CONSTRUCTION, Recipe, core_of, empty_index, recipe
from retriever_svc.index.vectors import MappedVectors
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

    def __init__(self, folder: Path, dimension: int, dtype: str, kind: str = FLAT) -> None:
        """``dtype``: float16 or float32, in which embeddings are kept where the kind keeps them apart.

        Raises: InvalidRequest: no such kind.
        """
        recipe(kind, dimension, 1)
        self._folder, self._dimension, self._dtype, self._kind = folder, dimension, dtype, kind
        self._flat: Any = faiss.IndexFlatIP(dimension) if kind == FLAT else None
        self._file = None if kind == FLAT else (folder / EMBEDDINGS).open("wb")

    def add(self, embeddings_BD: npt.NDArray[np.floating]) -> None:
        if self._flat is not None:
            self._flat.add(np.ascontiguousarray(embeddings_BD, dtype=np.float32))
        elif self._file is not None:
            np.ascontiguousarray(embeddings_BD, dtype=self._dtype).tofile(self._file)

    def write(
        self, params: SearchParams | None = None, progress: Callable[[int, int | None], None] | None = None
    ) -> Recipe:
        """Write the index file; says what it is and how widely it is to be searched."""
        if self._file is None:
            faiss.write_index(self._flat, str(self._folder / INDEX))
            return recipe(FLAT, self._dimension, 0, params)
        self._file.close()
        vectors = MappedVectors(self._folder / EMBEDDINGS, self._dimension, self._dtype)
        settled = recipe(self._kind, self._dimension, len(vectors), params)
        index = empty_index(settled.factory, self._dimension)
        _set_construction(index)
        index.train(_sample(vectors, index))
        for start in range(0, len(vectors), ADD_ROWS):
            index.add(vectors[slice(start, start + ADD_ROWS)])
            if progress is not None:
                progress(min(len(vectors), start + ADD_ROWS), len(vectors))
        faiss.write_index(index, str(self._folder / INDEX))
        return settled


def _set_construction(index: Any) -> None:
    core = core_of(index)
    if isinstance(core, faiss.IndexHNSW):
        core.hnsw.efConstruction = HNSW_CONSTRUCTION
    if isinstance(core, faiss.IndexIVF):
        core.cp.min_points_per_centroid = 1  # a collection that is small is no mistake


def _sample(vectors: MappedVectors, index: Any) -> Float32Array:
    """Vectors to train on: spread evenly over all, repeated where there are fewer than centroids."""
    core = core_of(index)
    lists = core.nlist if isinstance(core, faiss.IndexIVF) else 1
    wanted = min(LARGEST_SAMPLE, max(LEAST_SAMPLE, SAMPLE_A_LIST * lists))
    rows = np.unique(np.linspace(0, len(vectors) - 1, min(wanted, len(vectors))).astype(np.int64))
    sample_SD = vectors[rows]
    repeats = -(-max(lists, LEAST_SAMPLE) // len(sample_SD))
    return np.ascontiguousarray(np.tile(sample_SD, (repeats, 1)))
