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

An index that is not exact errs by what it stores and by where it looks: of its hits, ``over_fetch`` times as many as
asked for are ranked anew, and where it finds fewer than there are, it looks wider.

A collection is searched in segments: the generation's index, and what was written since. Shapes: B queries, K hits,
N documents, D dimension. Rows count through all segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from retriever_svc.index import Index
from shared.retrieval import Float32Array, Int64Array
from shared.schemas import SearchParams

BoolArray = npt.NDArray[np.bool_]

SPARE_HITS = 8
# Where even so many hits stay within the bound of the cut (thousands of equal embeddings, a query of zeros), which
# of the equals come is faiss's choice: a search for all of a large index would stop the service.
MAX_CANDIDATES = 2048
# An index that is not exact is far beyond the bound: hits are re-ranked exactly, but a document near the cut may be
# missed. So many more are taken at least.
SPARE_HITS_INEXACT = 64
# So few rows are all compared, whatever the index.
FEW_ROWS = 512
# So many rows that may not be returned are fetched over; above, the index is told which rows it may look at.
FEW_BARRED = 64
# Where an index does not find as many as there are (a graph may not reach every vector), so many rows are compared.
COMPARABLE_ROWS = 200_000
COMPARED_AT_ONCE = 4096

FLOAT32 = np.finfo(np.float32)


@dataclass(frozen=True)
class Segment:
    """Rows ``first_row`` to ``first_row + index.count`` of a collection.

    ``ids`` (count,): passage id of each row, for the order of equal scores. ``max_norm``: largest norm of an embedding.
    ``dead`` (count,): rows that were deleted or replaced.
    """

    first_row: int
    index: Index
    ids: Int64Array
    max_norm: float
    dead: BoolArray | None = None


@dataclass(frozen=True)
class Ranked:
    """The documents of one query, best first: ``rows`` (N,), ``scores`` (N,), ``embeddings`` (N, D), ``ids`` (N,)."""

    rows: Int64Array
    scores: Float32Array
    embeddings: Float32Array
    ids: Int64Array


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


@dataclass(frozen=True)
class _Hits:
    """Candidates of one query in one segment, ``rows`` of it.

    ``unseen``: no other row scores above it; None where that is not known, or there is no other. ``more``: whether a
    wider search of the same kind may find more.
    """

    rows: Int64Array
    unseen: float | None = None
    more: bool = False


class _Scope:
    """A segment and which of its rows may be returned."""

    def __init__(self, segment: Segment, chosen: BoolArray | None) -> None:
        self.segment = segment
        self.index = segment.index
        dead = segment.dead
        self.allowed = chosen if dead is None else ~dead if chosen is None else chosen & ~dead
        self.count = self.index.count if self.allowed is None else int(np.count_nonzero(self.allowed))
        self._barred = self.index.count - self.count

    @cached_property
    def rows(self) -> Int64Array:
        return np.arange(self.index.count) if self.allowed is None else np.flatnonzero(self.allowed)

    def hits(self, queries_BD: Float32Array, widths: Sequence[int], params: SearchParams) -> list[_Hits]:
        """``widths[b]`` or more candidates of each query, as far as the index finds them."""
        if self.count <= FEW_ROWS and not (self.index.exact and self.index.selects):
            return [_Hits(self.rows)] * len(queries_BD)
        told = self.index.selects and self._barred > FEW_BARRED
        over = 0 if told else self._barred
        k = min(max(widths) + over, self.count if told else self.index.max_hits)
        scores_BK, rows_BK = self.index.search(queries_BD, k, params, self.allowed if told else None)
        return [
            self._hits(scores_K[: width + over], rows_K[: width + over], query_D)
            for scores_K, rows_K, query_D, width in zip(scores_BK, rows_BK, queries_BD, widths, strict=True)
        ]

    def _hits(self, scores_K: Float32Array, rows_K: Int64Array, query_D: Float32Array) -> _Hits:
        complete = bool(rows_K[-1] >= 0)  # else faiss filled up with -1: it has no more to give
        unseen = None
        if self.index.exact and complete and len(rows_K) < self.index.count:
            unseen = float(np.float32(float(scores_K[-1]) + search_error(query_D, self.segment.max_norm)))
        more = complete and len(rows_K) < self.index.max_hits
        rows_K = rows_K[rows_K >= 0]
        return _Hits(rows_K if self.allowed is None else rows_K[self.allowed[rows_K]], unseen, more)

    def selected(self, query_D: Float32Array, width: int, params: SearchParams) -> _Hits:
        """Candidates among the rows that may be returned, of an index that is told which; a GPU's, on the host."""
        k = min(max(width, width * (params.over_fetch or 1)), self.count)
        _, rows_BK = self.index.search(query_D[np.newaxis], k, params, self.allowed)
        return _Hits(rows_BK[0][rows_BK[0] >= 0])

    def compared(self, query_D: Float32Array, width: int) -> _Hits:
        """The best rows by comparing all of them."""
        best_rows, best_scores = np.empty(0, np.int64), np.empty(0, np.float32)
        for start in range(0, self.count, COMPARED_AT_ONCE):
            rows = self.rows[start : start + COMPARED_AT_ONCE]
            best_rows = np.concatenate([best_rows, rows])
            best_scores = np.concatenate([best_scores, self.index.embeddings(rows) @ query_D])
            if len(best_rows) > width:
                kept = np.argpartition(-best_scores, width)[:width]
                best_rows, best_scores = best_rows[kept], best_scores[kept]
        return _Hits(best_rows)


