"""Continuous batching: questions join and leave between steps, within a budget of tokens.

A question's documents are encoded in parts, between two steps; from then on it decodes with all others, whatever its
head, options and lengths. Answers are scored in parts, too. Who is finished, cancelled or too late leaves at once. So
nobody waits for more than a part and a step, however much another has asked for. The budget bounds the memory of all
caches.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import structlog
from torch import Tensor

from generator_svc.engine.backend import Decoding, Parts, Task
from generator_svc.engine.engine import RagEngine
from generator_svc.engine.evidence import Evidence
from shared.errors import InferenceError, RagError
from shared.schemas import Strategy

BETWEEN_STEPS_S = 0.05
"""So long parts are done between two steps; a single one may take longer. In a stream such a pause is hardly seen."""

log = structlog.get_logger(__name__)


class Ticket(Protocol):
    """Who waits for a question's answers."""

    @property
    def wanted(self) -> bool: ...

    def encoded(self, questions: int) -> None:
        """Its documents are, together with those of other ``questions``."""

    def decoded(self) -> None:
        """A step was done for it."""

    def written(self, tokens: Tensor) -> None:
        """(T,) what is certain so far, the decoder's start token included."""

    def finished(self, evidence: Evidence) -> None: ...

    def failed(self, error: RagError) -> None: ...


@dataclass(frozen=True, eq=False)
class Scoring:
    """Given answers (C, 1 + T) under documents N of (S,) with scores (N,), as :meth:`RagEngine.scoring` takes them."""

    contexts: Sequence[Tensor]
    doc_scores: Tensor
    sequences: Tensor


Kind = TypeVar("Kind", Task, Scoring)


@dataclass(frozen=True, eq=False)
class _Question:
    ticket: Ticket
    tokens: int


@dataclass(frozen=True, eq=False)
class _Run:
    """A question that decodes."""

    question: _Question
    decoding: Decoding


@dataclass(frozen=True, eq=False)
class _Work:
    """What is done in parts, and for whom. Questions that have left it are another's."""

    questions: list[_Question]
    parts: Parts[None]


def cache_tokens(asked: Task | Scoring) -> int:
    """Upper bound of the cache positions that a question can take: its contexts, and a node a row and step."""
    nodes = asked.nodes if isinstance(asked, Task) else 0
    return sum(len(context) + nodes for context in asked.contexts)


