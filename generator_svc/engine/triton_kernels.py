"""What a decode step does row by row, in Triton, for CUDA: embedding, layer normalisation and the heads.

Sums are in float32. ``kernels`` says what is computed, and launches these.

Shapes: as there.
"""
# ruff: noqa: PLR0917, PT018, S101  (kernels take what they need one by one; the callers are ours)

import torch
import triton
import triton.language as tl
from torch import Tensor

from generator_svc.engine.kernels import NormWeights
from generator_svc.engine.triton_launch import chained, in_turn

LEAST_TILE = 16  # what tl.dot takes
VECTOR = 16  # of numbers: Triton looks for multiples of it
CHUNK = 4096  # logits that a program holds: enough programs for a few rows, enough loads in flight in each


def embed(
    words_VD: Tensor, tokens_R: Tensor, positions_LD: Tensor, depths_R: Tensor, norm: NormWeights, *, scale: float
) -> Tensor:
    assert words_VD.is_contiguous() and positions_LD.is_contiguous()
    rows, width = len(tokens_R), words_VD.shape[1]
    out_RD = words_VD.new_empty(rows, width)
    tile = triton.next_power_of_2(width)
    with torch.cuda.device(words_VD.get_device()):
        _embed[(rows,)](
            words_VD,
            tokens_R,
            tokens_R.stride(0),
            positions_LD,
            depths_R,
            depths_R.stride(0),
            scale,
            *norm,
            out_RD,
            D=width,
            TILE=tile,
            **chained(words_VD),
            num_warps=4 if tile <= 2048 else 8,
        )
    return out_RD


@triton.jit(do_not_specialize=["token_stride", "depth_stride"])
def _embed(
    words_VD: tl.tensor,
    tokens_R: tl.tensor,
    token_stride: tl.tensor,
    positions_LD: tl.tensor,
    depths_R: tl.tensor,
    depth_stride: tl.tensor,
    scale: tl.tensor,
    weight_D: tl.tensor,
    bias_D: tl.tensor,
    eps: tl.tensor,
    out_RD: tl.tensor,
    D: tl.constexpr,
    TILE: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """A program a row."""
    in_turn(CHAINED)
    at = tl.arange(0, TILE)
    there = at < D
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_R + row * token_stride).to(tl.int64)
    depth = tl.load(depths_R + row * depth_stride).to(tl.int64)
    words = tl.load(words_VD + token * D + at, there, 0.0)
    words = (words.to(tl.float32) * scale).to(words.dtype)  # as torch rounds what comes between
    places = tl.load(positions_LD + depth * D + at, there, 0.0)
    total = (words.to(tl.float32) + places.to(tl.float32)).to(words.dtype).to(tl.float32)
    normal = _normal(total, there, weight_D + at, bias_D + at, eps, D)
    tl.store(out_RD + row * D + at, normal.to(words.dtype), there)


