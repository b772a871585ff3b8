"""The faiss index of a generation: its kinds, how it is built, and how it is searched."""

from retriever_svc.devices import CUDA_MAX_HITS, Device, GpuStorage
from retriever_svc.index.building import EMBEDDINGS, INDEX, build_index, empty_index_of, take_index
from retriever_svc.index.faiss_index import Index, check_params_of_kind, goes_to_gpu, use_threads
from retriever_svc.index.kinds import FLAT, PRESETS, Recipe, merged, recipe

__all__ = [
    "CUDA_MAX_HITS",
    "EMBEDDINGS",
    "FLAT",
    "INDEX",
    "PRESETS",
    "Device",
    "GpuStorage",
    "Index",
    "Recipe",
    "build_index",
    "check_params_of_kind",
    "empty_index_of",
    "goes_to_gpu",
    "merged",
    "recipe",
    "take_index",
    "use_threads",
]
