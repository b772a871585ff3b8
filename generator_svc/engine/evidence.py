"""What comes out of the engine: answers, with what the model knows of them.

Shapes: B questions, N documents a question, C answers, T target tokens without the start token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from generator_svc.engine.backend import Answers
from generator_svc.engine.likelihood import counted_tokens, running_posterior, token_shares
from shared.schemas import Strategy


@dataclass(frozen=True)
class Evidence:
    """The answers of one question and what the model knows of them, as :mod:`generator_svc.engine.likelihood` defines.

    ``sequences`` (C, 1 + T) int64, best first, ``log_probs`` (C,) log p(y|x), ``doc_posterior`` (C, N) p(z|x,y); token
    by token ``counted`` (C, T) which belong to the answer, ``token_log_probs`` (C, T) their shares of log p(y|x),
    ``token_posterior`` (C, T, N) p(z|x,y_≤i). Floats are float32.
    """

    sequences: Tensor
    log_probs: Tensor
    doc_posterior: Tensor
    counted: Tensor
    token_log_probs: Tensor
    token_posterior: Tensor


@dataclass(frozen=True)
class Generated:
    """Answers of a batch.

    ``sequences`` (C, 1 + T) int64 as transformers returns them: the decoder's start token, the answer, padding; the
    answers of a question follow each other, in the order in which the head ranks them. ``question`` (C,) int64 says
    whose answer each one is: C is B·num_return_sequences, less where RAG-Sequence has fewer different candidates.
    ``log_probs`` (C,) and ``doc_posterior`` (C, N) are those of :class:`Evidence`, which stands whole, a question at a
    time, in ``evidence``.
    """

    sequences: Tensor
    question: Tensor
    log_probs: Tensor
    doc_posterior: Tensor
    evidence: list[Evidence]


def evidence_of(
    answers: Answers, log_prior_N: Tensor, strategy: Strategy, eos: Sequence[int], forced_bos: int | None
) -> Evidence:
    """What the model knows of `answers`; the arguments are those of :mod:`generator_svc.engine.likelihood`."""
    log_probs_CNT = answers.log_probs
    counted = counted_tokens(answers.sequences, eos, forced_bos)
    shares = token_shares(log_probs_CNT, counted, log_prior_N, strategy)
    posterior = running_posterior(log_probs_CNT, counted, log_prior_N)
    return Evidence(
        sequences=answers.sequences,
        log_probs=shares.sum(1),
        doc_posterior=posterior[:, -1],
        counted=counted,
        token_log_probs=shares,
        token_posterior=posterior,
    )
