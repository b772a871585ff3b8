"""What a decode step does, each in one pass over memory.

Every function here is plain torch, and says by that what is computed. For CUDA tensors a Triton kernel of the same name
does it, where Triton works: in :mod:`generator_svc.engine.triton_kernels` what is done row by row, in
:mod:`generator_svc.engine.triton_attention` attention, in :mod:`generator_svc.engine.triton_products` matrix products,
where they are faster than torch's, and in :mod:`generator_svc.engine.triton_search` what the search does. Nothing is
read back, so that all of it may be captured in a CUDA graph, once it has run before with tensors of the same form.

Shapes: R packed rows, D model, V vocabulary, L positions, I numbers that a product takes and O that it gives,
P problems, Q questions, N documents, K rows of each, H heads, E head, C node positions, S source positions; in the
search K beams and C continuations.
"""

import importlib
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import structlog
import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, layer_norm, linear, scaled_dot_product_attention

from generator_svc.engine.beams import Beams, Continuations, Rules, chosen
from generator_svc.engine.trials import ROWS, is_better

log = structlog.get_logger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)

MOST_ROWS = 32  # of a document or a problem that one program takes
MOST_TILE_BYTES = 8192  # of a document's rows of a head: with its keys they take 90 KiB, of 99 that some GPUs have

NormWeights = tuple[Tensor, Tensor, float]
"""Of a layer normalisation: (D,) weight, (D,) bias, and what is added to the variance."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


@cache
def usable(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device. The first call compiles one: not while a graph is captured."""
    if device.type != "cuda":
        return False
    try:
        compiled: Any = importlib.import_module("generator_svc.engine.triton_kernels")
        x_RD, weight_D = torch.ones(1, 16, device=device), torch.ones(16, device=device)
        torch.testing.assert_close(compiled.add_norm(x_RD, x_RD, (weight_D, weight_D, 1e-5))[0], weight_D)
    except Exception as error:  # noqa: BLE001  whatever it is, torch's own kernels do the same
        log.warning(
            "triton_unusable",
            error=f"{type(error).__name__}: {error}",
            advice="install triton and a C compiler (gcc), and let ~/.triton be written; until then torch's own "
            "kernels are used, which are slower",
        )
        return False
    return True


def _is_float(of_rows: Tensor, *_: Any) -> bool:
    return of_rows.dtype in DTYPES


def _few_rows(of_documents: Tensor, *_: Any) -> bool:
    """Whether a document's (rows of) heads fit the registers and the shared memory that one program has."""
    rows, width = of_documents.shape[1], of_documents.shape[-1]
    tile_bytes = (1 << (rows - 1).bit_length()) * (1 << (width - 1).bit_length()) * of_documents.itemsize
    return _is_float(of_documents) and rows <= MOST_ROWS and width <= 128 and tile_bytes <= MOST_TILE_BYTES


def _few_in_half(x_RI: Tensor, *_: Any) -> bool:
    """Whether a product waits for its weights, and multiplies halves: float32 is left to torch."""
    return x_RI.dtype in HALVES and 0 < len(x_RI) <= ROWS[-1] and x_RI.stride(1) == 1


def _few_continuations(scores_PKV: Tensor, _: Tensor, count: int) -> bool:
    return scores_PKV.dtype == torch.float32 and scores_PKV.shape[1] <= MOST_ROWS and count <= 2 * MOST_ROWS


def _few_beams(beams: Beams, found: Continuations, *_: Any) -> bool:
    return beams.open_scores.shape[1] <= MOST_ROWS and found.scores.shape[1] <= 2 * MOST_ROWS


