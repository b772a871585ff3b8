"""The faiss index of a generation. Kind ``flat``: every query is compared with every embedding, by inner product.

Shapes: B queries, K hits, D dimension. Rows are positions in the passage table of the same generation.
faiss's GPU resources are not thread-safe, and its number of threads belongs to the calling thread: create an index
and search it on one and the same thread.
"""

from pathlib import Path
from typing import Any, Literal, Protocol

import faiss
import numpy as np

from shared.errors import StartupError
from shared.retrieval import Float32Array, Int64Array

Device = Literal["auto", "cpu", "cuda"]
GpuStorage = Literal["float32", "float16"]

HALF_MAX = float(np.finfo(np.float16).max)
CUDA_MAX_HITS = 2048  # faiss's k-selection on a GPU goes no further

# From how many queries on the CPU multiplies them as one matrix instead of one by one. faiss itself waits for
# 128 000 numbers, 1000 queries of 128: measured on one core with 64 queries, one by one took 18.0 ms where the matrix
# took 3.1 (15 000 x 128), and 1.1 s where it took 0.11 (50 000 x 768). Below 4 queries the matrix is the slower one.
BLAS_FROM_QUERIES = 4


class FlatBuilder:
    """Collects embeddings for an index file of kind ``flat``."""

    def __init__(self, dimension: int) -> None:
        self._index = faiss.IndexFlatIP(dimension)

    def add(self, embeddings_BD: Float32Array) -> None:
        self._index.add(np.ascontiguousarray(embeddings_BD))

    def write(self, path: Path) -> None:
        faiss.write_index(self._index, str(path))


class Searcher(Protocol):
    """What is asked of faiss, on either device."""

    def search(self, queries_BD: Float32Array, k: int) -> tuple[Float32Array, Int64Array]: ...


class FlatIndex:
    """Exact search by inner product.

    The embeddings stay in host memory as float32 on either device: they are what scores are computed from and what
    ``return_embeds`` returns, and reading a few rows of them takes microseconds where the table takes a millisecond.
    """

    kind = "flat"

    def __init__(self, host: Any, *, cuda: bool = False, gpu_storage: GpuStorage = "float32") -> None:
        self.dimension = int(host.d)
        self.count = int(host.ntotal)
        self._host = host  # owns the memory that the next line looks into
        self._embeddings_ND: Float32Array = faiss.rev_swig_ptr(host.get_xb(), self.count * self.dimension).reshape(
            self.count, self.dimension
        )
        self.device = "cpu"
        self.exact = True
        self.max_hits = self.count
        self._searcher: Searcher = host
        if cuda:
            self._move_to_gpu(gpu_storage)

    @classmethod
    def read(cls, path: Path, *, device: Device = "auto", gpu_storage: GpuStorage = "float32") -> "FlatIndex":
        """Read an index file; on a GPU where faiss sees one, unless ``device`` says otherwise.

        Raises: StartupError: no GPU where one is demanded, or a file that holds no flat inner-product index.
        """
        gpus = faiss.get_num_gpus()
        if device == "cuda" and not gpus:
            raise StartupError(
                "RETRIEVER_DEVICE is `cuda`, but faiss sees no GPU: install faiss-gpu and look at `nvidia-smi`, "
                "or set it to `auto`"
            )
        try:
            host = faiss.read_index(str(path))
        except RuntimeError as error:
            raise StartupError(f"{path} is not an index that this faiss can read; rebuild it ({error})") from error
        if not isinstance(host, faiss.IndexFlatIP):
            raise StartupError(f"{path} holds a {type(host).__name__}, not a flat inner-product index; rebuild it")
        return cls(host, cuda=device != "cpu" and gpus > 0, gpu_storage=gpu_storage)

    def _move_to_gpu(self, storage: GpuStorage) -> None:
        half = storage == "float16"
        if half and self.count and float(np.abs(self._embeddings_ND).max()) > HALF_MAX:
            raise StartupError(
                f"an embedding is beyond {HALF_MAX:.0f}: float16 cannot store it, "
                "choose float32 in RETRIEVER_GPU_STORAGE"
            )
        config = faiss.GpuIndexFlatConfig()
        config.device = 0
        config.useFloat16 = half
        self._resources = faiss.StandardGpuResources()
        self._searcher = faiss.GpuIndexFlatIP(self._resources, self._host, config)
        self.device = f"cuda:0 ({storage})"
        self.exact = not half
        self.max_hits = min(self.count, CUDA_MAX_HITS)

    def search(self, queries_BD: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        """The ``k`` best rows of each query, best first: scores as faiss computes them (B, k), rows (B, k).

        ``k`` is at most ``max_hits``, so that a row is never faiss's filler -1.
        """
        # A global of faiss, in queries times dimension: set for every search, since collections differ in dimension.
        faiss.cvar.distance_compute_blas_threshold = BLAS_FROM_QUERIES * self.dimension
        scores_BK, rows_BK = self._searcher.search(np.ascontiguousarray(queries_BD), k)
        return scores_BK, rows_BK

    def embeddings(self, rows_K: Int64Array) -> Float32Array:
        """The stored embeddings of ``rows_K``: (K, D), a copy. Half precision widens to float32 without loss."""
        return self._embeddings_ND[rows_K]


def use_threads(threads: int) -> int:
    """Set how many threads faiss takes for a search *of the calling thread*; 0 chooses. Returns the number."""
    if threads == 0:
        # Threads of a search wait for each other by spinning: where other processes take the cores, a search that
        # counted on all of them took 25 times as long. Half of them scan memory about as fast.
        threads = max(1, min(8, faiss.omp_get_max_threads() // 2))
    faiss.omp_set_num_threads(threads)
    return threads
