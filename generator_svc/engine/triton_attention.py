"""Attention of a decode step in Triton, for CUDA. ``kernels`` says what is computed, and launches these.

float32 is multiplied as float32; bfloat16 and float16 are summed in float32. Heads are padded to a power of two, rows
to the 16 that a product of tiles needs at least: each kernel waits for memory rather than for arithmetic.

Shapes: as there.
"""
# ruff: noqa: PLR0917, PT018, S101  (as in triton_kernels)

import torch
import triton
import triton.language as tl
from torch import Tensor

from generator_svc.engine.triton_kernels import LEAST_TILE
from generator_svc.engine.triton_launch import LINE_BYTES, chained, fetch, in_turn

KEY_BYTES = 16384  # of a tile of keys, and of one of values: two of each are on their way at a time
LOWEST = tl.constexpr(-1.0e38)  # below every score, and a number: what nothing is seen of must not become NaN


def attend_to_nodes(qkv_NK3HE: Tensor, nodes_2NHCE: Tensor, visible_PKC: Tensor, start: int) -> Tensor:
    assert qkv_NK3HE.is_contiguous() and nodes_2NHCE.is_contiguous()
    assert visible_PKC.stride(2) == 1
    documents, rows, _, heads, width = qkv_NK3HE.shape
    assert start + rows <= nodes_2NHCE.shape[3]
    out_NKHE = qkv_NK3HE.new_empty(documents, rows, heads, width)
    tile = max(LEAST_TILE, triton.next_power_of_2(width))
    with torch.cuda.device(qkv_NK3HE.get_device()):
        _attend_to_nodes[(documents, heads)](
            qkv_NK3HE,
            *nodes_2NHCE.unbind(),
            visible_PKC,
            out_NKHE,
            start,
            nodes_2NHCE.shape[3],
            documents // len(visible_PKC),
            visible_PKC.stride(0),
            visible_PKC.stride(1),
            width**-0.5,
            rows,
            H=heads,
            E=width,
            TILE_K=max(LEAST_TILE, triton.next_power_of_2(rows)),
            TILE_C=min(64, _keys_of_a_tile(tile, qkv_NK3HE.dtype)),
            TILE_E=tile,
            **chained(qkv_NK3HE),
            num_warps=4,
            num_stages=3,
        )
    return out_NKHE


