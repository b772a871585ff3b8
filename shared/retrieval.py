"""A batch of query vectors and what was found, as arrays: the form in which both services handle them.

The wire forms are in :mod:`shared.vectors`. Shapes: B queries, N documents found, D dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shared.schemas import IndexInfo, Passage, SearchParams

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RetrieveQuery:
    """``vectors``: (B, D) float32, finite."""

    vectors: Float32Array
    n_docs: int = 5
    collection: str = "default"
    return_embeds: bool = True
    return_passages: bool = True
    search_params: SearchParams | None = None
    filter: str | None = None
    timeout_ms: int | None = None


@dataclass(frozen=True)
class RetrieveResult:
    """One entry a query, best document first; entry b has n_found[b] <= n_docs documents.

    ``doc_ids[b]`` (N_b,), ``doc_scores[b]`` (N_b,) inner products, ``doc_embeds[b]`` (N_b, D) or None where not asked
    for, ``docs[b]`` N_b passages or None where not asked for.
    """

    doc_ids: Sequence[Int64Array]
    doc_scores: Sequence[Float32Array]
    doc_embeds: Sequence[Float32Array] | None
    docs: Sequence[Sequence[Passage]] | None
    index: IndexInfo
    timings_ms: dict[str, float] = field(default_factory=dict)

    @property
    def n_found(self) -> list[int]:
        return [len(ids) for ids in self.doc_ids]
