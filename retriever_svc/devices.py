"""Where an index lives and how it is stored there. Apart from faiss, so that settings are read without it."""

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
GpuStorage = Literal["float32", "float16"]
CUDA_MAX_HITS = 2048  # faiss's k-selection on a GPU goes no further, nor do the lists that it probes
