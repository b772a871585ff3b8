"""The two heads of RAG: how documents' distributions become one, and how candidates are ranked.

Shapes: N documents, K rows, R rows, V vocabulary, C candidates, T target tokens without the start token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from generator_svc.engine import kernels


def marginalize(logits_NKV: Tensor, log_prior_N: Tensor) -> tuple[Tensor, Tensor]:
    """RAG-Token: log Σ_z p(z|x) p(y_t | x, z, y_<t), (K, V) float32, and the logarithms of its terms, (N, K, V).

    Source: Lewis et al. 2020, §2.1; ``RagTokenForGeneration.marginalize``.
    """
    terms_NKV = logits_NKV.log_softmax(-1).add_(log_prior_N[:, None, None])
    # `logsumexp` of torch goes over the terms seven times, `log_softmax` once: what it takes from each term is the sum
    # that is looked for, with the least rounding where the term is the largest. No term at all: -inf.
    total_KV = terms_NKV.amax(0).sub_(terms_NKV.log_softmax(0).amax(0))
    return total_KV.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), terms_NKV


def log_probs_of(logits_RV: Tensor, rows_X: Tensor, tokens_X: Tensor) -> Tensor:
    """log p of each token after its row, (X,) float32."""
    if logits_RV.is_cuda:
        return logits_RV[rows_X, tokens_X].float() - kernels.log_normalizer(logits_RV)[rows_X]
    return logits_RV.log_softmax(-1, dtype=torch.float32)[rows_X, tokens_X]


def document_log_probs(logits_RV: Tensor) -> Tensor:
    """RAG-Sequence: log p(y_t | x, z, y_<t), (R, V)."""
    return logits_RV.log_softmax(-1)


def unique_rows(rows: Sequence[Tensor]) -> list[Tensor]:
    """The different rows, in the order of their first occurrence."""
    return list({tuple(row.tolist()): row for row in rows}.values())


def without_padding(row: Tensor, eos_token_ids: Sequence[int], pad_token_id: int) -> Tensor:
    """A sequence up to its first end-of-sequence token; where it has none, up to the padding behind it.

    The start token may well be an end-of-sequence token, as in BART: it is not looked at. Two tokens are left at least.
    """
    tokens = row.tolist()
    end = next((at + 1 for at, token in enumerate(tokens) if at and token in eos_token_ids), None)
    if end is None:
        end = len(tokens)
        while end > 2 and tokens[end - 1] == pad_token_id:
            end -= 1
    return row[:end]


def rank_scores(
    log_probs_CNT: Tensor, labels_CT: Tensor, log_prior_N: Tensor, bos_token_id: int | None, pad_token_id: int
) -> Tensor:
    """The score by which thorough decoding orders one question's candidates, (C,).

    It is log p(y|x) but for two habits of `RagSequenceForGeneration.get_nll`, kept so that the order is the same: a
    beginning-of-sequence token that opens all the candidates does not count, and padding ids never do. A third one is
    put right: transformers adds the document's prior at the second token, so that an answer of one token goes without.
    """
    opens_with_bos = bos_token_id is not None and bool((labels_CT[:, 0] == bos_token_id).all())
    counted_CNT = log_probs_CNT.masked_fill((labels_CT == pad_token_id).unsqueeze(1), 0.0)[:, :, int(opens_with_bos) :]
    return (counted_CNT.sum(dim=2) + log_prior_N).logsumexp(dim=1)


def bos_of(config: object) -> int | None:
    """The beginning-of-sequence token that `get_nll` looks for."""
    generator = getattr(config, "generator", None)
    bos: int | None = getattr(config, "bos_token_id", None) or getattr(generator, "bos_token_id", None)
    return bos


def padded(rows: Sequence[Tensor], pad: float) -> Tensor:
    """Rows of different lengths as one (C, T, …)."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad)
