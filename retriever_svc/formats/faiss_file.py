"""faiss index files of others: what they say of themselves, and the vectors of those that keep them whole.

A file begins with four letters for its kind, and then d, ntotal, whether it is trained, and the metric (faiss,
``index_write.cpp``): enough to check an index of 30 GB in no time, and without having it in memory.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss

from retriever_svc.formats.passages import refusal
from shared.retrieval import Float32Array

HEADER = struct.Struct("<4siqqq?i")  # kind, d, ntotal, two numbers without meaning, is_trained, metric
INNER_PRODUCT, L2 = faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2
L2_REFUSED = (
    "compares by L2 distance (what `datasets`' add_faiss_index does unless told otherwise), but RAG scores passages by "
    "inner product, which ranks them differently: build it again with metric_type=faiss.METRIC_INNER_PRODUCT, or leave "
    "the index file out, and one is built from the embeddings"
)


@dataclass(frozen=True)
class FaissHeader:
    """``kind`` is faiss's four letters: ``IHNs`` is HNSW over 8-bit codes, ``IwPQ`` IVF with PQ, ``IxFI`` flat."""

    path: Path
    kind: str
    dimension: int
    count: int
    metric: int


def read_header(path: Path) -> FaissHeader:
    """What an index file says of itself.

    Raises: InvalidRequest: it cannot be read, is no faiss file, or holds an index that is not trained.
    """
    try:
        with path.open("rb") as file:
            start = file.read(HEADER.size)
    except OSError as error:
        raise refusal(path, f"cannot be read: {error}", "index") from error
    if len(start) < HEADER.size or start[:1] != b"I" or start[:2] == b"IB":  # IB…: binary vectors
        raise refusal(path, "is no index file of faiss over float vectors", "index")
    kind, dimension, count, _, _, trained, metric = HEADER.unpack(start)
    if dimension < 1 or count < 0 or metric < 0:
        raise refusal(path, f"is no index file of faiss: dimension {dimension}, {count} vectors", "index")
    if not trained:
        raise refusal(path, "holds an index that is not trained", "index")
    return FaissHeader(path, kind.decode("latin-1"), dimension, count, metric)


def check_index(path: Path, *, count: int | None, dimension: int | None) -> FaissHeader:
    """The header of an index that is to serve ``count`` passages of this dimension; None is not compared.

    Raises: InvalidRequest: the metric is not inner product, or count or dimension is another; as :func:`read_header`.
    """
    header = read_header(path)
    if header.metric == L2:
        raise refusal(path, L2_REFUSED, "index")
    if header.metric != INNER_PRODUCT:
        raise refusal(path, f"compares by faiss's metric {header.metric}, RAG scores by inner product", "index")
    if count is not None and header.count != count:
        raise refusal(path, f"has {header.count} vectors, there are {count} passages", "index")
    if dimension is not None and header.dimension != dimension:
        raise refusal(path, f"has vectors of dimension {header.dimension}, the embeddings have {dimension}", "index")
    return header


class StoredVectors:
    """The vectors of an index file that keeps them whole: flat, or HNSW over flat. Mapped, not read into memory."""

    def __init__(self, path: Path, *, quantized: bool = False) -> None:
        """``quantized`` takes HNSW over 8-bit codes too: vectors as faiss decodes them, not as they were.

        Raises: InvalidRequest: faiss cannot read the file, or the index does not keep its vectors whole.
        """
        try:
            self._index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise refusal(path, f"cannot be read by this faiss: {str(error)[:300]}", "index") from error
        storage = self._index
        if isinstance(storage, faiss.IndexHNSW):
            storage = faiss.downcast_index(storage.storage)
        whole = isinstance(storage, faiss.IndexFlat)
        if not whole and not (quantized and isinstance(storage, faiss.IndexScalarQuantizer)):
            says = (
                f"holds a {type(self._index).__name__} over {type(storage).__name__}, which does not keep the vectors "
                "whole; they can be taken from IndexFlat and IndexHNSWFlat only: give the embeddings in a file"
            )
            raise refusal(path, says, "index")
        self._storage = storage
        self.count, self.dimension = int(storage.ntotal), int(storage.d)

    def take(self, start: int, rows: int) -> Float32Array:
        """(rows, D), in the order of the index."""
        vectors_BD: Float32Array = self._storage.reconstruct_n(start, rows)
        return vectors_BD
