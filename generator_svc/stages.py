"""What the device worker's thread does: the stages of an answer that need a tokenizer or torch.

One job is one question at one stage. Jobs of a kind and with equal options share a batch; each gets its own result,
or the error that is its own.

Shapes: B questions, N documents, D dimension, S source tokens, T target tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from generator_svc.answers import AnswerCodec, EncodedAnswer
from generator_svc.checkpoint import Checkpoint
from generator_svc.contexts import Context, ContextForm, build_context, pad_contexts, question_form
from generator_svc.engine import GenerationOptions, RagEngine
from generator_svc.question_encoder import QuestionEncoder
from shared.errors import InferenceError, RagError
from shared.retrieval import Float32Array
from shared.schemas import Strategy


@dataclass(frozen=True)
class Encode:
    """A question → its vector, (D,) float32."""

    question: str


@dataclass(frozen=True)
class Assemble:
    """A question and its passages, each (title, text) → a context for each."""

    question: str
    passages: Sequence[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Generate:
    """Contexts and their scores, (N,) float32 → answers, best first."""

    contexts: Sequence[Context]
    doc_scores: Float32Array
    strategy: Strategy
    options: GenerationOptions


@dataclass(frozen=True)
class Tokenize:
    """Answers to be scored → the same with their tokens."""

    answers: Sequence[str]


@dataclass(frozen=True, eq=False)
class Score:
    """Contexts, their scores and answers → the same answers with their probabilities."""

    contexts: Sequence[Context]
    doc_scores: Float32Array
    strategy: Strategy
    answers: Sequence[EncodedAnswer]


@dataclass(frozen=True)
class ScoredAnswer:
    """``log_prob`` is log p(y|x); ``doc_posterior`` (N,) is p(z|x,y)."""

    text: str
    log_prob: float
    doc_posterior: list[float]


_NOT_FINITE = "the model's probabilities are not finite; it may need another dtype: bfloat16 or float32"

Job = Encode | Assemble | Generate | Tokenize | Score
Outcome = Float32Array | list[Context] | list[EncodedAnswer] | list[ScoredAnswer] | RagError
Kind = TypeVar("Kind")
Made = TypeVar("Made")


def batch_key(job: Job) -> object:
    """Jobs with equal keys may run together. One that samples runs alone, so that its seed alone decides."""
    match job:
        case Generate(options=options) if options.do_sample:
            return object()
        case Generate(strategy=strategy, options=options):
            return Generate, strategy, options, len(job.contexts)
        case Score(strategy=strategy):
            return Score, strategy, len(job.contexts)
        case _:
            return type(job)


def batch_size(job: Job) -> int:
    """Rows that a job adds to a batch."""
    match job:
        case Assemble(passages=passages):
            return len(passages)
        case Generate(options=options):
            return len(job.contexts) * max(options.num_beams or 1, options.num_return_sequences or 1)
        case Score():
            return len(job.contexts)
        case _:
            return 1


class Stages:
    """Everything that is loaded from one checkpoint. One thread owns it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.encoder = QuestionEncoder(checkpoint)
        self._engine = RagEngine(checkpoint)
        self._form = ContextForm.of(checkpoint.config, checkpoint.max_source_tokens)
        self._codec = AnswerCodec(checkpoint)
        self._pad_token_id = int(checkpoint.generator_tokenizer.pad_token_id)

    def warm_up(self) -> None:
        """Run every stage once, with the shortest and the longest context."""
        longest = "and so on " * self._form.max_tokens
        self.encoder.encode(["?", longest])
        contexts = [
            build_context("", text, "?", self._form, self.checkpoint.generator_tokenizer) for text in ("", longest)
        ]
        scores = np.zeros(1, np.float32)
        for strategy in self.checkpoint.strategies:
            for context in contexts:
                self.run([Generate([context], scores, strategy, GenerationOptions(num_beams=2, max_new_tokens=4))])
                self.run([Score([context], scores, strategy, [self._codec.encode("?")])])

    def run(self, jobs: list[Job]) -> Sequence[Outcome]:
        """One outcome for each job; all are of one kind and one key."""
        stages: dict[type, Callable[[list[Any]], Sequence[Outcome]]] = {
            Encode: self._encode,
            Assemble: self._assemble,
            Generate: self._generate,
            Tokenize: self._tokenize,
            Score: self._score,
        }
        return stages[type(jobs[0])](jobs)

    def _encode(self, jobs: list[Encode]) -> Sequence[Outcome]:
        return list(self.encoder.encode([job.question for job in jobs]))

    def _assemble(self, jobs: list[Assemble]) -> Sequence[Outcome]:
        tokenizer = self.checkpoint.generator_tokenizer

        def contexts(job: Assemble) -> list[Context]:
            question = question_form(job.question, self.checkpoint.question_tokenizer)
            return [build_context(title, text, question, self._form, tokenizer) for title, text in job.passages]

        return _each(contexts, jobs)

    def _generate(self, jobs: list[Generate]) -> Sequence[Outcome]:
        made = self._engine.generate(*self._batch(jobs), strategy=jobs[0].strategy, **asdict(jobs[0].options))
        texts = [self._codec.text(sequence) for sequence in made.sequences.tolist()]
        return _by_question(len(jobs), made.question, texts, made.log_probs, made.doc_posterior)

    def _tokenize(self, jobs: list[Tokenize]) -> Sequence[Outcome]:
        return _each(lambda job: [self._codec.encode(answer) for answer in job.answers], jobs)

    def _score(self, jobs: list[Score]) -> Sequence[Outcome]:
        given = [(row, answer) for row, job in enumerate(jobs) for answer in job.answers]
        sequences, _ = pad_contexts([answer.sequence for _, answer in given], self._pad_token_id)
        question = torch.tensor([row for row, _ in given])
        scored = self._engine.score(
            *self._batch(jobs), self._embedded(sequences), question=question, strategy=jobs[0].strategy
        )
        texts = [answer.text for _, answer in given]
        return _by_question(len(jobs), question, texts, scored.log_probs, scored.doc_posterior)

    def _batch(self, jobs: Sequence[Generate | Score]) -> tuple[Tensor, Tensor, Tensor]:
        """Context ids and mask (B·N, S), document scores (B, N)."""
        rows = [context.input_ids for job in jobs for context in job.contexts]
        ids, mask = pad_contexts(rows, self._pad_token_id)
        return self._embedded(ids), mask, torch.from_numpy(np.stack([job.doc_scores for job in jobs]))

    def _embedded(self, ids: Tensor) -> Tensor:
        """`ids` with those that have no row in the embedding table as unknown: <mask>, with some BARTs."""
        config: Any = self.checkpoint.config.generator
        unknown = self.checkpoint.generator_tokenizer.unk_token_id
        return ids if unknown is None else ids.masked_fill(ids >= config.vocab_size, unknown)


def _each(make: Callable[[Kind], Made], jobs: Sequence[Kind]) -> list[Made | RagError]:
    """What `make` gives for each job; the error of one is its own outcome and no other's."""
    outcomes: list[Made | RagError] = []
    for job in jobs:
        try:
            outcomes.append(make(job))
        except RagError as error:
            outcomes.append(error)
    return outcomes


def _by_question(
    n_questions: int, question: Tensor, texts: Sequence[str], log_probs: Tensor, posteriors: Tensor
) -> list[list[ScoredAnswer] | InferenceError]:
    answers: list[list[ScoredAnswer]] = [[] for _ in range(n_questions)]
    rows = zip(question.tolist(), texts, log_probs.tolist(), posteriors.tolist(), strict=True)
    for index, text, log_prob, posterior in rows:
        answers[index].append(ScoredAnswer(text, log_prob, posterior))
    return [
        of_question if all(math.isfinite(answer.log_prob) for answer in of_question) else InferenceError(_NOT_FINITE)
        for of_question in answers
    ]
