"""CAGRA, cuVS's graph: built on a GPU, searched there, or on a CPU from the same file.

The whole corpus lies on the GPU in float32 while the graph is built: 64 GB for 21 million vectors of 768. The file is
faiss's ``IndexHNSWCagra``, an HNSW whose lowest level is that graph, so that a machine without a GPU can serve it.

Source: faiss/gpu/GpuIndexCagra.h, faiss/gpu/test/test_cagra.py.
"""

from typing import Any

import faiss
import numpy as np

from retriever_svc.index.vectors import VectorSource
from shared.errors import InvalidRequest

CAGRA = "cagra"
DEGREE = 64  # links a vector, of 128 that it begins with: faiss's own numbers
FACTORY = f"CAGRA{DEGREE}"
MAX_HITS = 512  # cuVS keeps so many candidates at most in its fast kernels
CANDIDATES = 32  # they come in multiples of it

_FAISS: Any = faiss  # what a build without CUDA lacks


def check_available() -> None:
    """Raises: InvalidRequest: this faiss cannot build it."""
    if "CUVS" not in faiss.get_compile_options():
        lacks = f"this faiss ({faiss.__version__}) is built without cuVS: install faiss-gpu-cuvs"
    elif not faiss.get_num_gpus():
        lacks = "faiss sees no GPU"
    else:
        return
    raise InvalidRequest(f"kind {CAGRA!r} cannot be built here: {lacks}; or take `hnsw`", param="kind")


def build_cagra(vectors: VectorSource, rows: int) -> Any:
    """The index as a CPU holds it; read ``rows`` at a time."""
    check_available()
    embeddings_ND = np.empty((len(vectors), vectors.dimension), np.float32)
    for number, piece_BD in enumerate(vectors.pieces(0, rows)):
        embeddings_ND[number * rows : number * rows + len(piece_BD)] = piece_BD
    config = _FAISS.GpuIndexCagraConfig()
    config.graph_degree = DEGREE
    config.intermediate_graph_degree = 2 * DEGREE
    index = _FAISS.GpuIndexCagra(_FAISS.StandardGpuResources(), vectors.dimension, faiss.METRIC_INNER_PRODUCT, config)
    index.train(embeddings_ND)  # which adds them, too
    return _FAISS.index_gpu_to_cpu(index)


def search_parameters(ef_search: int, k: int) -> Any:
    """For a search on the GPU: ``ef_search`` candidates, or as many as hits are asked for."""
    wanted = min(MAX_HITS, max(ef_search, k))
    return _FAISS.SearchParametersCagra(itopk_size=-(-wanted // CANDIDATES) * CANDIDATES)
