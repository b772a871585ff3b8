r"""How probable an answer is, document by document and token by token, and what that says about the documents.

The decoder gives log p(y_t | x, z, y_<t) for every token and every document. From these, in float32:

- RAG-Token      log p(y|x) = Σ_t log Σ_z p(z|x) p(y_t | x, z, y_<t)      (Lewis et al. 2020, §2.1)
- RAG-Sequence   log p(y|x) = log Σ_z p(z|x) Π_t p(y_t | x, z, y_<t)
- posterior      p(z|x,y) ∝ p(z|x) Π_t p(y_t | x, z, y_<t)

p(z|x) is the softmax of the document scores over the N documents given. Stopped after token i the last formula gives
the running posterior p(z|x,y_≤i). By the chain rule each token has its own share of log p(y|x): for RAG-Token the term
of the sum, for RAG-Sequence log Σ_z p(z|x,y_<i) p(y_i | x, z, y_<i).

The posterior is Bayes' rule for RAG-Sequence. RAG-Token draws a document anew for each token, so that no single z
stands behind an answer there; the same formula then says which document would explain the whole answer by itself,
and is what makes the two heads comparable.

y is every token after the decoder's start token up to and including the first end-of-sequence token, or all of them
where there is none. Two tokens can be forced in generation, whatever the model says:

- ``forced_bos_token_id`` is part of the checkpoint: it always comes first, with probability one, and is left out.
- ``forced_eos_token_id`` comes only when the length limit cuts an answer off. The limit is the caller's and not the
  model's, so its token counts with the probability that the model gives it.

What changes a search (length penalty, n-gram bans, temperature, top-k, top-p, minimum length) does not enter.

Shapes: C answers, N documents, T target tokens without the start token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.schemas import Strategy


def counted_tokens(sequences: Tensor, eos_token_ids: Sequence[int], forced_bos_token_id: int | None) -> Tensor:
    """Which tokens belong to y: (C, T) bool for `sequences` (C, 1 + T), which begin with the start token."""
    labels_CT = sequences[:, 1:]
    is_eos_CT = torch.isin(labels_CT, labels_CT.new_tensor(list(eos_token_ids)))
    counted_CT = (is_eos_CT.cumsum(dim=1) - is_eos_CT.long()) == 0  # no end of sequence before this token
    if forced_bos_token_id is not None:
        counted_CT[:, 0] &= labels_CT[:, 0] != forced_bos_token_id
    return counted_CT


def token_shares(log_probs_CNT: Tensor, counted_CT: Tensor, log_prior_N: Tensor, strategy: Strategy) -> Tensor:
    """(C, T) float32: each token's share of log p(y|x), 0 where it is not counted. They sum to log p(y|x)."""
    if strategy == "token":
        marginal_CT = (log_prior_N[:, None] + log_probs_CNT).logsumexp(dim=1)
        return marginal_CT.masked_fill(~counted_CT, 0.0)
    running_CT = _running_joint(log_probs_CNT, counted_CT, log_prior_N).logsumexp(dim=1)
    return torch.diff(running_CT, dim=1, prepend=running_CT.new_zeros(len(running_CT), 1))


def running_posterior(log_probs_CNT: Tensor, counted_CT: Tensor, log_prior_N: Tensor) -> Tensor:
    """p(z|x,y_≤i) after each token, (C, T, N) float32; the last one is p(z|x,y). Each row sums to one."""
    return _running_joint(log_probs_CNT, counted_CT, log_prior_N).softmax(dim=1).transpose(1, 2)


def _running_joint(log_probs_CNT: Tensor, counted_CT: Tensor, log_prior_N: Tensor) -> Tensor:
    """log p(z, y_≤i | x), (C, N, T)."""
    return log_prior_N[:, None] + log_probs_CNT.masked_fill(~counted_CT.unsqueeze(1), 0.0).cumsum(dim=2)
