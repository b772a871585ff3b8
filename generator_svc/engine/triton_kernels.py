"""The functions of :mod:`generator_svc.engine.kernels` in Triton, for CUDA. Only that module imports this one.

float32 is multiplied as float32; bfloat16 and float16 are summed in float32. Heads are padded to a power of two, rows
to the 16 that a product of tiles needs at least. Each kernel waits for memory rather than for arithmetic, so that
padding costs nothing that counts.

Shapes: as there.
"""
# ruff: noqa: PLR0917, PT018, S101  (kernels take what they need one by one; the callers are ours)

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_TILE = 16  # what tl.dot takes
KEY_BYTES = 16384  # of a tile of keys, and of one of values: two of each are on their way at a time
LOWEST = tl.constexpr(-1.0e38)  # below every score, and a number: what nothing is seen of must not become NaN
VECTOR = 16  # of numbers: Triton looks for multiples of it
CHUNK = 4096  # logits that a program holds: enough programs for a few rows, enough loads in flight in each


def add_norm(x_RD: Tensor, residual_RD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    assert x_RD.is_contiguous() and residual_RD.is_contiguous()
    rows, width = x_RD.shape
    out_RD = torch.empty_like(x_RD)
    tile = triton.next_power_of_2(width)
    with torch.cuda.device(x_RD.get_device()):
        _add_norm[(rows,)](
            x_RD, residual_RD, weight_D, bias_D, out_RD, eps, D=width, TILE=tile, num_warps=4 if tile <= 2048 else 8
        )
    return out_RD


@triton.jit
def _add_norm(
    x_RD: tl.tensor,
    residual_RD: tl.tensor,
    weight_D: tl.tensor,
    bias_D: tl.tensor,
    out_RD: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A program a row."""
    at = tl.arange(0, TILE)
    there = at < D
    row = tl.program_id(0).to(tl.int64) * D
    weight = tl.load(weight_D + at, there, 0.0).to(tl.float32)
    bias = tl.load(bias_D + at, there, 0.0).to(tl.float32)
    x = tl.load(x_RD + row + at, there, 0.0)
    total = x.to(tl.float32) + tl.load(residual_RD + row + at, there, 0.0).to(tl.float32)
    total = total.to(x.dtype).to(tl.float32)  # as torch rounds a sum
    centred = tl.where(there, total - tl.sum(total, 0) / D, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    tl.store(out_RD + row + at, (centred * scale * weight + bias).to(x.dtype), there)


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
) -> None:
    """A program a head of a document. It takes new nodes as they come, and reads no place that it writes."""
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
    tile = max(LEAST_TILE, triton.next_power_of_2(width))
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
) -> None:
    """A program a head of a document: its rows share what is read."""
    n, h = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths_N + n)
    k, e, s = tl.arange(0, TILE_K), tl.arange(0, TILE_E), tl.arange(0, TILE_S)
    in_head = e < E
    in_rows_and_head = (k < K)[:, None] & in_head[None, :]
    place = (n.to(tl.int64) * H + h) * S * E
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


def log_normalizer(logits_RV: Tensor) -> Tensor:
    assert logits_RV.stride(1) == 1
    rows, vocabulary = logits_RV.shape
    chunks = triton.cdiv(vocabulary, CHUNK)
    of_chunks_RC = torch.empty(rows, chunks, dtype=torch.float32, device=logits_RV.device)
    out_R = torch.empty(rows, dtype=torch.float32, device=logits_RV.device)
    tile = triton.next_power_of_2(chunks)
    with torch.cuda.device(logits_RV.get_device()):
        _log_sum[(rows, chunks)](
            logits_RV, of_chunks_RC, logits_RV.stride(0), _readable(logits_RV), vocabulary, TILE=CHUNK, num_warps=4
        )
        _log_sum[(rows, 1)](of_chunks_RC, out_R, chunks, chunks, chunks, TILE=tile, num_warps=1)
    return out_R


@triton.jit
def _log_sum(
    x_RV: tl.tensor, out_RC: tl.tensor, stride: tl.tensor, readable: tl.tensor, V: tl.tensor, TILE: tl.constexpr
) -> None:
    """A program a tile of a row."""
    r, tile = tl.program_id(0), tl.program_id(1)
    v = tile * TILE + tl.arange(0, TILE)
    x = tl.load(x_RV + r.to(tl.int64) * stride + v, v < readable, 0.0).to(tl.float32)
    tl.store(out_RC + r * tl.num_programs(1) + tile, _log_sum_of(tl.where(v < V, x, float("-inf"))))


@triton.jit
def _log_sum_of(x: tl.tensor) -> tl.tensor:
    """log Σ exp(x) along the first axis; -inf where all of it is."""
    largest = tl.max(x, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    return largest + tl.log(tl.sum(tl.exp(x - largest), 0))


def _readable(logits: Tensor) -> int:
    """How many numbers of a row may be read: V, or what a wider tensor holds from there to the next vector's end.

    A row whose end is none of a vector's is read a number at a time, as Triton masks it.
    """
    vocabulary = logits.shape[-1]
    wider = -(-vocabulary // VECTOR) * VECTOR
    apart = min(
        (step for step, size in zip(logits.stride()[:-1], logits.shape[:-1], strict=True) if size > 1), default=0
    )
    return wider if apart >= wider and logits.storage_offset() % apart == 0 else vocabulary


def marginalize(logits_QNKV: Tensor, shift_QNK: Tensor) -> Tensor:
    assert logits_QNKV.stride(3) == 1 and shift_QNK.is_contiguous()
    questions, documents, rows, vocabulary = logits_QNKV.shape
    out_QKV = torch.empty(questions, rows, vocabulary, dtype=torch.float32, device=logits_QNKV.device)
    tile = triton.next_power_of_2(documents)
    of_vocabulary = max(LEAST_TILE, CHUNK // tile)
    with torch.cuda.device(logits_QNKV.get_device()):
        _marginalize[(questions * rows, triton.cdiv(vocabulary, of_vocabulary))](
            logits_QNKV,
            shift_QNK,
            out_QKV,
            *logits_QNKV.stride()[:3],
            _readable(logits_QNKV),
            vocabulary,
            documents,
            rows,
            TILE_N=tile,
            TILE_V=of_vocabulary,
            num_warps=4,
        )
    return out_QKV


@triton.jit(do_not_specialize=["N", "K"])
def _marginalize(
    logits_QNKV: tl.tensor,
    shift_QNK: tl.tensor,
    out_QKV: tl.tensor,
    stride_q: tl.tensor,
    stride_n: tl.tensor,
    stride_k: tl.tensor,
    readable: tl.tensor,
    V: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    TILE_N: tl.constexpr,
    TILE_V: tl.constexpr,
) -> None:
    """A program a piece of a row of a question, with all documents' logits of it."""
    q, k = tl.program_id(0) // K, tl.program_id(0) % K
    n, v = tl.arange(0, TILE_N), tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    in_documents = n < N
    at = q.to(tl.int64) * stride_q + n[:, None] * stride_n + k * stride_k + v[None, :]
    logits = tl.load(logits_QNKV + at, in_documents[:, None] & (v < readable)[None, :], 0.0).to(tl.float32)
    shift = tl.load(shift_QNK + (q * N + n) * K + k, in_documents, float("-inf"))
    summed = _log_sum_of(logits + shift[:, None])
    tl.store(out_QKV + tl.program_id(0).to(tl.int64) * V + v, summed, v < V)