class Scheduler:
    """The questions that run. One thread owns it.

    Args:
        max_tokens: the budget; a question that is larger by itself runs alone.
    """

    def __init__(self, engine: RagEngine, max_tokens: int) -> None:
        self._engine = engine
        self._max_tokens = max_tokens
        # A metric is read in another thread: what is under way is always in one of these, and counted there.
        self._works: list[_Work] = []  # by turns
        self._running: list[_Run] = []

    @property
    def running(self) -> int:
        """Questions that are being encoded, decoded or scored."""
        return len(self._questions())

    @property
    def tokens(self) -> int:
        """What of the budget is taken."""
        return sum(question.tokens for question in self._questions())

    def admits(self, tokens: Sequence[int]) -> bool:
        """Whether questions of these sizes may join those that run."""
        return self.tokens + sum(tokens) <= self._max_tokens

    def join(self, tasks: Sequence[Task], tickets: Sequence[Ticket]) -> None:
        """Takes questions to be answered."""
        questions = _with_tickets(tasks, tickets)
        self._works = [*self._works, _Work(questions, self._begin(tasks, questions))]

    def score(self, scorings: Sequence[Scoring], strategy: Strategy, tickets: Sequence[Ticket]) -> None:
        """Takes questions whose answers are given."""
        questions = _with_tickets(scorings, tickets)
        self._works = [*self._works, _Work(questions, self._score(scorings, strategy, questions))]

    def step(self) -> bool:
        """Encodes and scores for a moment; then :meth:`RagEngine.step` for the questions that decode.

        What fails in a part, fails for its questions; what fails in decoding, ends all and is raised.

        Returns: whether anything is left to be done.
        """
        try:
            until_s = time.perf_counter() + BETWEEN_STEPS_S
            while self._works:
                self._do_part_of_first()
                if time.perf_counter() >= until_s:
                    break
            self._decode()
        except BaseException:
            self._works, self._running = [], []
            raise
        return bool(self._works or self._running)

    def _do_part_of_first(self) -> None:
        work, *others = self._works
        more = self._do_part(work)
        self._works = [*others, work] if more else others

    def _do_part(self, work: _Work) -> bool:
        """Whether there is more of it."""
        if not any(question.ticket.wanted for question in work.questions):
            return False
        try:
            next(work.parts)
        except StopIteration:
            return False
        except Exception as error:
            known = error if isinstance(error, RagError) else None
            if known is None:
                log.exception("part_failed", questions=len(work.questions))
            for question in work.questions:
                question.ticket.failed(known or InferenceError("the computation failed; the log has the trace"))
            return False
        return True

    def _begin(self, tasks: Sequence[Task], questions: list[_Question]) -> Parts[None]:
        for wanted in self._together(tasks, questions):
            encoded = [question for _, question in wanted]
            self._run(encoded, (yield from self._engine.beginning([task for task, _ in wanted])))
            for question in encoded:
                questions.remove(question)
            if questions:
                yield

    def _run(self, questions: Sequence[_Question], decodings: Sequence[Decoding]) -> None:
        for question in questions:
            question.ticket.encoded(len(questions))
        self._running = [*self._running, *map(_Run, questions, decodings)]

    def _score(self, scorings: Sequence[Scoring], strategy: Strategy, questions: list[_Question]) -> Parts[None]:
        for wanted in self._together(scorings, questions):
            asked = [scoring for scoring, _ in wanted]
            contexts, scores = [scoring.contexts for scoring in asked], [scoring.doc_scores for scoring in asked]
            sequences = [scoring.sequences for scoring in asked]
            evidence = yield from self._engine.scoring(contexts, scores, sequences, strategy)
            for (_, question), found in zip(wanted, evidence, strict=True):
                question.ticket.finished(found)
                questions.remove(question)
            if questions:
                yield

    def _together(self, asked: Sequence[Kind], questions: list[_Question]) -> Iterator[list[tuple[Kind, _Question]]]:
        """Those who go together and are wanted when it is their turn; who is not, leaves ``questions``."""
        pairs = list(zip(asked, questions, strict=True))
        for part in self._engine.together([one.contexts for one in asked]):
            for _, question in pairs[part]:
                if not question.ticket.wanted:
                    questions.remove(question)
            if wanted := [(one, question) for one, question in pairs[part] if question in questions]:
                yield wanted

    def _decode(self) -> None:
        running = [run for run in self._running if run.question.ticket.wanted]
        moved = set(self._engine.step([run.decoding for run in running])) if running else set()
        for run in running:
            if run.decoding in moved:
                run.question.ticket.decoded()
                if (tokens := run.decoding.written) is not None:
                    run.question.ticket.written(tokens)
        running.sort(key=lambda run: run.decoding in moved)  # who waited is first in the next
        self._running = [run for run in running if not run.decoding.finished]
        if done := [run for run in running if run.decoding.finished]:
            self._works = [_Work([run.question for run in done], self._finish(done)), *self._works]
            self._do_part_of_first()

    def _finish(self, done: Sequence[_Run]) -> Parts[None]:
        evidence = yield from self._engine.finishing([run.decoding for run in done])
        for run, found in zip(done, evidence, strict=True):
            run.question.ticket.finished(found)

    def _questions(self) -> list[_Question]:
        in_works = [question for work in self._works for question in work.questions]
        return in_works + [run.question for run in self._running]


def _with_tickets(asked: Sequence[Task | Scoring], tickets: Sequence[Ticket]) -> list[_Question]:
    return [_Question(ticket, cache_tokens(one)) for one, ticket in zip(asked, tickets, strict=True)]
