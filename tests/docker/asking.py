"""Callers that go on asking through the published port while something breaks, and what became of their questions."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from services.client import RagClient
from tests.docker.stack import Stack
from tests.e2e.running import until

QUESTION = "How many people live in Paris?"
TIMEOUT_MS = 3000
# The client waits 2 s longer than the deadline that it sends; the rest is for a busy machine.
ENDS_WITHIN_S = TIMEOUT_MS / 1000 + 2 + 2
RECOVERS_WITHIN_S = 90


class Outcome(NamedTuple):
    got: str | Exception  # the text of the answer, or what was raised
    began: float  # seconds since the epoch, as Docker tells its times
    took_s: float


@dataclass
class Asked:
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def errors(self) -> list[Exception]:
        return [outcome.got for outcome in self.outcomes if isinstance(outcome.got, Exception)]

    @property
    def texts(self) -> set[str]:
        return {outcome.got for outcome in self.outcomes if isinstance(outcome.got, str)}

    @property
    def slowest_s(self) -> float:
        return max(outcome.took_s for outcome in self.outcomes)

    @property
    def summary(self) -> str:
        counted = Counter("answered" if isinstance(o.got, str) else type(o.got).__name__ for o in self.outcomes)
        return ", ".join(f"{n} {name}" for name, n in sorted(counted.items()))

    def answered_after(self, moment: float) -> float | None:
        """Seconds from `moment` to the end of the first answer to a question that was asked after it."""
        ends = [o.began + o.took_s - moment for o in list(self.outcomes) if o.began > moment and isinstance(o.got, str)]
        return min(ends, default=None)

    def wait_for_errors(self, n: int) -> None:
        until(lambda: len(self.errors) >= n, 30, f"{n} questions fail")

    def wait_for_recovery(self, since: float) -> float:
        """Seconds from `since` until questions are answered again."""
        until(lambda: self.answered_after(since) is not None, RECOVERS_WITHIN_S, "questions are answered again")
        return self.answered_after(since) or 0.0


def answer(client: RagClient, question: str = QUESTION, timeout_ms: int = 30_000) -> str:
    return client.answer(question, timeout_ms=timeout_ms).results[0].answers[0].text


@contextmanager
def asking(stack: Stack, n_callers: int = 2) -> Iterator[Asked]:
    """Callers that ask one question after the other, until the block ends and their last one is answered."""
    asked, enough = Asked(), threading.Event()

    def ask() -> None:
        while not enough.is_set():
            got: str | Exception
            began = time.time()
            with stack.client() as client:  # a connection of its own for every question
                try:
                    got = answer(client, timeout_ms=TIMEOUT_MS)
                except Exception as error:  # noqa: BLE001  (what it is, is what is tested)
                    got = error
            asked.outcomes.append(Outcome(got, began, time.time() - began))
            time.sleep(0.1)

    callers = [threading.Thread(target=ask) for _ in range(n_callers)]
    for caller in callers:
        caller.start()
    try:
        yield asked
    finally:
        enough.set()
        for caller in callers:
            caller.join()
