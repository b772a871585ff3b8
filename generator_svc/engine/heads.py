"""How each head generates: RAG-Token through transformers' own search, RAG-Sequence by thorough decoding.

Both return the token ids that transformers 5.23 returns, given contexts with their attention mask. What transformers
gets wrong or ignores is put right here:

- RAG-Sequence drops the attention mask when it generates candidates, so that padding is read as text. The mask is
  passed on.
- RAG-Sequence asserts, or scores with the wrong number, where ``n_docs`` is not the configuration's. It is taken from
  the scores' shape.
- RAG-Sequence goes question by question and encodes every document again for each candidate. All questions are
  generated together and encoded once.
- RAG-Sequence crashes where more sequences are asked for than there are different candidates. All candidates there
  are come back.
- RAG-Token ignores ``max_new_tokens`` (see :mod:`generator_svc.engine.options`), and gives one sample whatever
  ``num_return_sequences`` says. Its rows are repeated.

Shapes: B questions, N documents, R = B·N rows, S source tokens, T target tokens without the start token, C candidates
of all questions, K candidates of each document.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, RagTokenForGeneration
from transformers.modeling_outputs import BaseModelOutput

from generator_svc.engine.likelihood import token_log_probs


@dataclass(frozen=True)
class Contexts:
    """What a head reads: ``input_ids`` and ``mask`` (B·N, S) int64, ``doc_scores`` (B, N) float32."""

    input_ids: Tensor
    mask: Tensor
    doc_scores: Tensor

    @property
    def rows(self) -> Tensor:
        """The row of each document, (B, N)."""
        return torch.arange(self.doc_scores.numel(), device=self.doc_scores.device).view(self.doc_scores.shape)

    def repeated(self, times: int) -> "Contexts":
        """Every question `times` over."""
        rows = self.rows.repeat_interleave(times, dim=0).view(-1)
        return Contexts(self.input_ids[rows], self.mask[rows], self.doc_scores.repeat_interleave(times, dim=0))


@dataclass(frozen=True)
class Sequences:
    """Answers of all questions: ``sequences`` (C, 1 + T) int64, ``question`` (C,) says whose each one is.

    ``log_probs`` (C, N, T) where the head had to compute them anyway.
    """

    sequences: Tensor
    question: Tensor
    log_probs: Tensor | None = None


def encode(model: RagTokenForGeneration, contexts: Contexts) -> Tensor:
    """The generator's encoder states of every document, (R, S, D)."""
    states: Tensor = model.generator.get_encoder()(
        input_ids=contexts.input_ids, attention_mask=contexts.mask
    ).last_hidden_state
    return states


def generate_token(model: RagTokenForGeneration, contexts: Contexts, config: GenerationConfig) -> Sequences:
    """RAG-Token: at each step the documents' next-token distributions are mixed by p(z|x), then searched."""
    n_questions, n_docs = contexts.doc_scores.shape
    per_question = config.num_return_sequences
    if config.do_sample and config.num_beams == 1:
        contexts, config.num_return_sequences = contexts.repeated(per_question), 1
    sequences = model.generate(
        context_input_ids=cast("torch.LongTensor", contexts.input_ids),
        context_attention_mask=cast("torch.LongTensor", contexts.mask),
        doc_scores=contexts.doc_scores,
        n_docs=n_docs,
        generation_config=config,
    )
    question = torch.arange(n_questions, device=sequences.device).repeat_interleave(per_question)
    return Sequences(sequences, question)


def generate_sequence(
    model: RagTokenForGeneration, contexts: Contexts, states: Tensor, config: GenerationConfig, *, deduplicate: bool
) -> Sequences:
    """RAG-Sequence by thorough decoding (Lewis et al. 2020, §2.5): candidates from each document by itself, then
    every candidate scored under every document.

    With sampling, each document gives as many samples as make up the number asked for.
    """
    n_questions, n_docs = contexts.doc_scores.shape
    asked = config.num_return_sequences
    config.num_return_sequences = (
        -(-asked // n_docs) if config.do_sample and config.num_beams == 1 else config.num_beams
    )
    generated = model.generator.generate(
        contexts.input_ids,
        attention_mask=contexts.mask,
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        generation_config=config,
    )
    by_question = generated.view(n_questions, n_docs * config.num_return_sequences, -1)
    candidates = [unique_rows(rows) if deduplicate else rows for rows in by_question]
    question = torch.arange(n_questions, device=generated.device).repeat_interleave(
        torch.tensor([len(rows) for rows in candidates], device=generated.device)
    )
    sequences = torch.cat(candidates)
    log_probs = token_log_probs(model.generator, states, contexts.mask, contexts.rows[question], sequences)

    generator_config: Any = model.config.generator
    bos_token_id = model.config.bos_token_id or getattr(generator_config, "bos_token_id", None)
    best, start = [], 0
    for index, rows in enumerate(candidates):
        ranks = _rank_scores(
            log_probs[start : start + len(rows)],
            rows[:, 1:],
            contexts.doc_scores[index],
            bos_token_id,
            generator_config.pad_token_id,
        )
        best.append(start + ranks.topk(min(asked, len(rows))).indices)
        start += len(rows)
    chosen = torch.cat(best)
    return Sequences(sequences[chosen], question[chosen], log_probs[chosen])


def unique_rows(rows: Tensor) -> Tensor:
    """The different rows, in the order of their first occurrence."""
    return rows.new_tensor(list(dict.fromkeys(map(tuple, rows.tolist()))))


def _rank_scores(
    log_probs_CNT: Tensor, labels_CT: Tensor, doc_scores_N: Tensor, bos_token_id: int | None, pad_token_id: int
) -> Tensor:
    """The score by which transformers orders one question's candidates, (C,).

    It is log p(y|x) but for three habits of `RagSequenceForGeneration.get_nll`, kept so that the order is the same: a
    beginning-of-sequence token that opens all the candidates does not count, padding ids never count, and the
    document's prior joins at the second token, so that an answer of one token goes without.
    """
    opens_with_bos = bos_token_id is not None and bool((labels_CT[:, 0] == bos_token_id).all())
    is_pad_CT = labels_CT == pad_token_id
    counted_CNT = log_probs_CNT.masked_fill(is_pad_CT.unsqueeze(1), 0.0)[:, :, int(opens_with_bos) :]
    has_second_C = ~is_pad_CT[:, 1] if labels_CT.shape[1] > 1 else torch.zeros_like(is_pad_CT[:, 0])
    prior_CN = torch.where(has_second_C.unsqueeze(1), doc_scores_N.float().log_softmax(dim=0), 0.0)
    return (counted_CNT.sum(dim=2) + prior_CN).logsumexp(dim=1)
