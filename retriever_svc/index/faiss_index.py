"""A faiss index as it serves, on the CPU or a GPU.

Shapes: B queries, K hits, D dimension. Rows are positions in the passage table of the same generation.
faiss's GPU resources are not thread-safe, and its number of threads belongs to the calling thread: create an index
and search it on one and the same thread.
"""

from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import numpy.typing as npt
import structlog

from retriever_svc.devices import CUDA_MAX_HITS, Device, GpuStorage
from retriever_svc.index import cagra
from retriever_svc.index.building import EMBEDDINGS, INDEX
from retriever_svc.index.huge_pages import to_huge_pages
from retriever_svc.index.kinds import CUDA_FLOAT32_SUBQUANTIZERS, checked, core_of, empty_index, reason_of, recipe
from retriever_svc.index.vectors import MappedVectors
from shared.errors import InvalidRequest, StartupError
from shared.retrieval import Float32Array, Int64Array
from shared.schemas import SearchParams

_PARAMETERS: Any = faiss  # its type stubs lack most of what a search can be told
_CAGRA: Any = _PARAMETERS.IndexHNSWCagra
BoolArray = npt.NDArray[np.bool_]

HALF_MAX = float(np.finfo(np.float16).max)

# From how many queries on the CPU multiplies them as one matrix instead of one by one. faiss itself waits for
# 128 000 numbers, 1000 queries of 128: measured on one core with 64 queries, one by one took 18.0 ms where the matrix
# took 3.1 (15 000 x 128), and 1.1 s where it took 0.11 (50 000 x 768). Below 4 queries the matrix is the slower one.
BLAS_FROM_QUERIES = 4

log = structlog.get_logger(__name__)


