"""What callers of the generator see while the retriever is killed, hangs, and comes back."""

import asyncio
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from services.client import AsyncRagClient
from shared.errors import DeadlineExceeded, RagError, Unavailable, UpstreamError
from shared.schemas import AnswerResponse, OwnPassage
from tests.e2e.running import Up, until

pytestmark = pytest.mark.slow
QUESTION = "How many people live in Paris?"
TIMEOUT_MS = 3000
# Of the way there and back and of a busy machine, on top of the deadline.
GRACE_S = 1.5


@dataclass
class Asked:
    """What became of the questions."""

    outcomes: list["Outcome"] = field(default_factory=list)

    @property
    def errors(self) -> list[Exception]:
        return [outcome.got for outcome in self.outcomes if isinstance(outcome.got, Exception)]

    @property
    def slowest_s(self) -> float:
        return max(outcome.took_s for outcome in self.outcomes)


class Outcome(NamedTuple):
    got: AnswerResponse | Exception
    began: float  # on the monotonic clock
    took_s: float


@contextmanager
def asking(up: Up, n_callers: int = 4) -> Iterator[Asked]:
    """Callers that ask one question after the other, until the block ends and their last one is answered."""
    asked, enough = Asked(), threading.Event()

    def ask() -> None:
        with up.client() as client:
            while not enough.is_set():
                began = time.monotonic()
                got: AnswerResponse | Exception
                try:
                    got = client.answer(QUESTION, timeout_ms=TIMEOUT_MS)
                except Exception as error:  # noqa: BLE001  (what it is, is what is tested)
                    got = error
                asked.outcomes.append(Outcome(got, began, time.monotonic() - began))
                if isinstance(got, Exception):
                    time.sleep(0.05)

    callers = [threading.Thread(target=ask) for _ in range(n_callers)]
    for caller in callers:
        caller.start()
    try:
        yield asked
    finally:
        enough.set()
        for caller in callers:
            caller.join()


def test_every_request_ends_in_time_while_the_retriever_is_killed_and_comes_back(own_up: Up, paris: str) -> None:
    with own_up.client() as client, asking(own_up) as asked:
        until(lambda: len(asked.outcomes) >= 8, 60, "answers before anything breaks")
        assert asked.errors == []
        os.kill(own_up.pid_of("retriever"), signal.SIGKILL)
        why = until(lambda: client.ready().reasons, 10, "/readyz says why")
        assert any("retriever" in reason for reason in why)
        until(lambda: client.ready().status == "ok", 60, "the generator ready again, by itself")
        back = len(asked.outcomes)
        until(lambda: len(asked.outcomes) >= back + 12, 60, "answers afterwards")
        recovered = [outcome.got for outcome in asked.outcomes[back + 4 :]]

    assert all(isinstance(error, (UpstreamError, DeadlineExceeded, Unavailable)) for error in asked.errors)
    assert asked.slowest_s < TIMEOUT_MS / 1000 + GRACE_S
    for got in recovered:
        assert isinstance(got, AnswerResponse), got
        assert got.results[0].answers[0].text == paris


def test_a_retriever_that_hangs_costs_a_request_no_more_than_its_deadline(own_up: Up, paris: str) -> None:
    retriever = own_up.pid_of("retriever")
    with own_up.client() as client:
        os.kill(retriever, signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(RagError) as caught:
                client.answer(QUESTION, timeout_ms=1000)
            took_s = time.monotonic() - began
            until(lambda: client.ready().status == "unavailable", 15, "/readyz turns red")
        finally:
            os.kill(retriever, signal.SIGCONT)
        assert isinstance(caught.value, (DeadlineExceeded, UpstreamError))
        assert took_s < 1 + GRACE_S
        until(lambda: client.ready().status == "ok", 15, "ready again")
        assert client.answer(QUESTION).results[0].answers[0].text == paris


def test_questions_with_their_own_passages_need_no_retriever(own_up: Up) -> None:
    with own_up.client() as client:
        os.kill(own_up.pid_of("retriever"), signal.SIGSTOP)
        try:
            passage = OwnPassage(title="Paris", text="Paris is home to 1,234,567 people.")
            response = client.answer(QUESTION, passages=[passage], timeout_ms=20_000)
        finally:
            os.kill(own_up.pid_of("retriever"), signal.SIGCONT)
    assert response.results[0].answers[0].text == "1,234,567"
    assert response.index is None


def test_requests_in_flight_are_answered_when_the_pair_is_stopped(own_up: Up) -> None:
    with asking(own_up) as asked:
        until(lambda: len(asked.outcomes) >= 4, 60, "answers before the stop")
        stopped = time.monotonic()
        own_up.process.terminate()
        assert own_up.process.wait(60) == 0
    in_flight = [outcome.got for outcome in asked.outcomes if outcome.began < stopped < outcome.began + outcome.took_s]
    assert len(in_flight) >= 1
    assert all(isinstance(got, AnswerResponse) for got in in_flight), in_flight
    # Those that came later were sent away, or found nobody.
    assert all(isinstance(error, Unavailable) for error in asked.errors), asked.errors


def test_two_thousand_questions_of_whom_many_hang_up_leave_nothing_behind(
    up: Up, data_dir: Path, tmp_path: Path, paris: str
) -> None:
    dice = random.Random(0)
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 4},
        {"num_beams": 4, "strategy": "sequence"},
        {"do_sample": True, "provenance": "token"},
        {"choices": [paris, "nobody"]},
        {"timeout_ms": 40},
    ]

    async def one(client: AsyncRagClient, gate: asyncio.Semaphore, number: int) -> str:
        async with gate:
            try:
                if number % 4:  # most hang up while their documents are retrieved
                    async with asyncio.timeout(dice.uniform(0, 0.06)):
                        await client.search(QUESTION)
                else:
                    async with asyncio.timeout(dice.choice([0.01, 0.05, 0.2, 60])):
                        await client.answer(QUESTION, **dice.choice(options))
            except TimeoutError:
                return "hung up"
            except DeadlineExceeded:
                return "late"
            return "answered"

    async def all_of_them(url: str) -> list[str]:
        async with AsyncRagClient(url) as client:
            gate = asyncio.Semaphore(8)
            found = await asyncio.gather(*(one(client, gate, number) for number in range(2000)))
            answers = await asyncio.gather(*(client.answer(QUESTION) for _ in range(8)))
        assert {answer.results[0].answers[0].text for answer in answers} == {paris}
        return found

    # so few connections to the retriever that one which was lost would be missed
    own = Up.start(shutil.copytree(data_dir, tmp_path / "data"), GENERATOR_RETRIEVER_CONNECTIONS="2")
    try:
        process = psutil.Process(own.wait_until_ready().pid_of("generator"))
        idle_fds = process.num_fds()
        found = asyncio.run(all_of_them(own.url))
        assert min(found.count("answered"), found.count("hung up")) > 100, found
        until(lambda: "\ngenerator_running_questions 0.0" in httpx.get(f"{own.url}/metrics").text, 10, "nothing runs")
        until(lambda: process.num_fds() <= idle_fds + 2, 10, "no more is open than before, but two connections")
    finally:
        own.stop()
