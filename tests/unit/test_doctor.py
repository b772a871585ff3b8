"""The doctor's checks where a real fault would take a second machine: clocks, versions, what is no service of ours."""

import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from typing import Any

import pytest

from services.doctor import Deployment, examination, examine
from services.doctor.finding import Finding
from shared.version import VERSION


@contextmanager
def service(name: str, *, version: str = VERSION, ahead_s: float = 0, reasons: tuple[str, ...] = ()) -> Iterator[str]:
    """A server that says what a service says, with a clock of its own."""
    health = {"status": "unavailable" if reasons else "ok", "reasons": list(reasons)}
    info = {"service": name, "version": version, "versions": {}, "device": "cpu", "limits": {}}
    bodies = {"/readyz": health, "/info": info, "/v1/collections": {"collections": []}}
    with serving(bodies, ahead_s) as url:
        yield url


@contextmanager
def serving(bodies: dict[str, Any], ahead_s: float = 0) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = json.dumps(bodies.get(self.path, "?")).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time.time() + ahead_s, usegmt=True)

        def log_message(self, *_: Any) -> None:
            """Not onto the output."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def neighbours(generator: str, retriever: str) -> list[Finding]:
    deployment = Deployment(frozenset(), generator, retriever)
    return list(examination.neighbours.check(deployment))


def problems(findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings if finding.status == "problem"]


def test_services_that_agree_are_well() -> None:
    with service("generator") as generator, service("retriever") as retriever:
        assert problems(neighbours(generator, retriever)) == []


@pytest.mark.parametrize(("ahead_s", "direction"), [(90, "ahead of"), (-90, "behind"), (1, None)])
def test_a_clock_that_is_off(ahead_s: float, direction: str | None) -> None:
    with service("generator", ahead_s=ahead_s) as generator, service("retriever") as retriever:
        found = problems(neighbours(generator, retriever))
    told = [re.fullmatch(r"the clock of the generator is (\d+) s (.*) this machine's", what) for what in found]
    assert [match and match[2] for match in told] == ([] if direction is None else [direction])
    assert all(match and abs(int(match[1]) - 90) <= 2 for match in told)  # whole seconds, and the way there


def test_services_of_two_versions() -> None:
    with service("generator", version="0.2.0") as generator, service("retriever") as retriever:
        [what] = problems(neighbours(generator, retriever))
    assert "two versions" in what


def test_what_is_not_ready_says_why() -> None:
    with service("generator", reasons=("the queue is on fire",)) as generator, service("retriever") as retriever:
        [what] = problems(neighbours(generator, retriever))
    assert "the queue is on fire" in what


def test_addresses_that_were_mixed_up() -> None:
    with service("generator") as generator, service("retriever") as retriever:
        first, second = problems(neighbours(retriever, generator))
    assert "the retriever answers, not the generator" in first
    assert "the generator answers, not the retriever" in second


def test_what_is_no_service_of_ours() -> None:
    with serving({}) as other, service("retriever") as retriever:
        [what] = problems(neighbours(other, retriever))
    assert "no service of ours" in what


def test_an_address_that_is_none() -> None:
    first, second = problems(neighbours("http://[", "ftp://x"))
    assert "cannot be reached" in first
    assert "cannot be reached" in second


def test_a_check_that_breaks_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Deployment) -> Iterator[Finding]:
        raise ZeroDivisionError("oh")
        yield

    monkeypatch.setattr(examination.ports, "check", broken)
    with service("generator") as generator, service("retriever") as retriever:
        report = examine(Deployment(frozenset(), generator, retriever))
    [problem] = report.problems
    assert (problem.check, "ZeroDivisionError" in problem.what) == ("ports", True)
    assert {finding.check for finding in report.findings} > {"software", "neighbours"}
