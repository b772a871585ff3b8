"""What this machine can do, and what a process took of it."""

import ctypes
import gc
import platform
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.processor import processor
from generator_svc.engine import int8
from generator_svc.engine.affine import Affine

_PEAK = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def describe(device: str) -> dict[str, Any]:
    """The machine and the versions that a figure belongs to."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds, until the device is done."""
    began = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def median_time(run: Callable[[], object], device: str, repeats: int) -> float:
    """Seconds; the first run is a warm-up."""
    timed(run, device)
    return statistics.median(timed(run, device) for _ in range(repeats))


def reset_peak_memory(device: str) -> None:
    """From here on `peak_memory` counts anew. Without Linux's /proc it counts from the process's start."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif _RESET.exists():
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier cell freed is not this one's
        _RESET.write_text("5")


def peak_memory(device: str) -> int:
    """Bytes: of the device's memory on CUDA, of the whole process otherwise."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    if _PEAK.exists():
        line = next(line for line in _PEAK.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.inference_mode()
def matrix_product_peak(dtype: torch.dtype, device: str) -> float:
    """Operations a second of the fastest of a few square products: torch's own, but for int8, and the engine's.

    The engine's with the weight in the order in which it holds it, so that no share of this peak is flattered.
    """
    fastest = 0.0
    for size in (1024, 2048, 4096) if device == "cpu" else (4096, 8192):
        states = int8.states_dtype() if dtype == torch.int8 else dtype
        left, linear = torch.randn(size, size, device=device).to(states), nn.Linear(size, size).to(device, states)
        if dtype == torch.int8:
            products: list[Callable[[Tensor], Tensor]] = [int8.Int8Affine.of_modules(linear, out=states)]
        else:
            products = [partial(torch.mm, mat2=left), Affine.of_modules(linear).__call__]
        for product in products:
            fastest = max(fastest, 2 * size**3 / median_time(partial(product, left), device, 5))
    return fastest


@torch.inference_mode()
def memory_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.empty(2**28 if device == "cpu" else 2**30, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_time(lambda: target.copy_(source), device, 7)
