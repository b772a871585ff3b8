r"""How probable an answer is, document by document, and what that says about the documents.

Teacher forcing: the decoder reads the answer and gives log p(y_t | x, z, y_<t) for every token and every document.
From these, in float32:

- RAG-Token      log p(y|x) = Σ_t log Σ_z p(z|x) p(y_t | x, z, y_<t)      (Lewis et al. 2020, §2.1)
- RAG-Sequence   log p(y|x) = log Σ_z p(z|x) Π_t p(y_t | x, z, y_<t)
- posterior      p(z|x,y) ∝ p(z|x) Π_t p(y_t | x, z, y_<t)

p(z|x) is the softmax of the document scores over the N documents given.

The posterior is Bayes' rule for RAG-Sequence. RAG-Token draws a document anew for each token, so that no single z
stands behind an answer there; the same formula then says which document would explain the whole answer by itself,
and is what makes the two heads comparable.

y is every token after the decoder's start token up to and including the first end-of-sequence token, or all of them
where there is none. Two tokens can be forced in generation, whatever the model says:

- ``forced_bos_token_id`` is part of the checkpoint: it always comes first, with probability one, and is left out.
- ``forced_eos_token_id`` comes only when the length limit cuts an answer off. The limit is the caller's and not the
  model's, so its token counts with the probability that the model gives it.

What changes a search (length penalty, n-gram bans, temperature, top-k, top-p, minimum length) does not enter.

Shapes: C candidate answers, N documents, R rows of the encoder (B·N), S source tokens, T target tokens without the
start token, D width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from shared.schemas import Strategy

# Logits of one step of scoring: 2**25 float32 are 128 MiB.
_MAX_LOGITS = 2**25


def counted_tokens(sequences: Tensor, eos_token_ids: Sequence[int], forced_bos_token_id: int | None) -> Tensor:
    """Which tokens belong to y: (C, T) bool for `sequences` (C, 1 + T), which begin with the start token."""
    labels_CT = sequences[:, 1:]
    is_eos_CT = torch.isin(labels_CT, labels_CT.new_tensor(list(eos_token_ids)))
    counted_CT = (is_eos_CT.cumsum(dim=1) - is_eos_CT.long()) == 0  # no end of sequence before this token
    if forced_bos_token_id is not None:
        counted_CT[:, 0] &= labels_CT[:, 0] != forced_bos_token_id
    return counted_CT


@torch.inference_mode()
def token_log_probs(
    generator: PreTrainedModel, encoder_states_RSD: Tensor, mask_RS: Tensor, rows_CN: Tensor, sequences: Tensor
) -> Tensor:
    """log p(y_t | x, z, y_<t), (C, N, T) float32.

    `rows_CN` names the encoder's row of each candidate and document; `sequences` (C, 1 + T) begin with the start
    token. Each document was encoded once; candidates are taken a few at a time, so that the logits stay small.
    """
    labels_CT = sequences[:, 1:]
    (n_candidates, n_docs), n_tokens = rows_CN.shape, labels_CT.shape[1]
    vocabulary = int(generator.config.vocab_size)
    step = max(1, _MAX_LOGITS // (n_docs * n_tokens * vocabulary))
    parts = []
    for start in range(0, n_candidates, step):
        rows = rows_CN[start : start + step].reshape(-1)
        labels = labels_CT[start : start + step].repeat_interleave(n_docs, dim=0)
        logits_RTV = generator(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoder_states_RSD[rows]),
            attention_mask=mask_RS[rows],
            decoder_input_ids=sequences[start : start + step, :-1].repeat_interleave(n_docs, dim=0),
            use_cache=False,
        ).logits.float()
        chosen_RT = logits_RTV.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        parts.append((chosen_RT - logits_RTV.logsumexp(dim=-1)).view(-1, n_docs, n_tokens))
    return torch.cat(parts)


def marginal_log_prob(log_probs_CNT: Tensor, counted_CT: Tensor, doc_scores_CN: Tensor, strategy: Strategy) -> Tensor:
    """log p(y|x), (C,) float32, as the head defines it."""
    prior_CN = doc_scores_CN.float().log_softmax(dim=1)
    if strategy == "token":
        marginal_CT = (prior_CN.unsqueeze(-1) + log_probs_CNT).logsumexp(dim=1)
        return marginal_CT.masked_fill(~counted_CT, 0.0).sum(dim=1)
    return (prior_CN + _answer_log_probs(log_probs_CNT, counted_CT)).logsumexp(dim=1)


def document_posterior(log_probs_CNT: Tensor, counted_CT: Tensor, doc_scores_CN: Tensor) -> Tensor:
    """p(z|x,y), (C, N) float32; each row sums to one."""
    prior_CN = doc_scores_CN.float().log_softmax(dim=1)
    return (prior_CN + _answer_log_probs(log_probs_CNT, counted_CT)).softmax(dim=1)


def _answer_log_probs(log_probs_CNT: Tensor, counted_CT: Tensor) -> Tensor:
    """log p(y | x, z), (C, N)."""
    return log_probs_CNT.masked_fill(~counted_CT.unsqueeze(1), 0.0).sum(dim=2)
