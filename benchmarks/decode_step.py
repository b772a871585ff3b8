"""`python -m benchmarks.decode_step`: where the time of a decode step goes on CUDA, kernel by kernel.

A step of RAG-Token with 4 beams (decoder and marginalisation, without the search) is captured half-way through an
answer and replayed: as it is, with all products by torch, with all that may be by our own kernels, and with no kernel
launched ahead of its turn. The floor is the time in which what a step reads can be read.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.device_share import decoder_graph, questions, replayed_s, step_bytes
from benchmarks.machine import describe, memory_bandwidth
from benchmarks.models import SHAPES
from generator_svc.engine import kernels
from generator_svc.engine.lane import Lane, LaneDecoding

REPLAYS = 20
DEVICE = "cuda"


@dataclass(frozen=True)
class Kernel:
    """All launches of a kernel in one step, and the microseconds they take together."""

    name: str
    launches: int
    us: float


@dataclass(frozen=True)
class Step:
    """``us``: microseconds of a step, by variant; ``kernels`` of the step as it is."""

    shape: str
    dtype: str
    batch: int
    floor_us: float
    us: dict[str, float]
    kernels: list[Kernel]


def variants() -> dict[str, Callable[[], Any]]:
    """Contexts in which a step is captured."""
    from generator_svc.engine import triton_launch  # noqa: PLC0415  where Triton is

    device = triton_launch.device
    return {
        "as it is": nullcontext,
        "torch's products": lambda: patch.object(kernels, "is_better", lambda *_: False),
        "our products": lambda: patch.object(kernels, "is_better", lambda *_: True),
        "none ahead": lambda: patch.object(triton_launch, "device", lambda index: device(index)._replace(chains=False)),
    }


def lane_of(shape: str, dtype: str, batch: int) -> tuple[Lane, list[int]]:
    """One that has answered, and the lengths of its contexts."""
    engine, tasks = questions(shape, dtype, DEVICE, batch)
    running = engine.begin(tasks)
    while not running[0].finished:
        engine.step(running)
    first = running[0]
    if not isinstance(first, LaneDecoding):
        raise TypeError("questions of one form share a lane on CUDA")
    return first.lane, [len(context) for task in tasks for context in task.contexts]


def kernels_of(graph: torch.cuda.CUDAGraph) -> Iterator[Kernel]:
    """Those of a step, the longest first."""
    graph.replay()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    for event in sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total):
        if event.count >= REPLAYS and event.self_device_time_total:
            yield Kernel(event.key, event.count // REPLAYS, event.self_device_time_total / REPLAYS)


def measured(shape: str, dtype: str, batch: int) -> Step:
    lane, lengths = lane_of(shape, dtype, batch)
    times: dict[str, float] = {}
    found: list[Kernel] = []
    for name, variant in variants().items():
        with variant():
            graph = decoder_graph(lane)
        times[name] = 1e6 * replayed_s(graph)
        found = found or list(kernels_of(graph))
    floor_s = step_bytes(SHAPES[shape], lengths, dtype) / memory_bandwidth(DEVICE)
    return Step(shape, dtype, batch, 1e6 * floor_s, times, found)


def tables(step: Step) -> list[Table]:
    about = f"{step.shape}, {step.dtype}, batch {step.batch}"
    times = Table(title=f"a decode step, {about}; floor {step.floor_us:.0f} µs")
    for name in ("", "µs", "of the floor"):
        times.add_column(name, justify="right" if name else "left")
    for name, us in step.us.items():
        times.add_row(name, f"{us:.0f}", f"{us / step.floor_us:.2f}")
    of_kernels = Table(title=f"its kernels, {about}")
    for name in ("kernel", "launches", "µs", "µs each"):
        of_kernels.add_column(name, justify="left" if name == "kernel" else "right")
    for one in step.kernels:
        of_kernels.add_row(one.name[:70], str(one.launches), f"{one.us:.1f}", f"{one.us / one.launches:.1f}")
    return [times, of_kernels]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["base", "large"])
    parser.add_argument("--batch", nargs="+", type=int, default=[8], help="questions together")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["bfloat16"])
    parser.add_argument("--output", type=Path, help="a JSON file for the result as well")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here, and a decode step's kernels are those of CUDA")
    console = Console(width=None if sys.stdout.isatty() else 120)
    steps = []
    for shape in arguments.shape:
        for dtype in arguments.dtype:
            for batch in arguments.batch:
                steps.append(measured(shape, dtype, batch))
                console.print(*tables(steps[-1]))
    if arguments.output is not None:
        result = {"machine": describe(DEVICE), "steps": [asdict(step) for step in steps]}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