def _by_triton(
    fits: Callable[..., bool], module: str = "triton_kernels", *, tried: bool = False
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Leaves the work to the Triton kernel of the same name where the arguments allow it.

    Args:
        tried: whether it must be faster as well, which depends on the GPU.
    """

    def either(reference: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(reference)
        def by_device(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            first: Any = args[0]
            device = (first if isinstance(first, Tensor) else first[0]).device
            if device.type == "cuda" and fits(*args, **kwargs) and usable(device):
                compiled = importlib.import_module(f"generator_svc.engine.{module}")
                ours: Callable[_P, _R] = getattr(compiled, reference.__name__)
                if not tried or is_better(ours, reference, args):
                    return ours(*args, **kwargs)
            return reference(*args, **kwargs)

        return by_device

    return either


@_by_triton(_is_float)
def embed(
    words_VD: Tensor, tokens_R: Tensor, positions_LD: Tensor, depths_R: Tensor, norm: NormWeights, *, scale: float
) -> Tensor:
    """The sums of words' (scaled) and positions' embeddings, normalised, (R, D)."""
    words_RD = embedding(tokens_R, words_VD)
    words_RD = words_RD if scale == 1.0 else words_RD * scale
    return _normalized(words_RD + embedding(depths_R, positions_LD), norm)


@_by_triton(_few_in_half, "triton_products", tried=True)
def affine(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor, with_gelu: bool) -> Tensor:
    """``x @ weight.T + bias``, (R, O), and the exact GELU of it."""
    product_RO = linear(x_RI, weight_OI, bias_O)
    return gelu(product_RO) if with_gelu else product_RO


@_by_triton(_few_in_half, "triton_products", tried=True)
def affine_norm(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor, residual_RO: Tensor, norm: NormWeights) -> Tensor:
    """Layer normalisation of ``x @ weight.T + bias + residual``, (R, O)."""
    return add_norm(linear(x_RI, weight_OI, bias_O), residual_RO, norm)


@_by_triton(_is_float)
def add_norm(x_RD: Tensor, residual_RD: Tensor, norm: NormWeights) -> Tensor:
    """Layer normalisation of a sum, (R, D): the sum in its own dtype, its normalisation in float32."""
    return _normalized(x_RD + residual_RD, norm)


def _normalized(x_RD: Tensor, norm: NormWeights) -> Tensor:
    weight_D, bias_D, eps = norm
    return layer_norm(x_RD, weight_D.shape, weight_D, bias_D, eps)


@_by_triton(_few_rows, "triton_attention")
def attend_to_nodes(qkv_NK3HE: Tensor, nodes_2NHCE: Tensor, visible_PKC: Tensor, start: int) -> Tensor:
    """Self-attention over trees of nodes, (N, K, H, E), after new keys and values were put into ``start:start + K``.

    Args:
        nodes_2NHCE: keys and values, contiguous.
        visible_PKC: bool, which of the nodes before ``start + K`` a row attends to: itself at least. N // P
            neighbouring documents have the same.
    """
    rows, end = qkv_NK3HE.shape[1], start + qkv_NK3HE.shape[1]
    nodes_2NHCE[:, :, :, start:end] = qkv_NK3HE[:, :, 1:].permute(2, 0, 3, 1, 4)
    visible_N1KC = visible_PKC[:, None, None, :rows, :end].expand(-1, len(qkv_NK3HE) // len(visible_PKC), 1, -1, -1)
    q_NHKE, (keys_NHCE, values_NHCE) = qkv_NK3HE[:, :, 0].transpose(1, 2), nodes_2NHCE[:, :, :, :end]
    mask = visible_N1KC.flatten(0, 1)
    return scaled_dot_product_attention(q_NHKE, keys_NHCE, values_NHCE, attn_mask=mask).transpose(1, 2)


@_by_triton(_few_rows, "triton_attention")
def attend_to_source(q_NKHE: Tensor, cross_2NHSE: Tensor, lengths_N: Tensor) -> Tensor:
    """Cross-attention, (N, K, H, E), to the first positions of each document, ``lengths_N`` (int32) of them.

    Args:
        cross_2NHSE: keys and values, contiguous.

    Returns: zeros for a document of length 0.
    """
    positions_S = torch.arange(cross_2NHSE.shape[3], device=lengths_N.device)
    is_empty_N111 = (lengths_N == 0)[:, None, None, None]
    mask = (positions_S < lengths_N[:, None, None, None]) | is_empty_N111  # a row that sees nothing may become NaN
    keys_NHSE, values_NHSE = cross_2NHSE
    attended_NHKE = scaled_dot_product_attention(q_NKHE.transpose(1, 2), keys_NHSE, values_NHSE, attn_mask=mask)
    return attended_NHKE.masked_fill(is_empty_N111, 0.0).transpose(1, 2)


@_by_triton(_is_float)
def log_normalizer(logits_RV: Tensor, log_prior_N: Tensor | None = None) -> Tensor:
    """log Σ_v exp(logits), (R,) float32, less the log prior of a row's document, where R // N neighbours are of one.

    Rows may lie apart, as those of a wider tensor do.
    """
    normalizer_R = logits_RV.float().logsumexp(-1)
    if log_prior_N is None:
        return normalizer_R
    return (normalizer_R.view(len(log_prior_N), -1) - log_prior_N[:, None]).flatten()


@_by_triton(_is_float)
def marginalize(logits_QNKV: Tensor, normalizer_QNK: Tensor) -> Tensor:
    """log Σ_n exp(logits - normalizer), (Q, K, V) float32. Rows of logits may lie apart, as those of a wider tensor do.

    With the (float32) normaliser less log p(z|x), this is RAG-Token's log p(y_t | x, y_<t).
    """
    return (logits_QNKV.float() - normalizer_QNK[..., None]).logsumexp(1)


@_by_triton(_few_continuations, "triton_search")
def best_continuations(scores_PKV: Tensor, beam_scores_PK: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best sums of a beam's score and a token's, best first: (P, count) scores, rows and tokens."""
    totals_PKV = scores_PKV + beam_scores_PK[:, :, None]
    scores, places = totals_PKV.flatten(1).topk(count)
    vocabulary = scores_PKV.shape[2]
    return scores, places // vocabulary, places % vocabulary


@_by_triton(_few_beams, "triton_search")
def keep_beams(beams: Beams, found: Continuations, alive_P: Tensor, length: int, rules: Rules) -> Tensor:
    """:func:`generator_svc.engine.beams.chosen` in place. A problem that is not alive stays as it is.

    Args:
        alive_P: bool; a problem that does not go on leaves it.

    Returns: (P, K) the row that each beam continues.
    """
    after, parents_PK, goes_on_P = chosen(beams, found, length, rules)
    for kept, new in zip(beams, after, strict=True):
        kept.copy_(torch.where(alive_P.view(-1, *[1] * (kept.dim() - 1)), new, kept))
    alive_P &= goes_on_P
    return parents_PK
