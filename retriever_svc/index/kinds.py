"""The kinds of index: presets by name, and any other by its faiss factory string.

What an index stores decides its size and speed, not its scores: whatever the kind, its hits are ranked anew by the
exact inner products with the true embeddings (:mod:`retriever_svc.ranking`), over more hits than were asked for.

Source of the strings: https://github.com/facebookresearch/faiss/wiki/The-index-factory; of wiki_dpr's two indexes
(``HNSW128,SQ8`` and ``IVF4096_HNSW128,PQ128``): the data set's card.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import faiss

from retriever_svc.index.cagra import CAGRA, FACTORY, check_available
from shared.errors import InvalidRequest
from shared.schemas import SearchParams

HNSW_CONSTRUCTION = 200  # candidates looked at while a vector is linked in: DPR's own setting
FLAT = "flat"


@dataclass(frozen=True)
class Kind:
    """A preset.

    Attributes:
        factory: faiss's string for (dimension, count).
        params: how widely to search by default, for a count.
        recall_floor: share of the true best 5 documents that it returns at least, on embeddings that cluster as
            sentences do.
        about: one line for people who choose.
    """

    name: str
    factory: Callable[[int, int], str]
    params: Callable[[int], SearchParams]
    recall_floor: float
    about: str


def lists_of(count: int) -> int:
    """Inverted lists for so many vectors: 4 roots of it, with 39 vectors a list to train on."""
    return max(1, min(65_536, round(4 * math.sqrt(count)), count // 39))


def subquantizers(dimension: int) -> int:
    """The largest divisor that leaves about 6 components each: 128 for 768, as wiki_dpr has it."""
    return max(m for m in range(1, max(2, dimension // 6) + 1) if dimension % m == 0)


# Of a vector's code, what faiss searches on a GPU (its gpu/impl/IVFPQ.cu), where it looks up float16; in float32 half.
CUDA_SUBQUANTIZERS = {1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96}
CUDA_FLOAT32_SUBQUANTIZERS = 48


def _probes(count: int) -> int:
    """An eighth of the lists, 8 at least."""
    return min(lists_of(count), max(8, lists_of(count) // 8))


PRESETS = {
    kind.name: kind
    for kind in (
        Kind(FLAT, lambda _d, _n: "Flat", lambda _n: SearchParams(), 1.0, "exact; every vector is compared"),
        Kind("flat-fp16", lambda _d, _n: "SQfp16", lambda _n: SearchParams(over_fetch=2), 0.99, "half of flat's RAM"),
        Kind("sq8", lambda _d, _n: "SQ8", lambda _n: SearchParams(over_fetch=4), 0.99, "a quarter of flat's RAM"),
        Kind(
            "hnsw",
            lambda _d, _n: "HNSW128,SQ8",
            lambda _n: SearchParams(ef_search=128, over_fetch=4),
            0.97,
            "fast single queries; what wiki_dpr calls exact",
        ),
        Kind(
            "ivf-flat",
            lambda _d, n: f"IVF{lists_of(n)},Flat",
            lambda n: SearchParams(nprobe=_probes(n), over_fetch=1),
            0.97,
            "an eighth of flat's work",
        ),
        Kind(
            "ivf-pq",
            lambda d, n: f"IVF{lists_of(n)}_HNSW32,PQ{subquantizers(d)}",
            lambda n: SearchParams(nprobe=_probes(n), over_fetch=20),
            0.9,
            "smallest and fastest; what wiki_dpr calls compressed",
        ),
    )
}


@dataclass(frozen=True)
class Recipe:
    """A kind settled for one collection: ``factory`` is faiss's string, ``params`` how widely it is searched."""

    kind: str
    factory: str
    params: SearchParams


def recipe(kind: str, dimension: int, count: int, params: SearchParams | None = None) -> Recipe:
    """What to build for ``kind``: a preset's name, or a factory string.

    Raises: InvalidRequest: no such preset, no string that faiss reads, or an index that cannot serve here.
    """
    preset = PRESETS.get(kind)
    if kind == CAGRA:
        check_available()
        default = SearchParams(ef_search=128, over_fetch=4)
        settled = Recipe(CAGRA, FACTORY, default)
        return settled if params is None else replace(settled, params=merged(default, params))
    if preset is None:
        checked(empty_index(kind, dimension), f"kind {kind!r}")
        default = SearchParams(over_fetch=10)
    else:
        kind, default = preset.name, preset.params(count)
    settled = Recipe(kind, kind if preset is None else preset.factory(dimension, count), default)
    return settled if params is None else replace(settled, params=merged(default, params))


def merged(default: SearchParams, asked: SearchParams | None) -> SearchParams:
    """``asked``, and the default where it says nothing."""
    if asked is None:
        return default
    return SearchParams(**{**default.model_dump(exclude_none=True), **asked.model_dump(exclude_none=True)})


def empty_index(factory: str, dimension: int) -> Any:
    """Raises: InvalidRequest: faiss does not read the string."""
    try:
        return faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InvalidRequest(
            f"kind {factory!r} is neither a preset ({', '.join(PRESETS)}) nor a factory string that faiss reads for "
            f"dimension {dimension}: {reason_of(error)}",
            param="kind",
        ) from None


def core_of(index: Any) -> Any:
    """The index behind a transformation of the vectors (OPQ, PCA), or itself; as its own class."""
    index = faiss.downcast_index(index)
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


SERVED = (faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexHNSW, faiss.IndexIVF)


def checked(index: Any, what: str) -> Any:
    """``index``, if it can serve: inner products, a row number for each vector, a search among chosen rows.

    Raises: InvalidRequest.
    """
    core = core_of(index)
    if not isinstance(core, SERVED):
        raise InvalidRequest(
            f"{what} is a faiss {type(core).__name__}; served are Flat, SQ…, HNSW… and IVF…, also behind OPQ or PCA",
            param="kind",
        )
    if {index.metric_type, core.metric_type} != {faiss.METRIC_INNER_PRODUCT}:
        raise InvalidRequest(
            f"{what} ranks by distance, not by inner product: RAG's scores are inner products (data sets' "
            "`add_faiss_index` builds L2 unless told `metric_type=faiss.METRIC_INNER_PRODUCT`)",
            param="kind",
        )
    return index


def reason_of(error: RuntimeError) -> str:
    """faiss's message without the C++ signature before it."""
    return str(error).rpartition(": ")[2] or str(error)
