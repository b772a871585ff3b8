"""What runs a generator, question by question: the interface that the engine and the scheduler see.

Two backends exist: :mod:`generator_svc.engine.bart_backend`, ours, for BART; and
:mod:`generator_svc.engine.transformers_backend`, transformers' own classes, for every other generator.

Shapes: N documents of a question, S source tokens of one, C answers of a question, T target tokens without the start
token.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from shared.schemas import Strategy

T = TypeVar("T")
Parts = Generator[None, None, T]
"""Work in parts of a moment each: at every ``yield`` something else may be done first. It returns what it has made."""


def whole(parts: Parts[T]) -> T:
    """What comes of all parts, done one after the other."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            made: T = end.value
            return made


@dataclass(frozen=True, eq=False)
class Task:
    """A question to be answered: ``contexts`` N of (S,) int64 without padding, ``log_prior`` (N,) log p(z|x).

    These and what comes of it lie on the host: they are small, and looked at a value at a time.
    """

    contexts: Sequence[Tensor]
    log_prior: Tensor
    strategy: Strategy
    config: GenerationConfig
    deduplicate: bool = True
    fast: bool = False
    seed: int | None = None
    prefix_allowed_tokens: Callable[[Tensor], list[int]] | None = None
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    stopping: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end an answer."""
        eos = self.config.eos_token_id
        return [eos] if isinstance(eos, int) else list(eos or [])

    @property
    def nodes(self) -> int:
        """The most nodes that the token tree of a document can have: the root, and one a row and step."""
        config = self.config
        rows = max(config.num_beams or 1, config.num_return_sequences or 1)
        return 1 + rows * max(0, (config.max_length or 0) - 2)


@dataclass(frozen=True, eq=False)
class Answers:
    """``sequences`` (C, 1 + T), best first, padded; ``log_probs`` (C, N, T) log p(y_t|x,z,y_<t), 0 where padded.

    On the host.
    """

    sequences: Tensor
    log_probs: Tensor


class Decoding(Protocol):
    """A question on its way."""

    task: Task

    @property
    def finished(self) -> bool: ...

    @property
    def written(self) -> Tensor | None:
        """(T,) what a single row has written so far; None where nothing is certain before the end."""


class Backend(Protocol):
    def warm_up(self) -> None:
        """What is done once, before the first question."""

    def together(self, contexts: Sequence[Sequence[Tensor]]) -> Iterable[slice]:
        """Which of a batch's questions best run together, from beginning to end, by the contexts of each."""

    def encode(self, contexts: Sequence[Tensor]) -> Parts[Sequence[Any]]:
        """Each document, once, to be scored."""

    def begin(self, tasks: Sequence[Task]) -> Parts[Sequence[Decoding]]:
        """Encodes the documents of all questions together."""

    def step(self, running: Sequence[Any]) -> Sequence[Decoding]:
        """Moves decodings on, the first at least and others as far as that takes little longer, and returns them."""

    def finish(self, done: Sequence[Any]) -> Parts[list[Answers]]:
        """The answers of decodings that are finished."""

    def score(self, encoded: Sequence[Sequence[Any]], answers: Sequence[Sequence[Tensor]]) -> Parts[list[Tensor]]:
        """For each question log p(y_t|x,z,y_<t) of its answers under its documents: (C, N, T), 0 behind an end.

        Args:
            answers: for each question C of (1 + T,), the decoder's start token first, no padding.
        """
