"""Clients that are slow, many or wrong, over raw sockets against a real process."""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.tiny_process import Start, start

__all__ = ["start"]
pytestmark = pytest.mark.slow
ECHO = b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
QUICK = {"TINY_HEADER_TIMEOUT_S": "0.5", "TINY_MIN_BYTES_PER_S": "1000000", "TINY_IDLE_TIMEOUT_S": "1"}
NO_GRACE = {"CONNECTION_GRACE_S": "1"}


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.settimeout(20)
    return connection


def received(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65536):
            answer += data
    return answer


def error_of(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    for header in (b"X-Content-Type-Options: nosniff", b"X-Request-ID: ", b"Connection: close"):
        assert header in head
    error = json.loads(body)["error"]
    assert list(error) == ["type", "code", "message", "param", "request_id", "retryable"]
    return int(head.split()[1]), error


@contextlib.contextmanager
def many(url: str, count: int, send: bytes) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(url)) for _ in range(count)]
        for connection in connections:
            connection.sendall(send)
        yield connections


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_a_head_that_never_ends_is_cut_off(start: Start) -> None:
    url = start(**QUICK).url
    with connect(url) as connection:
        with contextlib.suppress(ConnectionError):
            for _ in range(200):  # one more header whenever a server might lose patience
                connection.sendall(b"X-More: 1\r\n" if _ else ECHO)
                time.sleep(0.02)
                connection.settimeout(0.001)
                with contextlib.suppress(TimeoutError):
                    answer = connection.recv(65536)
                    break
        status, error = error_of(answer)
    assert (status, error["code"]) == (408, "request_timeout")
    assert httpx.get(f"{url}/livez").status_code == 200


def test_a_connection_that_says_nothing_is_closed(start: Start) -> None:
    with connect(start(**QUICK).url) as connection:
        assert received(connection) == b""


def test_a_connection_without_a_further_request_is_closed(start: Start) -> None:
    with connect(start(**QUICK).url) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_a_body_that_trickles_is_cut_off_and_holds_nobody_up(start: Start) -> None:
    url = start(**QUICK, **NO_GRACE, TINY_MAX_CONCURRENT="1").url
    with connect(url) as connection:
        connection.sendall(ECHO + b'Content-Length: 100000\r\n\r\n{"text": "')
        # While its body is on the way it takes no room: the only place inside is free.
        assert httpx.post(f"{url}/v1/echo", json={"text": "a"}).status_code == 200
        status, error = error_of(received(connection))
    assert (status, error["code"]) == (408, "request_timeout")


def test_an_answer_that_nobody_reads_is_given_up(start: Start) -> None:
    service = start(**QUICK, **NO_GRACE)
    with connect(service.url) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(b"GET /v1/large HTTP/1.1\r\nHost: x\r\n\r\n")
        assert service.wait_for("connection_ended")["why"] == "the answer was read too slowly"


def test_a_head_that_is_too_large_is_refused(start: Start) -> None:
    url = start(TINY_MAX_HEADER_BYTES="4096").url
    for header in (b"X-Long: " + b"x" * 5000, b"\r\n".join(b"X-%d: xxxxxxxxxx" % i for i in range(400))):
        with connect(url) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n\r\n")
            status, error = error_of(received(connection))
        assert (status, error["code"]) == (431, "head_too_large")


def test_a_header_without_an_end_is_never_held(start: Start) -> None:
    service = start(TINY_MAX_HEADER_BYTES="65536")
    sent = 0
    with connect(service.url) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Endless: ")
        with contextlib.suppress(ConnectionError):
            while sent < 2**28:
                connection.sendall(b"x" * 2**16)
                sent += 2**16
    assert sent < 2**24


@pytest.mark.parametrize("nonsense", [b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00" * 9])
def test_what_is_not_http_gets_an_error_in_our_form(start: Start, nonsense: bytes) -> None:
    with connect(start().url) as connection:
        connection.sendall(nonsense)
        status, error = error_of(received(connection))
    assert (status, error["code"]) == (400, "bad_request")


def test_an_address_has_a_share_of_the_connections_only(start: Start) -> None:
    url = start(TINY_MAX_CONNECTIONS="8", TINY_CLIENT_SHARE="0.5").url
    with many(url, 4, ECHO), connect(url) as one_too_many:
        status, error = error_of(received(one_too_many))
    assert (status, error["code"]) == (429, "overloaded")


def test_a_full_house_closes_an_idle_connection_for_a_new_one(start: Start) -> None:
    url = start(TINY_MAX_CONNECTIONS="4", TINY_CLIENT_SHARE="1").url
    with many(url, 4, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n") as idle:
        assert all(connection.recv(65536).startswith(b"HTTP/1.1 200 ") for connection in idle)
        time.sleep(1.1)  # a connection that was used a moment ago may be used again
        assert httpx.get(f"{url}/livez").status_code == 200
    with many(url, 4, ECHO), connect(url) as one_too_many:
        status, error = error_of(received(one_too_many))
    assert (status, error["code"]) == (503, "unavailable")


def test_half_open_connections_leave_the_service_usable(start: Start) -> None:
    url = start(**QUICK, TINY_MAX_CONNECTIONS="64").url
    with many(url, 40, ECHO):
        assert httpx.post(f"{url}/v1/echo", json={"text": "a"}).status_code == 200
        until(lambda: connections(url) == 1)


def connections(url: str) -> int:
    text = httpx.get(f"{url}/metrics").text
    return next(int(float(line.split()[1])) for line in text.splitlines() if line.startswith("http_connections "))
