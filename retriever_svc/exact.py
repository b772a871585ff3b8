"""The true best documents of a query, by comparing every vector: what an approximate search is measured against.

Vectors are looked at slice by slice, so that whoever does it can pause between two. Shapes: Q queries, K rows,
D dimension.
"""

from collections.abc import Iterator

import numpy as np

from retriever_svc.ranking import SPARE_HITS, inner_products
from shared.retrieval import Float32Array

SLICE_NUMBERS = 2**20  # of a slice: about a millisecond's work


def slices(count: int, dimension: int) -> Iterator[slice]:
    """Rows 0 to ``count``, some at a time."""
    rows = max(1, SLICE_NUMBERS // dimension)
    for start in range(0, count, rows):
        yield slice(start, min(count, start + rows))


class Best:
    """The ``k`` highest scores of the embeddings seen so far."""

    def __init__(self, query_D: Float32Array, k: int) -> None:
        self._query_D, self._k = query_D, k
        self._most = k + SPARE_HITS  # sums in float32 may put a few in the wrong order
        self._rough = np.empty(0, np.float32)
        self._embeddings = np.empty((0, len(query_D)), np.float32)

    def see(self, embeddings_KD: Float32Array) -> None:
        rough_K = np.einsum("kd,d->k", embeddings_KD, self._query_D)
        if len(self._rough) == self._most:
            kept = rough_K > self._rough.min()
            rough_K, embeddings_KD = rough_K[kept], embeddings_KD[kept]
        if len(rough_K) > self._most:
            best = np.argpartition(-rough_K, self._most)[: self._most]
            rough_K, embeddings_KD = rough_K[best], embeddings_KD[best]
        rough = np.concatenate([self._rough, rough_K])
        best = np.argsort(-rough)[: self._most]
        self._rough = rough[best]
        self._embeddings = np.concatenate([self._embeddings, embeddings_KD])[best]

    def recall(self, found: Float32Array) -> float | None:
        """The share of the best ``k`` that a list with the scores ``found``, descending, has at its head.

        By score, so that of documents that score the same any may stand there. None where nothing can be found.
        """
        scores = np.sort(inner_products(self._query_D, self._embeddings))[::-1][: self._k]
        if not len(scores):
            return None
        return int(np.count_nonzero(found[: self._k] >= scores[-1])) / len(scores)
