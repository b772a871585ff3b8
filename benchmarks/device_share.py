"""How much of the device our engine uses: prefill against its arithmetic, a decode step against its memory.

Prefill multiplies large matrices, so its bound is the fastest matrix product that the device was seen to do. A decode
step reads every weight for a handful of rows, so its bound is the time in which that much can be read.
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.machine import matrix_product_peak, median_time, memory_bandwidth, timed
from benchmarks.models import SHAPES, Shape, random_inputs
from benchmarks.sides import N_DOCS, NEW_TOKENS, random_engine, states_dtype
from generator_svc.engine import RagEngine
from generator_svc.engine.backend import Task
from generator_svc.engine.decoder import Bart
from generator_svc.engine.lane import Lane, LaneDecoding

BEAMS = 4


@dataclass(frozen=True)
class DeviceShare:
    """Flops are floating-point operations a second, ``bandwidth`` bytes a second.

    ``decoder_s`` is the decoder's part of a step, ``step_s`` the whole, the search included.
    """

    shape: str
    dtype: str
    batch: int
    peak_flops: float
    prefill_flops: float
    bandwidth: float
    decoder_s: float
    step_s: float
    floor_s: float


def questions(shape_name: str, dtype_name: str, device: str, batch: int) -> tuple[RagEngine, list[Task]]:
    """Random ones for RAG-Token with beams, which all answer with as many tokens, and an engine for them."""
    engine = random_engine(shape_name, dtype_name, device)
    inputs = random_inputs(SHAPES[shape_name], batch, N_DOCS, device)
    options: dict[str, Any] = {
        "strategy": "token",
        "num_beams": BEAMS,
        "min_new_tokens": NEW_TOKENS,
        "max_new_tokens": NEW_TOKENS,
    }
    return engine, [
        engine.task(inputs.contexts[at * N_DOCS : (at + 1) * N_DOCS], scores, **options)
        for at, scores in enumerate(inputs.doc_scores)
    ]


def device_share(shape_name: str, dtype_name: str, device: str, batch: int) -> DeviceShare:
    shape, dtype = SHAPES[shape_name], getattr(torch, dtype_name)
    engine, tasks = questions(shape_name, dtype_name, device, batch)
    lengths = [len(context) for task in tasks for context in task.contexts]
    prefill_s = median_time(lambda: engine.begin(tasks), device, 3)
    for _ in range(1 if device == "cpu" else 3):  # on CUDA a step is captured the second time
        running = []  # what ran before gives its tensors back
        running = engine.begin(tasks)
        steps: list[float] = []
        passes: list[float] = []
        with _decoder_timed(passes, device):
            while not running[0].finished:
                steps.append(timed(partial(engine.step, running), device))
    if isinstance(running[0], LaneDecoding):
        passes = [replayed_s(decoder_graph(running[0].lane))]
    bandwidth = memory_bandwidth(device)
    return DeviceShare(
        shape=shape_name,
        dtype=dtype_name,
        batch=batch,
        peak_flops=matrix_product_peak(dtype, device),
        prefill_flops=prefill_operations(shape, lengths) / prefill_s,
        bandwidth=bandwidth,
        decoder_s=statistics.median(passes),
        step_s=statistics.median(steps),
        floor_s=step_bytes(shape, lengths, dtype_name) / bandwidth,
    )


@contextmanager
def _decoder_timed(passes: list[float], device: str) -> Iterator[None]:
    """While it lasts, the seconds of each pass of the decoder are appended."""
    extend, logits = Bart.extend, Bart.logits

    def timed_extend(bart: Bart, *inputs: Any, **options: Any) -> Tensor:
        found: list[Tensor] = []
        passes.append(timed(lambda: found.append(extend(bart, *inputs, **options)), device))
        return found[0]

    def timed_logits(bart: Bart, hidden_RD: Tensor) -> Tensor:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return logits(bart, hidden_RD)
        found: list[Tensor] = []
        seconds = timed(lambda: found.append(logits(bart, hidden_RD)), device)
        if passes:
            passes[-1] += seconds
        return found[0]

    with patch.object(Bart, "extend", timed_extend), patch.object(Bart, "logits", timed_logits):
        yield


@torch.inference_mode()
def decoder_graph(lane: Lane) -> torch.cuda.CUDAGraph:
    """A lane's decoder and marginalisation half-way through an answer."""
    graph = torch.cuda.CUDAGraph()
    lane.scores(NEW_TOKENS // 2)
    with torch.cuda.graph(graph):
        lane.scores(NEW_TOKENS // 2)
    return graph


def replayed_s(graph: torch.cuda.CUDAGraph, times: int = 50) -> float:
    graph.replay()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    began.record()
    for _ in range(times):
        graph.replay()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended)) / times / 1000


def prefill_operations(shape: Shape, lengths: list[int]) -> float:
    """Multiplications and additions of the encoder and of the cross-attention's keys and values."""
    tokens = sum(lengths)
    projections = 2 * tokens * (4 * shape.width**2 + 2 * shape.width * shape.ffn)
    attention = sum(4 * length**2 * shape.width for length in lengths)
    cross = 2 * tokens * 2 * shape.width**2
    return float(shape.layers * (projections + attention + cross))


def step_bytes(shape: Shape, lengths: list[int], dtype: str) -> float:
    """What a decode step reads at least: the decoder's weights, the output matrix, and every document's cache once.

    The nodes of the token trees are counted at half their final number.
    """
    layer = 6 * shape.width**2 + 2 * shape.width * shape.ffn  # q, k, v, out; cross q, out; the feed-forward network
    weights = shape.layers * layer + shape.vocabulary * shape.width
    nodes = len(lengths) * BEAMS * NEW_TOKENS / 2
    caches = shape.layers * 2 * shape.width * (sum(lengths) + nodes)
    return float(weights * getattr(torch, dtype).itemsize + caches * states_dtype(dtype).itemsize)