@triton.jit(do_not_specialize=["start", "K"])
def _attend_to_nodes(
    qkv_NK3HE: tl.tensor,
    keys_NHCE: tl.tensor,
    values_NHCE: tl.tensor,
    visible_PKC: tl.tensor,
    out_NKHE: tl.tensor,
    start: tl.tensor,
    C: tl.tensor,
    documents_of_a_problem: tl.tensor,
    stride_p: tl.tensor,
    stride_k: tl.tensor,
    scale: tl.tensor,
    K: tl.tensor,
    H: tl.constexpr,
    E: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_E: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """A program a head of a document. It takes new nodes as they come, and reads no place that it writes."""
    in_turn(CHAINED)
    n, h = tl.program_id(0), tl.program_id(1)
    k, e, c = tl.arange(0, TILE_K), tl.arange(0, TILE_E), tl.arange(0, TILE_C)
    in_rows, in_head = k < K, e < E
    in_rows_and_head = in_rows[:, None] & in_head[None, :]
    place = (n.to(tl.int64) * H + h) * C * E

    # All of this is asked for before any of it is waited for.
    new = qkv_NK3HE + ((n * K + k) * (3 * H * E) + h * E)[:, None] + e[None, :]
    q = tl.load(new, in_rows_and_head, 0.0)
    new_keys = tl.load(new + H * E, in_rows_and_head, 0.0)
    new_values = tl.load(new + 2 * H * E, in_rows_and_head, 0.0)
    of_row = visible_PKC + (n // documents_of_a_problem) * stride_p + k[:, None] * stride_k
    seen_of_new = tl.load(of_row + start + k[None, :], in_rows[:, None] & in_rows[None, :], 0)

    largest = tl.full((TILE_K,), LOWEST, tl.float32)
    total = tl.zeros((TILE_K,), tl.float32)
    attended = tl.zeros((TILE_K, TILE_E), tl.float32)
    for first in tl.range(0, start, TILE_C):
        in_tile = first + c < start
        seen = tl.load(of_row + first + c[None, :], in_rows[:, None] & in_tile[None, :], 0)
        of_tile = place + (first + c)[:, None] * E + e[None, :]
        in_tile_and_head = in_tile[:, None] & in_head[None, :]
        keys = tl.load(keys_NHCE + of_tile, in_tile_and_head, 0.0)
        values = tl.load(values_NHCE + of_tile, in_tile_and_head, 0.0)
        largest, total, attended = _with_tile(q, keys, values, seen, scale, largest, total, attended)
    seen_of_new = seen_of_new | (k >= K)[:, None]  # rows that are padding: any number will do, but a number
    largest, total, attended = _with_tile(q, new_keys, new_values, seen_of_new, scale, largest, total, attended)

    kept = place + (start + k)[:, None] * E + e[None, :]
    tl.store(keys_NHCE + kept, new_keys, in_rows_and_head)
    tl.store(values_NHCE + kept, new_values, in_rows_and_head)
    out = out_NKHE + ((n * K + k) * (H * E) + h * E)[:, None] + e[None, :]
    tl.store(out, (attended / total[:, None]).to(q.dtype), in_rows_and_head)


def attend_to_source(q_NKHE: Tensor, cross_2NHSE: Tensor, lengths_N: Tensor) -> Tensor:
    assert q_NKHE.is_contiguous() and cross_2NHSE.is_contiguous()
    documents, rows, heads, width = q_NKHE.shape
    out_NKHE = torch.empty_like(q_NKHE)
    tile, line = max(LEAST_TILE, triton.next_power_of_2(width)), LINE_BYTES // q_NKHE.itemsize
    with torch.cuda.device(q_NKHE.get_device()):
        _attend_to_source[(documents, heads)](
            q_NKHE,
            *cross_2NHSE.unbind(),
            lengths_N,
            out_NKHE,
            cross_2NHSE.shape[3],
            width**-0.5,
            rows,
            H=heads,
            E=width,
            TILE_K=max(LEAST_TILE, triton.next_power_of_2(rows)),
            TILE_S=_keys_of_a_tile(tile, q_NKHE.dtype),
            TILE_E=tile,
            LINE=line,
            LINES=triton.next_power_of_2(triton.cdiv(width, line)),
            **chained(q_NKHE),
            num_warps=4,
            num_stages=3,
        )
    return out_NKHE


@triton.jit(do_not_specialize=["K"])
def _attend_to_source(
    q_NKHE: tl.tensor,
    keys_NHSE: tl.tensor,
    values_NHSE: tl.tensor,
    lengths_N: tl.tensor,
    out_NKHE: tl.tensor,
    S: tl.tensor,
    scale: tl.tensor,
    K: tl.tensor,
    H: tl.constexpr,
    E: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_E: tl.constexpr,
    LINE: tl.constexpr,
    LINES: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """A program a head of a document: its rows share what is read, which was there before the step began."""
    n, h = tl.program_id(0), tl.program_id(1)
    k, e, s = tl.arange(0, TILE_K), tl.arange(0, TILE_E), tl.arange(0, TILE_S)
    in_head = e < E
    in_rows_and_head = (k < K)[:, None] & in_head[None, :]
    place = (n.to(tl.int64) * H + h) * S * E
    if CHAINED:
        line = tl.arange(0, LINES) * LINE
        length = tl.load(lengths_N + n, cache_modifier=".cg")
        for first in tl.range(0, length, TILE_S, num_stages=1):
            in_tile = ((first + s) < length)[:, None] & (line < E)[None, :]
            of_tile = tl.where(in_tile, place + (first + s)[:, None] * E + line[None, :], place)
            fetch(keys_NHSE + of_tile)
            fetch(values_NHSE + of_tile)
    in_turn(CHAINED)
    length = tl.load(lengths_N + n)
    row = ((n * K + k) * (H * E) + h * E)[:, None] + e[None, :]
    q = tl.load(q_NKHE + row, in_rows_and_head, 0.0)
    largest = tl.full((TILE_K,), LOWEST, tl.float32)
    total = tl.zeros((TILE_K,), tl.float32)
    attended = tl.zeros((TILE_K, TILE_E), tl.float32)
    for first in tl.range(0, length, TILE_S):
        in_tile = first + s < length
        of_tile = place + (first + s)[:, None] * E + e[None, :]
        in_tile_and_head = in_tile[:, None] & in_head[None, :]
        keys = tl.load(keys_NHSE + of_tile, in_tile_and_head, 0.0)
        values = tl.load(values_NHSE + of_tile, in_tile_and_head, 0.0)
        largest, total, attended = _with_tile(q, keys, values, in_tile[None, :], scale, largest, total, attended)
    total = tl.where(length > 0, total, 1.0)
    tl.store(out_NKHE + row, (attended / total[:, None]).to(q.dtype), in_rows_and_head)


@triton.jit
def _with_tile(
    q_KE: tl.tensor,
    keys_CE: tl.tensor,
    values_CE: tl.tensor,
    seen: tl.tensor,
    scale: tl.tensor,
    largest_K: tl.tensor,
    total_K: tl.tensor,
    attended_KE: tl.tensor,
) -> tl.tensor:
    """The softmax so far, with more keys: the largest score, the sum of weights relative to it, that of values."""
    scores_KC = tl.dot(q_KE, tl.trans(keys_CE), input_precision="ieee") * scale
    scores_KC = tl.where(seen, scores_KC, float("-inf"))
    new_largest_K = tl.maximum(largest_K, tl.max(scores_KC, 1))
    weights_KC = tl.exp(scores_KC - new_largest_K[:, None])
    shrunk_K = tl.exp(largest_K - new_largest_K)
    total_K = total_K * shrunk_K + tl.sum(weights_KC, 1)
    more_KE = tl.dot(weights_KC.to(values_CE.dtype), values_CE, input_precision="ieee")
    return new_largest_K, total_K, attended_KE * shrunk_K[:, None] + more_KE


def _keys_of_a_tile(width: int, dtype: torch.dtype) -> int:
    return max(LEAST_TILE, min(128, KEY_BYTES // (width * dtype.itemsize)))
