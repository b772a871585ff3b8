"""Triton's kernels compiled for a GPU that is not here: its compiler needs a device for nothing else."""

import importlib
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from tests.kernel_cases import OPTIONS, PRODUCTS, REAL, arguments, compiled_module
from tests.search_cases import REAL_BEST, REAL_SEARCHES, Steps

SHARED_BYTES = {89: 99 * 1024, 90: 227 * 1024}
"""What a program may have, by compute capability: CUDA C++ Programming Guide, "Technical Specifications"."""


class Compiled(NamedTuple):
    name: str
    ptx: str
    shared_bytes: int

    @property
    def early(self) -> list[str]:
        """What it reads or writes before its turn, where it may be launched before that."""
        ahead, waits, _ = self.ptx.partition("griddepcontrol.wait")
        return re.findall(r"\b(?:ld|st|atom|red|cp\.async)\S*\.global\S*", ahead) if waits else []


def compiled(capability: int) -> set[Compiled]:
    """Every kernel as it is launched for BART's shapes. To be called once a process."""
    # here, since there is no Triton for every system
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.runtime import driver  # noqa: PLC0415
    from triton.runtime.jit import JITFunction  # noqa: PLC0415

    from generator_svc.engine import triton_launch, triton_search  # noqa: PLC0415

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
        )
    )
    found: set[Compiled] = set()

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def compile_only(*args: Any, **options: Any) -> None:
            made = kernel.run(*args, grid=grid, warmup=True, **options)
            found.add(Compiled(kernel.__name__, made.asm["ptx"], made.metadata.shared))

        return compile_only

    device = triton_launch.Device(132, chains=capability >= 90)
    with patch.object(JITFunction, "__getitem__", launch), patch.object(triton_launch, "device", lambda _: device):
        for kernel, sizes in REAL:
            for dtype in (torch.bfloat16,) if kernel in PRODUCTS else (torch.float32, torch.bfloat16):
                launched = getattr(importlib.import_module(compiled_module(kernel)), kernel)
                launched(*arguments(kernel, dtype, **sizes), **OPTIONS.get(kernel, {}))
        for sizes in REAL_BEST:
            problems, beams, count = sizes["problems"], sizes["beams"], sizes["count"]
            triton_search.best_continuations(
                torch.zeros(problems, beams, sizes["vocabulary"]), torch.zeros(problems, beams), count
            )
        for search in REAL_SEARCHES:
            with patch("generator_svc.engine.kernels.keep_beams", triton_search.keep_beams):
                Steps("cpu", **search | {"vocabulary": 100}).step()
    return found
