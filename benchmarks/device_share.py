"""How much of the device our engine uses: prefill against its arithmetic, a decode step against its memory.

Prefill multiplies large matrices, so its bound is the fastest matrix product that the device was seen to do. A decode
step reads every weight for a handful of rows, so its bound is the time in which that much can be read.
"""

import statistics
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.machine import matrix_product_peak, median_time, memory_bandwidth, timed
from benchmarks.models import SHAPES, Shape, random_inputs, random_rag
from benchmarks.sides import N_DOCS, NEW_TOKENS, engine_of
from generator_svc.engine.decoder import Bart

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


def device_share(shape_name: str, dtype_name: str, device: str, batch: int) -> DeviceShare:
    shape, dtype = SHAPES[shape_name], getattr(torch, dtype_name)
    engine = engine_of(random_rag(shape, dtype, device), device)
    inputs = random_inputs(shape, batch, N_DOCS, device)
    lengths = [len(context) for context in inputs.contexts]
    options: dict[str, Any] = {
        "strategy": "token",
        "num_beams": BEAMS,
        "min_new_tokens": NEW_TOKENS,
        "max_new_tokens": NEW_TOKENS,
    }
    tasks = [
        engine.task(inputs.contexts[at * N_DOCS : (at + 1) * N_DOCS], scores, **options)
        for at, scores in enumerate(inputs.doc_scores)
    ]
    prefill_s = median_time(lambda: engine.begin(tasks), device, 3)
    running = engine.begin(tasks)
    steps, passes = [], []
    ordinary = Bart.next_logits

    def next_logits(bart: Bart, *inputs: Any) -> Tensor:
        found: list[Tensor] = []
        passes.append(timed(lambda: found.append(ordinary(bart, *inputs)), device))
        return found[0]

    with patch.object(Bart, "next_logits", next_logits):
        while not running[0].finished:
            steps.append(timed(lambda: engine.step(running), device))
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
        floor_s=step_bytes(shape, lengths, dtype.itemsize) / bandwidth,
    )


def prefill_operations(shape: Shape, lengths: list[int]) -> float:
    """Multiplications and additions of the encoder and of the cross-attention's keys and values."""
    tokens = sum(lengths)
    projections = 2 * tokens * (4 * shape.width**2 + 2 * shape.width * shape.ffn)
    attention = sum(4 * length**2 * shape.width for length in lengths)
    cross = 2 * tokens * 2 * shape.width**2
    return float(shape.layers * (projections + attention + cross))


def step_bytes(shape: Shape, lengths: list[int], itemsize: int) -> float:
    """What a decode step reads at least: the decoder's weights, the output matrix, and every document's cache once.

    The nodes of the token trees are counted at half their final number.
    """
    layer = 6 * shape.width**2 + 2 * shape.width * shape.ffn  # q, k, v, out; cross q, out; the feed-forward network
    weights = shape.layers * layer + shape.vocabulary * shape.width
    nodes = len(lengths) * BEAMS * NEW_TOKENS / 2
    caches = shape.layers * 2 * shape.width * (sum(lengths) + nodes)
    return (weights + caches) * itemsize
