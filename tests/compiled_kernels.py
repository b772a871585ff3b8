"""Triton's kernels compiled for a GPU that is not here: its compiler needs a device for nothing else."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from tests.kernel_cases import REAL, arguments
from tests.search_cases import REAL_BEST, REAL_SEARCHES, Steps

SHARED_BYTES = {89: 99 * 1024, 90: 227 * 1024}
"""What a program may have, by compute capability: CUDA C++ Programming Guide, "Technical Specifications"."""


def compiled(capability: int) -> set[tuple[str, str, int]]:
    """Every kernel as it is launched for BART's shapes: its name and digest, and the bytes of shared memory it takes.

    To be called once a process.
    """
    # here, since there is no Triton for every system
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.runtime import driver  # noqa: PLC0415
    from triton.runtime.jit import JITFunction  # noqa: PLC0415

    from generator_svc.engine import triton_kernels, triton_search  # noqa: PLC0415

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
        )
    )
    found: set[tuple[str, str, int]] = set()

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def compile_only(*args: Any, **options: Any) -> None:
            made = kernel.run(*args, grid=grid, warmup=True, **options)
            found.add((kernel.__name__, made.hash, made.metadata.shared))

        return compile_only

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
