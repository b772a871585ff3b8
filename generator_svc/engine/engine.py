"""The RAG heads as one object: contexts and document scores in, answers with their evidence out.

Shapes: B questions, N documents a question, S source tokens, C answers returned, T target tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from generator_svc.checkpoint import Checkpoint, load_checkpoint
from generator_svc.engine import heads
from generator_svc.engine.heads import Contexts, Sequences
from generator_svc.engine.likelihood import counted_tokens, document_posterior, marginal_log_prob, token_log_probs
from generator_svc.engine.options import GenerationOptions
from shared.errors import InvalidRequest
from shared.schemas import Strategy


@dataclass(frozen=True)
class Generated:
    """Answers with their evidence.

    ``sequences`` (C, 1 + T) int64 as transformers returns them: the decoder's start token, the answer, padding; the
    answers of a question follow each other, in the order in which the head ranks them. ``log_probs`` (C,) float32 is
    log p(y|x), ``doc_posterior`` (C, N) float32 is p(z|x,y), both as :mod:`generator_svc.engine.likelihood` defines
    them. ``question`` (C,) int64 says whose answer each one is: C is B·num_return_sequences, less where RAG-Sequence
    has fewer different candidates.
    """

    sequences: Tensor
    log_probs: Tensor
    doc_posterior: Tensor
    question: Tensor


@dataclass(frozen=True)
class Scored:
    """``log_probs`` (C,) float32 and ``doc_posterior`` (C, N) float32 of the answers given."""

    log_probs: Tensor
    doc_posterior: Tensor


class RagEngine:
    """RAG-Token and RAG-Sequence over one checkpoint. Not thread-safe: one thread owns it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._model = checkpoint.model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str = torch.float32,
        *,
        any_strategy: bool = False,
    ) -> Self:
        """Load a checkpoint folder or hub id; see :func:`generator_svc.checkpoint.load_checkpoint`."""
        resolved = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return cls(load_checkpoint(path, device=device, dtype=resolved, any_strategy=any_strategy))

    @torch.inference_mode()
    def generate(
        self,
        context_input_ids: Tensor,
        context_attention_mask: Tensor,
        doc_scores: Tensor,
        *,
        strategy: Strategy | None = None,
        n_docs: int | None = None,
        **options: Any,
    ) -> Generated:
        """Answer B questions from their N documents each.

        Args:
            context_input_ids: (B·N, S) int64, padded at the right; a question's documents follow each other.
            context_attention_mask: (B·N, S), 0 where padded.
            doc_scores: (B, N), inner products of question and documents.
            strategy: "token" or "sequence"; None: the head that the checkpoint was trained for.
            n_docs: N, for callers who want it checked; the shape of `doc_scores` decides.
            options: fields of :class:`GenerationOptions`.

        Raises:
            InvalidRequest: shapes that do not agree, or an option that this head or checkpoint cannot honour.
        """
        chosen = self.checkpoint.strategy(strategy)
        contexts = self._contexts(context_input_ids, context_attention_mask, doc_scores, n_docs)
        requested = GenerationOptions(**options)
        config = requested.config(self.checkpoint.generation_defaults)
        self._check(config, chosen)
        states = heads.encode(self._model, contexts)
        with _seeded(requested.seed if config.do_sample else None, self.checkpoint.device):
            if chosen == "token":  # transformers' search encodes the contexts once more, by itself
                found = heads.generate_token(self._model, contexts, config)
            else:
                found = heads.generate_sequence(
                    self._model, contexts, states, config, deduplicate=requested.deduplicate
                )
        scored = self._score(found, contexts, states, chosen)
        return Generated(found.sequences, scored.log_probs, scored.doc_posterior, found.question)

    @torch.inference_mode()
    def score(
        self,
        context_input_ids: Tensor,
        context_attention_mask: Tensor,
        doc_scores: Tensor,
        sequences: Tensor,
        *,
        question: Tensor | None = None,
        strategy: Strategy | None = None,
        n_docs: int | None = None,
    ) -> Scored:
        """log p(y|x) and p(z|x,y) of given answers.

        Args:
            sequences: (C, 1 + T) int64 in the form of `Generated.sequences`: the decoder's start token, then the
                answer up to and including its end-of-sequence token; what follows that is padding.
            question: (C,) int64, whose answer each one is; None: C / B answers for each question.

        The other arguments and the errors are those of :meth:`generate`.
        """
        chosen = self.checkpoint.strategy(strategy)
        contexts = self._contexts(context_input_ids, context_attention_mask, doc_scores, n_docs)
        device = self.checkpoint.device
        if question is None:
            per_question, rest = divmod(len(sequences), len(contexts.doc_scores))
            if rest:
                raise InvalidRequest("the number of sequences is no multiple of the number of questions")
            question = torch.arange(len(contexts.doc_scores)).repeat_interleave(per_question)
        given = Sequences(sequences.to(device), question.to(device))
        return self._score(given, contexts, heads.encode(self._model, contexts), chosen)

    def _contexts(self, input_ids: Tensor, mask: Tensor, doc_scores: Tensor, n_docs: int | None) -> Contexts:
        if n_docs is not None and n_docs != doc_scores.shape[1]:
            raise InvalidRequest(f"doc_scores has {doc_scores.shape[1]} documents, n_docs is {n_docs}", param="n_docs")
        if input_ids.shape != mask.shape or len(input_ids) != doc_scores.numel():
            raise InvalidRequest(
                f"context_input_ids {tuple(input_ids.shape)} and context_attention_mask {tuple(mask.shape)} must have "
                f"one row for each of the doc_scores {tuple(doc_scores.shape)}"
            )
        device = self.checkpoint.device
        return Contexts(input_ids.to(device), mask.to(device), doc_scores.to(device, torch.float32))

    def _check(self, config: Any, strategy: Strategy) -> None:
        """Refuse what would be ignored, or crash inside."""
        if config.max_length is not None and config.max_length - 1 > self.checkpoint.max_target_tokens:
            raise InvalidRequest(
                f"the generator has positions for {self.checkpoint.max_target_tokens} new tokens",
                param="max_new_tokens",
            )
        searched = strategy == "token" and not config.do_sample
        if searched and config.num_return_sequences > config.num_beams:
            raise InvalidRequest("num_return_sequences is above num_beams", param="num_return_sequences")

    def _score(self, found: Sequences, contexts: Contexts, states: Tensor, strategy: Strategy) -> Scored:
        checkpoint = self.checkpoint
        counted = counted_tokens(found.sequences, checkpoint.eos_token_ids, checkpoint.forced_bos_token_id)
        log_probs = found.log_probs
        if log_probs is None:
            rows = contexts.rows[found.question]
            log_probs = token_log_probs(self._model.generator, states, contexts.mask, rows, found.sequences)
        doc_scores = contexts.doc_scores[found.question]
        return Scored(
            marginal_log_prob(log_probs, counted, doc_scores, strategy),
            document_posterior(log_probs, counted, doc_scores),
        )


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from `seed`, and leave torch's generators as they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