@triton.jit
def _normal(
    x: tl.tensor, there: tl.tensor, weight: tl.tensor, bias: tl.tensor, eps: tl.tensor, D: tl.constexpr
) -> tl.tensor:
    """A row of D numbers, normalised."""
    centred = tl.where(there, x - tl.sum(x, 0) / D, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    return centred * scale * tl.load(weight, there, 0.0).to(tl.float32) + tl.load(bias, there, 0.0).to(tl.float32)


def add_norm(x_RD: Tensor, residual_RD: Tensor, norm: NormWeights) -> Tensor:
    return normalized(x_RD[None], None, residual_RD, norm)


def normalized(parts_SRD: Tensor, added_D: Tensor | None, residual_RD: Tensor, norm: NormWeights) -> Tensor:
    """Of the sum of all parts, what is added to each row, and the residual."""
    assert parts_SRD.is_contiguous() and residual_RD.is_contiguous()
    parts, rows, width = parts_SRD.shape
    out_RD = torch.empty_like(residual_RD)
    tile = triton.next_power_of_2(width)
    with torch.cuda.device(parts_SRD.get_device()):
        _add_norm[(rows,)](
            parts_SRD,
            residual_RD if added_D is None else added_D,
            residual_RD,
            *norm,
            out_RD,
            PARTS=parts,
            IS_ADDED=added_D is not None,
            D=width,
            TILE=tile,
            **chained(parts_SRD),
            num_warps=4 if tile <= 2048 else 8,
        )
    return out_RD


@triton.jit
def _add_norm(
    parts_SRD: tl.tensor,
    added_D: tl.tensor,
    residual_RD: tl.tensor,
    weight_D: tl.tensor,
    bias_D: tl.tensor,
    eps: tl.tensor,
    out_RD: tl.tensor,
    PARTS: tl.constexpr,
    IS_ADDED: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """A program a row."""
    in_turn(CHAINED)
    at = tl.arange(0, TILE)
    there = at < D
    row = tl.program_id(0).to(tl.int64) * D
    residual = tl.load(residual_RD + row + at, there, 0.0)
    x = tl.zeros((TILE,), tl.float32)
    for part in tl.static_range(PARTS):
        x += tl.load(parts_SRD + part * tl.num_programs(0) * D + row + at, there, 0.0).to(tl.float32)
    if IS_ADDED:
        x += tl.load(added_D + at, there, 0.0).to(tl.float32)
    x = x.to(residual.dtype).to(tl.float32)  # as torch rounds a product …
    total = (x + residual.to(tl.float32)).to(residual.dtype).to(tl.float32)  # … and a sum
    normal = _normal(total, there, weight_D + at, bias_D + at, eps, D)
    tl.store(out_RD + row + at, normal.to(residual.dtype), there)


def log_normalizer(logits_RV: Tensor, log_prior_N: Tensor | None = None) -> Tensor:
    assert logits_RV.stride(1) == 1
    rows, vocabulary = logits_RV.shape
    chunks = triton.cdiv(vocabulary, CHUNK)
    of_chunks_RC = torch.empty(rows, chunks, dtype=torch.float32, device=logits_RV.device)
    out_R = torch.empty(rows, dtype=torch.float32, device=logits_RV.device)
    prior, of_document = (out_R, rows) if log_prior_N is None else (log_prior_N, rows // len(log_prior_N))
    assert prior.is_contiguous()
    with torch.cuda.device(logits_RV.get_device()):
        _log_sum[(rows, chunks)](
            logits_RV,
            of_chunks_RC,
            logits_RV.stride(0),
            _readable(logits_RV),
            vocabulary,
            TILE=CHUNK,
            **chained(logits_RV),
            num_warps=4,
        )
        _log_sum_of_chunks[(rows,)](
            of_chunks_RC,
            prior,
            out_R,
            of_document,
            chunks,
            IS_LESS=log_prior_N is not None,
            TILE=triton.next_power_of_2(chunks),
            **chained(logits_RV),
            num_warps=1,
        )
    return out_R


@triton.jit
def _log_sum(
    x_RV: tl.tensor,
    out_RC: tl.tensor,
    stride: tl.tensor,
    readable: tl.tensor,
    V: tl.tensor,
    TILE: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """A program a tile of a row."""
    in_turn(CHAINED)
    r, tile = tl.program_id(0), tl.program_id(1)
    v = tile * TILE + tl.arange(0, TILE)
    x = tl.load(x_RV + r.to(tl.int64) * stride + v, v < readable, 0.0).to(tl.float32)
    tl.store(out_RC + r * tl.num_programs(1) + tile, _log_sum_of(tl.where(v < V, x, float("-inf"))))


@triton.jit(do_not_specialize=["of_document"])
def _log_sum_of_chunks(
    x_RC: tl.tensor,
    log_prior_N: tl.tensor,
    out_R: tl.tensor,
    of_document: tl.tensor,
    C: tl.tensor,
    IS_LESS: tl.constexpr,
    TILE: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """A program a row."""
    in_turn(CHAINED)
    r, c = tl.program_id(0), tl.arange(0, TILE)
    total = _log_sum_of(tl.load(x_RC + r * C + c, c < C, float("-inf")))
    if IS_LESS:
        total -= tl.load(log_prior_N + r // of_document)
    tl.store(out_R + r, total)


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


def marginalize(logits_QNKV: Tensor, normalizer_QNK: Tensor) -> Tensor:
    assert logits_QNKV.stride(3) == 1 and normalizer_QNK.is_contiguous()
    questions, documents, rows, vocabulary = logits_QNKV.shape
    out_QKV = torch.empty(questions, rows, vocabulary, dtype=torch.float32, device=logits_QNKV.device)
    tile = triton.next_power_of_2(documents)
    of_vocabulary = max(LEAST_TILE, CHUNK // tile)
    with torch.cuda.device(logits_QNKV.get_device()):
        _marginalize[(questions * rows, triton.cdiv(vocabulary, of_vocabulary))](
            logits_QNKV,
            normalizer_QNK,
            out_QKV,
            *logits_QNKV.stride()[:3],
            _readable(logits_QNKV),
            vocabulary,
            documents,
            rows,
            TILE_N=tile,
            TILE_V=of_vocabulary,
            **chained(logits_QNKV),
            num_warps=4,
        )
    return out_QKV


@triton.jit(do_not_specialize=["N", "K"])
def _marginalize(
    logits_QNKV: tl.tensor,
    normalizer_QNK: tl.tensor,
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
    CHAINED: tl.constexpr,
) -> None:
    """A program a piece of a row of a question, with all documents' logits of it."""
    in_turn(CHAINED)
    q, k = tl.program_id(0) // K, tl.program_id(0) % K
    n, v = tl.arange(0, TILE_N), tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    in_documents = n < N
    at = q.to(tl.int64) * stride_q + n[:, None] * stride_n + k * stride_k + v[None, :]
    logits = tl.load(logits_QNKV + at, in_documents[:, None] & (v < readable)[None, :], 0.0).to(tl.float32)
    normalizer = tl.load(normalizer_QNK + (q * N + n) * K + k, in_documents, float("inf"))
    summed = _log_sum_of(logits - normalizer[:, None])
    tl.store(out_QKV + tl.program_id(0).to(tl.int64) * V + v, summed, v < V)
