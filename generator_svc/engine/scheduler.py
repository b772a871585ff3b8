"""Continuous batching: questions join and leave between steps, within a budget of tokens.

A question that joins is encoded at once and decodes with the others from the next step on, whatever its head, options
and lengths; one that is finished, cancelled or too late leaves at once. The budget bounds the memory of all caches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from generator_svc.engine.backend import Decoding, Task
from generator_svc.engine.engine import RagEngine
from generator_svc.engine.evidence import Evidence


class Ticket(Protocol):
    """Who waits for a question's answers."""

    @property
    def wanted(self) -> bool: ...

    def finished(self, evidence: Evidence) -> None: ...

    def written(self, tokens: Tensor) -> None:
        """(T,) what is certain so far, the decoder's start token included."""


@dataclass(frozen=True, eq=False)
class _Run:
    decoding: Decoding
    ticket: Ticket
    tokens: int


def cache_tokens(task: Task) -> int:
    """Upper bound of the cache positions that a question can take: its contexts, and a node a row and step."""
    return sum(len(context) for context in task.contexts) + len(task.contexts) * task.nodes


class Scheduler:
    """The questions that run. One thread owns it.

    Args:
        max_tokens: the budget; a question that is larger by itself runs alone.
    """

    def __init__(self, engine: RagEngine, max_tokens: int) -> None:
        self._engine = engine
        self._max_tokens = max_tokens
        self._running: list[_Run] = []

    @property
    def running(self) -> int:
        """Questions that are being decoded."""
        return len(self._running)

    @property
    def tokens(self) -> int:
        """What of the budget is taken."""
        return sum(run.tokens for run in self._running)

    def admits(self, tokens: Sequence[int]) -> bool:
        """Whether questions of these sizes may join those that run."""
        return self.tokens + sum(tokens) <= self._max_tokens

    def join(self, tasks: Sequence[Task], tickets: Sequence[Ticket]) -> None:
        """Encodes the questions' documents, all at once; they decode from the next step on."""
        for decoding, task, ticket in zip(self._engine.begin(tasks), tasks, tickets, strict=True):
            self._running.append(_Run(decoding, ticket, cache_tokens(task)))

    def step(self) -> bool:
        """One token for every row of every question; whether any goes on. What raises, ends all of them."""
        self._running = [run for run in self._running if run.ticket.wanted]
        try:
            self._advance()
        except BaseException:
            self._running = []
            raise
        return bool(self._running)

    def _advance(self) -> None:
        running = self._running
        if running:
            self._engine.step([run.decoding for run in running])
        for run in running:
            if (tokens := run.decoding.written) is not None:
                run.ticket.written(tokens)
        done = [run for run in running if run.decoding.finished]
        if done:
            evidence = self._engine.finish([run.decoding for run in done])
            for run, found in zip(done, evidence, strict=True):
                run.ticket.finished(found)
        self._running = [run for run in running if not run.decoding.finished]
