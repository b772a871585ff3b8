"""Turns faiss's hits into the exact answer: scores that equal the embeddings returned beside them, in their order.

faiss sums in float32, in an order that depends on the batch's size and the device, so its scores differ in the last
places and its order with them. Here the score of a document is defined once:

    score(q, d) = float32( sum_i float64(q_i) * float64(d_i) )

The products are exact in float64 and the sum is numpy's pairwise one, so a score is the true inner product rounded
once, whatever the batch and the device. Documents come in descending score; equal scores in ascending passage id.

That order must also hold at the cut: a document that faiss put just outside its best k could belong inside. faiss's
error is bounded (Higham, *Accuracy and Stability of Numerical Algorithms*, §3.1: whatever the order of summation,
|fl(q·d) - q·d| <= gamma_D * sum|q_i d_i| <= gamma_D * |q| |d|), so a few more hits than asked are fetched, and where
the last of them is still within that bound of the last document returned, more are.

Shapes: B queries, K hits, N documents, D dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retriever_svc.index import FlatIndex
from shared.retrieval import Float32Array, Int64Array

SPARE_HITS = 8
# Where even so many hits stay within the bound of the cut (thousands of equal embeddings, a query of zeros), which
# of the equals come is faiss's choice: a search for all of a large index would stop the service.
MAX_CANDIDATES = 2048
# faiss with float16 on a GPU rounds the embeddings and the query: the bound would be hundreds of times wider, so
# hits are re-ranked exactly but a document near the cut may be missed.
SPARE_HITS_INEXACT = 64

FLOAT32 = np.finfo(np.float32)


@dataclass(frozen=True)
class Ranked:
    """The documents of one query, best first: ``rows`` (N,), ``scores`` (N,), ``embeddings`` (N, D)."""

    rows: Int64Array
    scores: Float32Array
    embeddings: Float32Array


def inner_products(query_D: Float32Array, embeddings_KD: Float32Array) -> Float32Array:
    """Scores (K,) as defined above."""
    products_KD: npt.NDArray[np.float64] = np.multiply(embeddings_KD, query_D, dtype=np.float64)
    scores_K: Float32Array = products_KD.sum(axis=1).astype(np.float32)
    return scores_K


def search_error(query_D: Float32Array, max_norm: float) -> float:
    """Bound of the difference between faiss's float32 score and the true inner product, for any embedding."""
    dimension = len(query_D)
    unit_roundoff = float(FLOAT32.eps) / 2
    gamma = dimension * unit_roundoff / (1 - dimension * unit_roundoff)
    underflow = dimension * float(FLOAT32.tiny)
    return gamma * norm(query_D) * max_norm + underflow


def norm(vector_D: Float32Array) -> float:
    return float(np.linalg.norm(vector_D.astype(np.float64)))


def search(
    index: FlatIndex, ids: Int64Array, max_norm: float, queries_BD: Float32Array, n_docs: Sequence[int]
) -> list[Ranked]:
    """The ``n_docs[b]`` best documents of each query, or all where there are fewer.

    ``ids``: (count,) passage id of each row, for the order of equal scores. ``max_norm``: largest norm of an
    embedding. All queries go through faiss together; only those that are not settled go again.
    """
    ranked: dict[int, Ranked] = {}
    pending = list(range(len(queries_BD)))
    spare = SPARE_HITS if index.exact else SPARE_HITS_INEXACT
    widths = {b: min(index.max_hits, n_docs[b] + spare) for b in pending}
    while pending:
        scores_BK, rows_BK = index.search(queries_BD[pending], max(widths[b] for b in pending))
        unsettled = []
        for b, approximate_K, rows_K in zip(pending, scores_BK, rows_BK, strict=True):
            width = widths[b]
            ranked[b] = rerank(index, ids, queries_BD[b], rows_K[:width], n_docs[b])
            limit = min(index.max_hits, max(MAX_CANDIDATES, n_docs[b] + spare))
            if width < limit and index.exact:
                best_unseen = np.float32(float(approximate_K[width - 1]) + search_error(queries_BD[b], max_norm))
                if best_unseen >= ranked[b].scores[-1]:
                    widths[b] = min(limit, 4 * width)
                    unsettled.append(b)
        pending = unsettled
    return [ranked[b] for b in range(len(queries_BD))]


def rerank(index: FlatIndex, ids: Int64Array, query_D: Float32Array, rows_K: Int64Array, n_docs: int) -> Ranked:
    """The best ``n_docs`` of the hits ``rows_K``, by exact score."""
    embeddings_KD = index.embeddings(rows_K)
    scores_K = inner_products(query_D, embeddings_KD)
    order = np.lexsort((ids[rows_K], -scores_K))[:n_docs]
    return Ranked(rows_K[order], scores_K[order], embeddings_KD[order])
