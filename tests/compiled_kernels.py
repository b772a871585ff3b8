"""Triton's kernels compiled for a GPU that is not here: its compiler needs a device for nothing else."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from generator_svc.engine import triton_kernels, triton_search
from tests.kernel_cases import REAL, arguments
from tests.search_cases import REAL_BEST, REAL_SEARCHES, Steps

SHARED_BYTES = {89: 99 * 1024, 90: 227 * 1024}
"""What a program may have, by compute capability: CUDA C++ Programming Guide, "Technical Specifications"."""


class _Absent:
    """Stands for the driver of a GPU of this compute capability."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def compiled(capability: int) -> list[tuple[str, int]]:
    """Every kernel as it is launched for BART's shapes: its name, and the bytes of shared memory that it takes.

    To be called once a process.
    """
    found: list[tuple[str, int]] = []

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def compile_only(*args: Any, **options: Any) -> None:
            made = kernel.run(*args, grid=grid, warmup=True, **options)
            found.append((kernel.__name__, made.metadata.shared))

        return compile_only

    driver.set_active(_Absent(capability))
    with patch.object(JITFunction, "__getitem__", launch):
        for kernel, sizes in REAL:
            for dtype in (torch.float32, torch.bfloat16):
                getattr(triton_kernels, kernel)(*arguments(kernel, dtype, **sizes))
        for sizes in REAL_BEST:
            problems, beams, count = sizes["problems"], sizes["beams"], sizes["count"]
            triton_search.best_continuations(
                torch.zeros(problems, beams, sizes["vocabulary"]), torch.zeros(problems, beams), count
            )
        for search in REAL_SEARCHES:
            with patch("generator_svc.engine.kernels.keep_beams", triton_search.keep_beams):
                Steps("cpu", **search | {"vocabulary": 100}).step()
    return found
