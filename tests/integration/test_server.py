"""Starting and stopping, with real processes and real signals."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest

from tests.tiny_process import Start, start

__all__ = ["start"]


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_finishes_what_runs_and_sends_the_rest_elsewhere(start: Start, sig: signal.Signals) -> None:
    service = start()
    async with httpx.AsyncClient(base_url=service.url) as http:
        running = asyncio.create_task(http.post("/v1/sleep", json={"seconds": 4}))
        await asyncio.sleep(0.3)
        service.process.send_signal(sig)
        await asyncio.sleep(0.3)

        kept_alive = await http.get("/v1/items/1")
        async with httpx.AsyncClient(base_url=service.url) as newcomer:
            new = await newcomer.get("/v1/items/1")
            ready = await newcomer.get("/readyz")
        for refused in (kept_alive, new):
            assert refused.status_code == 503
            assert refused.headers["Retry-After"] == "1"
            assert refused.headers["Connection"] == "close"
        assert ready.json()["reasons"] == ["the service is stopping"]
        assert service.process.poll() is None

        assert (await running).status_code == 200
    assert service.process.wait(timeout=10) == 0
    assert [entry["event"] for entry in service.logged()][-2:] == ["lifespan_ended", "stopped"]


async def test_a_connection_opened_before_the_stop_is_told_too(start: Start) -> None:
    service = start()
    async with httpx.AsyncClient(base_url=service.url) as http, httpx.AsyncClient(base_url=service.url) as other:
        assert (await http.get("/livez")).status_code == 200
        running = asyncio.create_task(other.post("/v1/sleep", json={"seconds": 3}))
        await asyncio.sleep(0.3)
        service.process.terminate()
        await asyncio.sleep(0.2)
        assert (await http.get("/v1/items/1")).status_code == 503
        assert (await running).status_code == 200


async def test_a_stop_does_not_wait_longer_than_it_may(start: Start) -> None:
    service = start(TINY_DRAIN_TIMEOUT_S="0.5")
    async with httpx.AsyncClient(base_url=service.url) as http:
        running = asyncio.create_task(http.post("/v1/sleep", json={"seconds": 60}))
        await asyncio.sleep(0.3)
        service.process.terminate()
        began_s = time.monotonic()
        response = await running
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "unavailable"
        assert await asyncio.to_thread(service.process.wait, 10) == 0
        assert time.monotonic() - began_s < 6


def test_an_idle_service_stops_at_once(start: Start) -> None:
    service = start()
    with httpx.Client(base_url=service.url) as http:
        http.get("/livez")
        began_s = time.monotonic()
        service.process.terminate()
        assert service.process.wait(timeout=10) == 0
        assert time.monotonic() - began_s < 3


def test_a_start_that_cannot_succeed_says_why_and_exits_with_3(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cases = [
            ({"STARTUP_PROBLEM": "no such checkpoint: ./x"}, "no such checkpoint: ./x"),
            ({"TINY_PORT": str(taken.getsockname()[1])}, "set TINY_PORT to another port"),
            ({"TINY_HOST": "no.such.host.invalid"}, "no.such.host.invalid"),
            ({"TINY_PROT": "1"}, "TINY_PROT is set, but there is no such setting; did you mean TINY_PORT?"),
        ]
        for settings, message in cases:
            service = start(wait=False, **settings)
            assert service.process.wait(timeout=30) == 3
            log = service.log_path.read_text()
            assert message in log
            assert "Traceback" not in log


def test_every_line_of_the_log_is_json_with_the_request_it_belongs_to(start: Start) -> None:
    service = start()
    httpx.get(f"{service.url}/v1/crash", headers={"X-Request-ID": "crashing"})
    service.process.terminate()
    service.process.wait(timeout=10)
    lines = service.log_path.read_text().splitlines()
    of_request = [entry for entry in map(json.loads, lines) if entry.get("request_id") == "crashing"]
    assert [entry["event"] for entry in of_request] == ["request_crashed", "request"]
    assert "KeyError: 'the secret of the crash'" in of_request[0]["exception"]


def test_an_endless_body_is_refused_and_never_held(start: Start) -> None:
    service = start(TINY_MAX_BODY_BYTES="65536")
    memory_before = peak_memory_kb(service.process.pid)
    host, port = service.url.removeprefix("http://").split(":")
    sent = 0
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        connection.settimeout(10)
        chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
        with contextlib.suppress(OSError):  # at last the connection is closed under us
            while sent < 2**30:
                connection.sendall(chunk)
                sent += 2**20
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"payload_too_large"' in answer
    assert peak_memory_kb(service.process.pid) - memory_before < 64 * 2**10


def received(connection: socket.socket) -> bytes:
    answer = b""
    with contextlib.suppress(OSError):
        while data := connection.recv(65536):
            answer += data
    return answer


def peak_memory_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def test_traces_in_the_log_show_no_values_of_variables(start: Start) -> None:
    service = start(wait=False, TINY_LOG_FORMAT="console", TINY_PORT="0")
    until_s = time.monotonic() + 30
    while "listening" not in service.log_path.read_text() and time.monotonic() < until_s:
        time.sleep(0.02)
    url = re.findall(r"http://127\.0\.0\.1:\d+", service.log_path.read_text())[0]
    httpx.get(f"{url}/v1/crash", headers={"Authorization": "Bearer something-secret"})
    service.process.terminate()
    service.process.wait(timeout=10)
    log = service.log_path.read_text()
    assert "KeyError: 'the secret of the crash'" in log
    assert "something-secret" not in log
    assert "scope =" not in log
