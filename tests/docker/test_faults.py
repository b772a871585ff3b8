"""Each container is paused, killed, taken off the network and run out of memory while questions come in.

Every question ends in time, with the right answer or an error of a class that says what happened; and once the cause is
gone, questions are answered again without anybody's help.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from services.client import Unreachable
from services.client.calls import Service
from shared.errors import DeadlineExceeded, Unavailable, UpstreamError
from tests.docker.asking import ENDS_WITHIN_S, Asked, answer, asking
from tests.docker.measured import measured
from tests.docker.stack import Stack
from tests.e2e.running import until

pytestmark = pytest.mark.docker
Fault = Callable[[Stack, Service], AbstractContextManager[None]]
Death = Callable[[Stack, Service], float]  # when it died

# What may come of a question while one of the two is away. The generator's own errors, 424, 503 and 504, where the
# retriever is; where the generator is, the client finds nobody (Unreachable), or waits in vain.
ERRORS: dict[Service, tuple[type[Exception], ...]] = {
    "retriever": (UpstreamError, Unavailable, DeadlineExceeded),
    "generator": (Unreachable, Unavailable, DeadlineExceeded, UpstreamError),
}


def check(asked: Asked, service: Service, right: str) -> None:
    assert asked.texts == {right}
    unexpected = [error for error in asked.errors if not isinstance(error, ERRORS[service])]
    assert unexpected == []
    if service == "retriever":
        assert not [error for error in asked.errors if isinstance(error, Unreachable)], "the generator went away too"
    assert asked.slowest_s < ENDS_WITHIN_S


@pytest.mark.parametrize("service", ["retriever", "generator"])
@pytest.mark.parametrize("fault", [Stack.paused, Stack.disconnected], ids=["paused", "disconnected"])
def test_what_is_cut_off_for_a_while(stack: Stack, paris: str, service: Service, fault: Fault) -> None:
    with asking(stack) as asked:
        until(lambda: asked.texts, 60, "an answer before anything breaks")
        with fault(stack, service):
            asked.wait_for_errors(4)
            if service == "retriever":
                with stack.client() as client:
                    until(lambda: client.ready().reasons, 20, "/readyz of the generator says why")
        recovery_s = asked.wait_for_recovery(since=time.time())
    check(asked, service, paris)
    _note(service, fault.__name__, recovery_s, asked)
    _all_is_well(stack, paris)


@pytest.mark.parametrize("service", ["retriever", "generator"])
@pytest.mark.parametrize("death", [Stack.kill, Stack.run_out_of_memory], ids=["killed", "out-of-memory"])
def test_what_dies_is_started_again(stack: Stack, paris: str, service: Service, death: Death) -> None:
    with asking(stack) as asked:
        until(lambda: asked.texts, 60, "an answer before anything breaks")
        died = death(stack, service)
        recovery_s = asked.wait_for_recovery(since=died)
    check(asked, service, paris)
    _note(service, death.__name__, recovery_s, asked)
    _all_is_well(stack, paris)


def test_a_retriever_that_was_stopped_is_an_upstream_error_until_it_is_started(stack: Stack, paris: str) -> None:
    with asking(stack) as asked:
        stack.compose("stop", "retriever")
        assert stack.inspect("retriever")["State"]["ExitCode"] == 0
        began = len(asked.errors)
        until(lambda: len(asked.errors) >= began + 4, 60, "questions fail")
        stack.compose("start", "retriever")
        recovery_s = asked.wait_for_recovery(since=time.time())
    check(asked, "retriever", paris)
    assert any(isinstance(error, UpstreamError) for error in asked.errors)
    _note("retriever", "stopped and started", recovery_s, asked)
    _all_is_well(stack, paris)


def _note(service: Service, fault: str, recovery_s: float, asked: Asked) -> None:
    figures = f"answers again after in {recovery_s:4.1f} s; slowest question {asked.slowest_s:.1f} s; {asked.summary}"
    measured(f"{service}, {fault.replace('_', ' ')}", figures)


def _all_is_well(stack: Stack, right: str) -> None:
    """Both are ready and healthy, through both published ports."""
    with stack.client() as client:
        until(lambda: {client.ready(service).status for service in ERRORS} == {"ok"}, 60, "both are ready")
        assert answer(client) == right
    stack.wait_until_healthy(*ERRORS)
