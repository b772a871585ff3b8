"""What a Triton kernel is launched with besides its arguments, as the GPU has it.

From compute capability 9.0 on a kernel may be launched before the one ahead of it has ended (programmatic dependent
launch): it fetches what was there before, its weights, and then waits its turn. So the start of one kernel hides behind
the end of another.
"""

from functools import cache
from typing import Any, NamedTuple

import structlog
import torch
import triton
import triton.language as tl
from torch import Tensor

LINE_BYTES = 128
"""What is fetched at once."""

_log = structlog.get_logger(__name__)


class Device(NamedTuple):
    processors: int
    """Streaming multiprocessors."""
    chains: bool
    """Whether kernels may be launched ahead of their turn."""


@cache
def device(index: int) -> Device:
    """A CUDA device's; below 0, where kernels are interpreted, those of an H100 without chains."""
    if index < 0:
        return Device(132, chains=False)
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, chains=properties.major >= 9 and _captures_chains(index))


def _captures_chains(index: int) -> bool:
    """Whether a graph may hold kernels that are launched ahead of their turn, behind other work too: drivers differ,
    and without graphs a step takes many times longer."""
    try:
        with torch.cuda.device(index):
            count = torch.zeros(1, device="cuda")
            _add_one[(1,)](count, launch_pdl=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                count.zero_()
                for _ in range(3):
                    _add_one[(1,)](count, launch_pdl=True)
            graph.replay()
            if count.item() == 3:
                return True
            reason = f"three kernels counted to {count.item()}"
    except Exception as error:  # noqa: BLE001  whatever it is, launched in turn they do the same
        reason = f"{type(error).__name__}: {error}"
    _log.warning("kernels_not_chained", error=reason, advice="they are launched in turn, a little slower")
    return False


def processors(where: Tensor) -> int:
    return device(where.get_device()).processors


def chained(where: Tensor) -> dict[str, Any]:
    """For a kernel that calls :func:`in_turn`."""
    return {"CHAINED": True, "launch_pdl": True} if device(where.get_device()).chains else {"CHAINED": False}


@triton.jit
def fetch(at: tl.tensor) -> None:
    """Has the lines at these addresses brought into the second-level cache: before its turn, as nothing is read."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [at.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def in_turn(CHAINED: tl.constexpr) -> None:
    """Lets the next kernel be launched, and waits for the one before: to be called by every program, once, before it
    reads what another kernel wrote, or writes anything."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _add_one(number: tl.tensor) -> None:
    in_turn(True)
    tl.store(number, tl.load(number) + 1)