class Vectors(Protocol):
    """The true embeddings, by row."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> Float32Array: ...


class Index:
    """Search by inner product.

    The embeddings stay on the host on either device: they are what scores are computed from and what
    ``return_embeds`` returns, and reading a few rows of them takes microseconds where the table takes a millisecond.

    Attributes:
        exact: it compares every vector in float32, so that it errs by rounding alone.
        selects: it can search among chosen rows as quickly as among all.
        max_hits: the most hits of one search.
    """

    def __init__(self, host: Any, vectors: Vectors, *, cuda: bool = False, gpu_storage: GpuStorage = "float32") -> None:
        self._host = host  # owns the memory that `vectors` may look into
        self._core = core_of(host)
        self._vectors = vectors
        # Of a graph of lists: it gives as many as asked, but the nearest only where it keeps as many candidates.
        self._list_candidates = _candidates_of_lists(self._core)
        self.dimension = int(host.d)
        self.count = int(host.ntotal)
        self.device = "cpu"
        self.exact = isinstance(host, faiss.IndexFlat)
        self.selects = True
        self.max_hits = self.count
        self._searcher = host
        if cuda:
            self._move_to_gpu(gpu_storage)

    @classmethod
    def read(
        cls, folder: Path, *, dtype: str = "float32", device: Device = "auto", gpu_storage: GpuStorage = "float32"
    ) -> "Index":
        """Read the index of a generation's folder; on a GPU where faiss sees one, unless ``device`` says otherwise.

        ``dtype``: of the embeddings, where they have a file of their own.

        Raises: StartupError: no GPU where one is demanded, or a file that holds nothing that can be served.
        """
        if device == "cuda" and not goes_to_gpu(device):
            raise StartupError(
                "RETRIEVER_DEVICE is `cuda`, but faiss sees no GPU: install faiss-gpu and look at `nvidia-smi`, "
                "or set it to `auto`"
            )
        path = folder / INDEX
        try:
            host = checked(faiss.read_index(str(path)), str(path))
        except RuntimeError as error:
            reason = reason_of(error)
            raise StartupError(f"{path} is not an index that this faiss can read; rebuild it ({reason})") from error
        except InvalidRequest as error:
            raise StartupError(f"{error.message}; rebuild it") from error
        vectors: Vectors
        if (folder / EMBEDDINGS).exists():
            vectors = MappedVectors(folder / EMBEDDINGS, host.d, dtype)
        elif isinstance(host, faiss.IndexFlat):
            vectors = faiss.rev_swig_ptr(host.get_xb(), host.ntotal * host.d).reshape(host.ntotal, host.d)
        else:
            raise StartupError(f"{folder / EMBEDDINGS} is missing: {path} does not hold the embeddings; rebuild it")
        if len(vectors) != host.ntotal:
            raise StartupError(f"{folder / EMBEDDINGS} holds {len(vectors)} rows, {path} {host.ntotal}; rebuild them")
        cuda = goes_to_gpu(device) and host.ntotal > 0
        if not cuda:
            log.info("huge_pages", bytes=to_huge_pages(host))
        return cls(host, vectors, cuda=cuda, gpu_storage=gpu_storage)

    def _move_to_gpu(self, storage: GpuStorage) -> None:
        half = storage == "float16"
        if half and self.exact and self.count and float(np.abs(self._vectors[:]).max()) > HALF_MAX:
            raise StartupError(
                f"an embedding is beyond {HALF_MAX:.0f}: float16 cannot store it, "
                "choose float32 in RETRIEVER_GPU_STORAGE"
            )
        resources = faiss.StandardGpuResources()
        try:
            if self.exact:
                config = faiss.GpuIndexFlatConfig()
                config.device = 0
                config.useFloat16 = half
                self._searcher = faiss.GpuIndexFlatIP(resources, self._host, config)
            else:
                options = faiss.GpuClonerOptions()
                options.useFloat16 = half or _needs_half_tables(self._core)
                options.allowCpuCoarseQuantizer = True
                self._searcher = faiss.index_cpu_to_gpu(resources, 0, self._host, options)
        except RuntimeError as error:
            log.warning("index_stays_on_the_cpu", kind=type(self._core).__name__, because=reason_of(error))
            return
        self._resources = resources
        self.device = f"cuda:0 ({storage})"
        self.exact = self.exact and not half
        self.selects = False
        self.max_hits = min(self.count, cagra.MAX_HITS if isinstance(self._core, _CAGRA) else CUDA_MAX_HITS)

    def check_params(self, params: SearchParams | None) -> None:
        """Raises: InvalidRequest: a setting that an index of this kind does not have."""
        check_params(self._core, params, exact=self.exact)

    def search(
        self, queries_BD: Float32Array, k: int, params: SearchParams | None = None, chosen: BoolArray | None = None
    ) -> tuple[Float32Array, Int64Array]:
        """The ``k`` best rows of each query, best first: scores as faiss computes them (B, k), rows (B, k).

        ``k`` is at most ``max_hits``. Row -1 where an index that is not exact found no more. ``chosen`` (count,):
        search among these rows only, and for as many as there are; for an index on a GPU its copy on the host does it.
        """
        # A global of faiss, in queries times dimension: set for every search, since collections differ in dimension.
        faiss.cvar.distance_compute_blas_threshold = BLAS_FROM_QUERIES * self.dimension
        queries_BD = np.ascontiguousarray(queries_BD)
        searcher = self._searcher if chosen is None else self._host
        scores_BK, rows_BK = searcher.search(queries_BD, k, params=self._parameters(k, params, chosen))
        return scores_BK, rows_BK

    def _parameters(self, k: int, params: SearchParams | None, chosen: BoolArray | None) -> Any:
        options: dict[str, Any] = {}
        if chosen is not None:
            options["sel"] = _PARAMETERS.IDSelectorBitmap(np.packbits(chosen, bitorder="little"))
        if isinstance(self._core, faiss.IndexIVF):
            asked = params.nprobe if params is not None and params.nprobe is not None else 1
            most = self._core.nlist if self.device == "cpu" else min(self._core.nlist, CUDA_MAX_HITS)
            nprobe = min(asked, most)
            if self._list_candidates is not None and self.device == "cpu":
                width = max(nprobe, self._list_candidates)
                options["quantizer_params"] = _PARAMETERS.SearchParametersHNSW(efSearch=width)
            found = _PARAMETERS.SearchParametersIVF(nprobe=nprobe, **options)
        elif isinstance(self._core, faiss.IndexHNSW):
            asked = params.ef_search if params is not None and params.ef_search is not None else 1
            if chosen is None and self.device != "cpu":
                return cagra.search_parameters(asked, k)
            found = _PARAMETERS.SearchParametersHNSW(efSearch=max(asked, k), **options)
        elif options:
            found = _PARAMETERS.SearchParameters(**options)
        else:
            return None
        if isinstance(self._host, faiss.IndexPreTransform):
            return _PARAMETERS.SearchParametersPreTransform(index_params=found)
        return found

    def wider(self, params: SearchParams) -> SearchParams | None:
        """``params`` that look at four times as much; None where they look at everything already."""
        if isinstance(self._core, faiss.IndexIVF) and (params.nprobe or 1) < self._core.nlist:
            return params.model_copy(update={"nprobe": 4 * (params.nprobe or 1)})
        if isinstance(self._core, faiss.IndexHNSW) and (params.ef_search or 1) < self.count:
            return params.model_copy(update={"ef_search": 4 * (params.ef_search or 1)})
        return None

    def embeddings(self, rows_K: Int64Array | slice) -> Float32Array:
        """The true embeddings of ``rows_K``: (K, D). Half precision widens to float32 without loss."""
        return self._vectors[rows_K]


def goes_to_gpu(device: Device) -> bool:
    """Whether an index that can is searched on a GPU."""
    return device != "cpu" and faiss.get_num_gpus() > 0


def check_params(core: Any, params: SearchParams | None, *, exact: bool) -> None:
    """Raises: InvalidRequest: a setting that a faiss index of this class does not have."""
    if params is None:
        return
    for name, kind in (("nprobe", faiss.IndexIVF), ("ef_search", faiss.IndexHNSW)):
        if getattr(params, name) is not None and not isinstance(core, kind):
            raise InvalidRequest(
                f"the collection's index ({type(core).__name__}) has no {name}", param=f"search_params.{name}"
            )
    if params.over_fetch is not None and exact:
        raise InvalidRequest("the index is exact: nothing is fetched over", param="search_params.over_fetch")


def check_params_of_kind(kind: str, dimension: int, params: SearchParams | None) -> None:
    """As :func:`check_params`, of what a kind will be. Raises: InvalidRequest: also where there is no such kind."""
    factory = recipe(kind, dimension, 1).factory
    core = core_of(empty_index("HNSW32" if kind == cagra.CAGRA else factory, dimension))  # whose class its file has
    check_params(core, params, exact=isinstance(core, faiss.IndexFlat))


def _candidates_of_lists(core: Any) -> int | None:
    lists = faiss.downcast_index(core.quantizer) if isinstance(core, faiss.IndexIVF) else None
    return int(lists.hnsw.efSearch) if isinstance(lists, faiss.IndexHNSW) else None


def _needs_half_tables(core: Any) -> bool:
    """Whether a GPU has no room for what faiss looks codes of this length up in, unless it is float16."""
    return isinstance(core, faiss.IndexIVFPQ) and core.pq.M > CUDA_FLOAT32_SUBQUANTIZERS


def use_threads(threads: int) -> int:
    """Set how many threads faiss takes for a search *of the calling thread*; 0 chooses. Returns the number."""
    if threads == 0:
        # Threads of a search wait for each other by spinning: where other processes take the cores, a search that
        # counted on all of them took 25 times as long. Half of them scan memory about as fast.
        threads = max(1, min(8, faiss.omp_get_max_threads() // 2))
    faiss.omp_set_num_threads(threads)
    return threads