def search(
    segments: Sequence[Segment],
    queries_BD: Float32Array,
    n_docs: Sequence[int],
    params: SearchParams,
    chosen: Sequence[BoolArray] | None = None,
) -> list[Ranked]:
    """The ``n_docs[b]`` best documents of each query, or all where there are fewer.

    ``chosen``: of each segment, the rows to look among. All queries go through faiss together; only those that are not
    settled go again.
    """
    scopes = [
        scope
        for i, segment in enumerate(segments)
        if (scope := _Scope(segment, None if chosen is None else chosen[i])).count
    ]
    available = sum(scope.count for scope in scopes)
    ranked: dict[int, Ranked] = {}
    pending = list(range(len(queries_BD)))
    widths = [_first_width(scopes, n, params) for n in n_docs]
    while pending and scopes:
        hits = [scope.hits(queries_BD[pending], [widths[b] for b in pending], params) for scope in scopes]
        unsettled = []
        wider: SearchParams | None = None
        for b, of_query in zip(pending, zip(*hits, strict=True), strict=True):
            ranked[b] = _rerank(scopes, queries_BD[b], [found.rows for found in of_query], n_docs[b])
            more = any(found.more for found in of_query)
            if len(ranked[b].rows) < min(n_docs[b], available):
                if not more and (wider := wider or _wider(scopes, params)) is None:
                    ranked[b] = _compared(scopes, queries_BD[b], n_docs[b], ranked[b], params)
                    continue
                unsettled.append(b)
            elif (
                more
                and widths[b] < max(MAX_CANDIDATES, n_docs[b] + SPARE_HITS)
                and any(found.unseen is not None and found.unseen >= ranked[b].scores[-1] for found in of_query)
            ):
                unsettled.append(b)
        for b in unsettled:
            widths[b] *= 4
        params = wider or params
        pending = unsettled
    return [ranked[b] if scopes else _rerank([], queries_BD[b], [], 0) for b in range(len(queries_BD))]


def _first_width(scopes: Sequence[_Scope], n_docs: int, params: SearchParams) -> int:
    if all(scope.index.exact for scope in scopes):
        return n_docs + SPARE_HITS
    return max(n_docs * (params.over_fetch or 1), n_docs + SPARE_HITS_INEXACT)


def _wider(scopes: Sequence[_Scope], params: SearchParams) -> SearchParams | None:
    wider = [found for scope in scopes if (found := scope.index.wider(params)) is not None]
    return wider[0] if wider else None


def _compared(
    scopes: Sequence[_Scope], query_D: Float32Array, n_docs: int, fallback: Ranked, params: SearchParams
) -> Ranked:
    width = n_docs + SPARE_HITS
    if sum(scope.count for scope in scopes) <= COMPARABLE_ROWS:
        rows = [scope.compared(query_D, width).rows for scope in scopes]
    elif all(scope.index.selects for scope in scopes):
        return fallback
    else:
        rows = [scope.selected(query_D, width, params).rows for scope in scopes]
    return _rerank(scopes, query_D, rows, n_docs)


def _rerank(scopes: Sequence[_Scope], query_D: Float32Array, rows: Sequence[Int64Array], n_docs: int) -> Ranked:
    """The best ``n_docs`` of the hits, ``rows`` of each segment, by exact score."""
    parts = [_contenders(scope.segment, query_D, found, n_docs) for scope, found in zip(scopes, rows, strict=True)]
    if len(parts) == 1:
        rows_K, ids_K, embeddings_KD = parts[0]
    else:
        none = np.empty(0, np.int64)
        rows_K = np.concatenate([none, *(part[0] for part in parts)])
        ids_K = np.concatenate([none, *(part[1] for part in parts)])
        embeddings_KD = np.concatenate([np.empty((0, len(query_D)), np.float32), *(part[2] for part in parts)])
    scores_K = inner_products(query_D, embeddings_KD)
    order = np.lexsort((ids_K, -scores_K))[:n_docs]
    return Ranked(rows_K[order], scores_K[order], embeddings_KD[order], ids_K[order])


def _contenders(
    segment: Segment, query_D: Float32Array, rows_K: Int64Array, n_docs: int
) -> tuple[Int64Array, Int64Array, Float32Array]:
    """Rows, ids and embeddings of those hits that may be among the best ``n_docs`` of them.

    An exact score costs ten times a sum in float32. A hit whose float32 score is so far below the ``n_docs``-th that
    not even the bound of both errors, rounded as scores are, brings them level is not worth one.
    """
    embeddings_KD = segment.index.embeddings(rows_K)
    if len(rows_K) > n_docs:
        rough_K = np.vecdot(embeddings_KD, query_D).astype(np.float64)
        # The float64 sum that is a score errs too, by a millionth of a millionth of this.
        error = 1.001 * search_error(query_D, segment.max_norm)
        lowest = np.float32(np.partition(rough_K, -n_docs)[-n_docs] - error)
        kept = (rough_K + error).astype(np.float32) >= lowest
        rows_K, embeddings_KD = rows_K[kept], embeddings_KD[kept]
    return segment.first_row + rows_K, segment.ids[rows_K], embeddings_KD
