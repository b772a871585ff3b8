"""What both services get from the chassis, seen from outside through the smallest service on it."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from structlog.testing import capture_logs

from shared.errors import ERRORS_BY_CODE, RagError, StartupError, error_from_wire
from tests.chassis_app import TinySettings, create_tiny_app
from tests.conftest import ClientFor

JSON = {"Content-Type": "application/json"}
READER, ADMIN = "reader-key-1234", "admin-key-5678"


@pytest.fixture
def app() -> FastAPI:
    return create_tiny_app(TinySettings(max_body_bytes=4096, max_timeout_ms=60_000))


@pytest.fixture
async def http(app: FastAPI, client_for: ClientFor) -> AsyncIterator[httpx.AsyncClient]:
    async with client_for(app) as client:
        yield client


@pytest.fixture
async def guarded(client_for: ClientFor) -> AsyncIterator[httpx.AsyncClient]:
    settings = TinySettings(api_key=SecretStr(READER), admin_key=SecretStr(ADMIN))
    async with client_for(create_tiny_app(settings, open_paths=["/v1/sleep"])) as client:
        yield client


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert list(error) == ["type", "code", "message", "param", "request_id", "retryable"]
    assert error["request_id"] == response.headers["X-Request-ID"]
    return error


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls", sorted({c for c in ERRORS_BY_CODE.values() if c is not StartupError}, key=lambda c: c.code)
)
async def test_each_error_keeps_its_class_over_http(http: httpx.AsyncClient, cls: type[RagError]) -> None:
    response = await http.get(f"/v1/raise/{cls.code}")
    assert error_of(response, cls.status)["retryable"] == cls.retryable
    rebuilt = error_from_wire(response.status_code, response.json())
    assert type(rebuilt) is cls
    assert (rebuilt.message, rebuilt.param) == ("on purpose", "code")


@pytest.mark.parametrize("code", ["overloaded", "unavailable"])
async def test_a_temporary_refusal_says_when_to_come_back_in_whole_seconds(http: httpx.AsyncClient, code: str) -> None:
    assert (await http.get(f"/v1/raise/{code}")).headers["Retry-After"] == "3"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": 1}, "text"),
        ({"text": "a", "times": -1}, "times"),
        ({"text": "a", "times": 1.5}, "times"),
        ({"text": "a", "times": "1"}, "times"),
        ({"text": "a", "times": True}, "times"),
        ({"text": "a", "weights": [1, "2"]}, "weights.1"),
        ({"text": "a", "timeout_ms": 0}, "timeout_ms"),
        ({"text": "a", "timeout_ms": 60_001}, "timeout_ms"),
        ({"text": "a", "tiems": 1}, "tiems"),
    ],
)
async def test_a_refused_field_is_named(http: httpx.AsyncClient, body: object, param: str) -> None:
    assert error_of(await http.post("/v1/echo", json=body), 422)["param"] == param


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_a_number_that_is_not_finite_is_refused(http: httpx.AsyncClient, literal: str) -> None:
    body = f'{{"text": "a", "weights": [0, {literal}]}}'
    assert error_of(await http.post("/v1/echo", content=body, headers=JSON), 422)["param"] == "weights.1"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not valid JSON"),
        (b"", 422, "missing"),
        (b"[]", 422, "JSON object"),
        (b"\xff\xfe{}", 400, "not valid JSON"),
        (b'{"text": "\xff"}', 400, "not valid UTF-8, from byte 10 on"),
        (b"[" * 3000, 400, "nested too deeply"),
    ],
)
async def test_what_cannot_be_parsed_is_refused(http: httpx.AsyncClient, body: bytes, status: int, said: str) -> None:
    assert said in error_of(await http.post("/v1/echo", content=body, headers=JSON), status)["message"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application", None])
async def test_another_content_type_is_refused(http: httpx.AsyncClient, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    error = error_of(await http.post("/v1/echo", content=b'{"text": "a"}', headers=headers), 415)
    assert error["code"] == "unsupported_media_type"


async def test_what_was_sent_is_not_echoed_at_length(http: httpx.AsyncClient) -> None:
    for body in ({"text": "a", "x" * 3000: 1}, {"text": "a", "times": "y" * 3000}, {"text": "z" * 3000}):
        response = await http.post("/v1/echo", json=body)
        error_of(response, 422)
        assert len(response.content) < 1500


async def test_a_lone_surrogate_in_a_field_name_does_not_crash_the_answer(http: httpx.AsyncClient) -> None:
    error_of(await http.post("/v1/echo", content=b'{"text": "a", "\\ud800": 1}', headers=JSON), 422)


async def test_an_unknown_path_is_not_found(http: httpx.AsyncClient) -> None:
    assert error_of(await http.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(await http.get("/livez/"), 404)["code"] == "not_found"


async def test_another_method_is_answered_with_those_that_the_path_takes(http: httpx.AsyncClient) -> None:
    response = await http.put("/v1/items/1")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["Allow"] == "GET, DELETE"


async def test_a_crash_tells_the_log_and_nobody_else(http: httpx.AsyncClient) -> None:
    with capture_logs() as logs:
        response = await http.get("/v1/crash")
    assert error_of(response, 500)["code"] == "internal_error"
    assert "secret" not in response.text
    crash = next(entry for entry in logs if entry["event"] == "request_crashed")
    assert crash["exc_info"]


async def test_it_serves_on_after_a_crash(http: httpx.AsyncClient) -> None:
    await http.get("/v1/crash")
    assert (await http.post("/v1/echo", json={"text": "a", "times": 2})).json() == {"text": "aa", "times": 2}


# --- requests ----------------------------------------------------------------------------------------------


async def test_a_sane_request_id_is_kept_and_another_replaced(http: httpx.AsyncClient) -> None:
    assert (await http.get("/livez", headers={"X-Request-ID": "abc-1"})).headers["X-Request-ID"] == "abc-1"
    for insane in ("", "x" * 129, "with space", "tab\there", "é"):
        given = (await http.get("/livez", headers={b"X-Request-ID": insane.encode()})).headers["X-Request-ID"]
        assert given != insane
        assert len(given) == 32


async def test_a_stated_length_is_refused_before_the_body_is_read(http: httpx.AsyncClient) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"x"

    headers = {**JSON, "Content-Length": str(10**9)}
    response = await http.post("/v1/echo", content=body(), headers=headers)
    assert error_of(response, 413)["code"] == "payload_too_large"


async def test_a_body_without_a_length_is_counted_while_it_arrives(http: httpx.AsyncClient) -> None:
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(8):
            sent += 1024
            yield b" " * 1024

    response = await http.post("/v1/echo", content=body(), headers=JSON)
    assert error_of(response, 413)["code"] == "payload_too_large"
    assert response.headers["Connection"] == "close"


async def test_a_body_of_exactly_the_limit_is_taken(http: httpx.AsyncClient) -> None:
    body = json.dumps({"text": "a"}).encode().ljust(4096)
    assert (await http.post("/v1/echo", content=body, headers=JSON)).status_code == 200
    assert (await http.post("/v1/echo", content=body + b" ", headers=JSON)).status_code == 413


async def test_every_response_has_the_security_headers(http: httpx.AsyncClient) -> None:
    for path in ("/livez", "/metrics", "/nothing", "/v1/crash", "/openapi.json"):
        headers = (await http.get(path)).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "default-src 'none'" in headers["Content-Security-Policy"]


async def test_one_line_a_request_is_logged_with_the_route_and_not_the_path(http: httpx.AsyncClient) -> None:
    with capture_logs() as logs:
        await http.get("/v1/items/7")
    [line] = [entry for entry in logs if entry["event"] == "request"]
    assert (line["method"], line["route"], line["status"]) == ("GET", "/v1/items/{item_id}", 404)
    assert line["duration_ms"] >= 0


# --- health and metrics ------------------------------------------------------------------------------------


async def test_readiness_gives_its_reasons(app: FastAPI, http: httpx.AsyncClient) -> None:
    assert (await http.get("/readyz")).json() == {"status": "ok", "reasons": []}
    app.state.reasons.append("the worker died")
    response = await http.get("/readyz")
    assert response.status_code == 503
    assert response.json() == {"status": "unavailable", "reasons": ["the worker died"]}
    assert (await http.get("/livez")).status_code == 200


async def test_requests_are_counted_by_route_and_unknown_paths_as_one(http: httpx.AsyncClient) -> None:
    for path in ("/v1/items/1", "/v1/items/2", "/v1/items/3", "/a", "/b"):
        await http.get(path)
    text = (await http.get("/metrics")).text
    counted = 'http_request_duration_seconds_count{method="GET",route='
    assert counted + '"/v1/items/{item_id}",status="200"} 1.0' in text
    assert counted + '"/v1/items/{item_id}",status="404"} 2.0' in text
    assert counted + '"none",status="404"} 2.0' in text
    assert "http_requests_in_flight 1.0" in text


async def test_two_apps_in_one_process_count_apart(client_for: ClientFor) -> None:
    async with client_for(create_tiny_app()) as one, client_for(create_tiny_app()) as other:
        await one.get("/v1/items/1")
        assert "/v1/items/{item_id}" in (await one.get("/metrics")).text
        assert "/v1/items/{item_id}" not in (await other.get("/metrics")).text


# --- keys --------------------------------------------------------------------------------------------------


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer(""),
        bearer(READER + "x"),
        {"Authorization": READER},
        {"Authorization": f"Basic {READER}"},
    ],
)
async def test_without_a_valid_key_nothing_but_the_open_paths_answers(
    guarded: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    for path in ("/info", "/v1/items/1", "/openapi.json", "/nothing"):
        response = await guarded.get(path, headers=headers)
        assert error_of(response, 401)["code"] == "unauthorized"
        assert response.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/livez", "/readyz", "/metrics"):
        assert (await guarded.get(path, headers=headers)).status_code == 200
    assert (await guarded.post("/v1/sleep", json={"seconds": 0}, headers=headers)).status_code == 200


async def test_the_read_only_key_reads(guarded: httpx.AsyncClient) -> None:
    assert (await guarded.get("/v1/items/1", headers=bearer(READER))).status_code == 200
    assert error_of(await guarded.delete("/v1/items/1", headers=bearer(READER)), 403)["code"] == "forbidden"


async def test_the_admin_key_does_everything(guarded: httpx.AsyncClient) -> None:
    assert (await guarded.get("/v1/items/1", headers=bearer(ADMIN))).status_code == 200
    assert (await guarded.delete("/v1/items/1", headers=bearer(ADMIN))).status_code == 200


async def test_without_keys_in_the_settings_everything_is_open(http: httpx.AsyncClient) -> None:
    assert (await http.delete("/v1/items/1")).status_code == 200


async def test_the_document_declares_keys_only_where_they_are_asked_for(
    http: httpx.AsyncClient, guarded: httpx.AsyncClient
) -> None:
    assert "securitySchemes" not in (await http.get("/openapi.json")).text
    paths = (await guarded.get("/openapi.json", headers=bearer(READER))).json()["paths"]
    assert "security" in paths["/v1/echo"]["post"]
    assert "security" not in paths["/livez"]["get"]
    assert "403" in paths["/v1/items/{item_id}"]["delete"]["responses"]
    assert "403" not in paths["/v1/items/{item_id}"]["get"]["responses"]


async def test_keys_are_not_logged(client_for: ClientFor) -> None:
    settings = TinySettings(api_key=SecretStr(READER))
    with capture_logs() as logs:
        async with client_for(create_tiny_app(settings)) as http:
            await http.get("/v1/crash", headers=bearer(READER))
            await http.get("/v1/items/1", headers=bearer("another-key"))
    assert READER not in f"{logs} {settings!r}"
    assert "another-key" not in str(logs)


# --- drain and disconnect ----------------------------------------------------------------------------------


async def test_draining_refuses_new_requests_and_turns_readiness_red(app: FastAPI, http: httpx.AsyncClient) -> None:
    running = asyncio.create_task(http.post("/v1/sleep", json={"seconds": 1}))
    await asyncio.sleep(0.05)
    app.state.drain.begin()
    refused = await http.get("/v1/items/1")
    assert error_of(refused, 503)["code"] == "unavailable"
    assert refused.headers["Retry-After"] == "1"
    assert refused.headers["Connection"] == "close"
    assert (await http.get("/readyz")).json()["reasons"] == ["the service is stopping"]
    assert (await http.get("/livez")).status_code == 200
    assert app.state.drain.in_flight == 1
    assert (await running).status_code == 200
    assert app.state.drain.in_flight == 0


async def test_the_work_of_a_client_that_left_is_cancelled(app: FastAPI) -> None:
    body = json.dumps({"seconds": 30}).encode()
    messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]
    gone = asyncio.Event()

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError(f"nobody is there to read {message}")

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/sleep", "query_string": b"", "headers": headers}
    async with app.router.lifespan_context(app):
        request = asyncio.create_task(app(scope, receive, send))
        await asyncio.sleep(0.05)
        with capture_logs() as logs:
            gone.set()
            await asyncio.wait_for(request, timeout=5)
    assert app.state.cancelled == 1
    assert logs[-1]["status"] == 499


# --- clients and their shares ------------------------------------------------------------------------------


@pytest.fixture
async def crowded(client_for: ClientFor) -> AsyncIterator[httpx.AsyncClient]:
    """Two requests at once, two may wait; half of either for one client."""
    settings = TinySettings(
        client_keys=SecretStr("web:web-key, batch:batch-key"),
        admin_key=SecretStr(ADMIN),
        max_concurrent=2,
        max_queue=2,
        max_body_bytes=1024,
        max_held_bytes=4096,
        client_share=0.5,
    )
    async with client_for(create_tiny_app(settings)) as client:
        yield client


async def asleep(http: httpx.AsyncClient, key: str, seconds: float = 0.3) -> "asyncio.Task[httpx.Response]":
    task = asyncio.create_task(http.post("/v1/sleep", json={"seconds": seconds}, headers=bearer(key)))
    await asyncio.sleep(0.02)
    return task


async def test_one_keys_flood_keeps_no_other_key_out(crowded: httpx.AsyncClient) -> None:
    flood = [await asleep(crowded, "batch-key") for _ in range(4)]
    polite = await crowded.post("/v1/echo", json={"text": "a"}, headers=bearer("web-key"))
    assert polite.status_code == 200
    answers = [await task for task in flood]
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429]
    refused = [answer for answer in answers if answer.status_code == 429]
    for answer in refused:
        assert error_of(answer, 429)["retryable"] is True
        assert answer.headers["Retry-After"] == "1"


async def test_what_is_looked_up_is_answered_however_much_is_asked(crowded: httpx.AsyncClient) -> None:
    flood = [await asleep(crowded, "batch-key") for _ in range(4)]
    assert (await crowded.get("/v1/items/1", headers=bearer("batch-key"))).status_code == 200
    await asyncio.gather(*flood)


async def test_a_request_that_cannot_come_in_is_refused_by_its_head(crowded: httpx.AsyncClient) -> None:
    flood = [await asleep(crowded, "batch-key") for _ in range(3)]
    read = False

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read = True
        yield b"{}"

    headers = {**JSON, **bearer("batch-key")}
    assert (await crowded.post("/v1/echo", content=body(), headers=headers)).status_code == 429
    assert not read
    await asyncio.gather(*flood)


async def test_bodies_of_one_client_take_its_share_of_the_memory_only(crowded: httpx.AsyncClient) -> None:
    begun, enough = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b" " * 900
        begun.set()
        await enough.wait()
        yield b"{}"

    async def held(key: str) -> int:
        response = await crowded.post("/v1/echo", content=slow(), headers={**JSON, **bearer(key)})
        return response.status_code

    holding = [asyncio.create_task(held("batch-key")) for _ in range(2)]
    await begun.wait()
    await asyncio.sleep(0.05)
    assert await held("batch-key") == 429
    other = await crowded.post("/v1/echo", json={"text": "a" * 900}, headers=bearer("web-key"))
    assert other.status_code == 200
    enough.set()
    assert await asyncio.gather(*holding) == [422, 422]


async def test_waiting_for_a_turn_counts_towards_the_deadline(client_for: ClientFor) -> None:
    settings = TinySettings(max_concurrent=1, client_share=1.0, default_timeout_ms=100)
    async with client_for(create_tiny_app(settings)) as http:
        first = asyncio.create_task(http.post("/v1/sleep", json={"seconds": 0.5}))
        await asyncio.sleep(0.02)
        assert error_of(await http.post("/v1/sleep", json={"seconds": 0}), 429)["code"] == "overloaded"
        assert (await first).status_code == 200


async def test_each_named_key_reads_and_none_administers(crowded: httpx.AsyncClient) -> None:
    for key in ("web-key", "batch-key"):
        assert (await crowded.get("/v1/items/1", headers=bearer(key))).status_code == 200
        error_of(await crowded.delete("/v1/items/1", headers=bearer(key)), 403)
    error_of(await crowded.get("/v1/items/1", headers=bearer("web-key,")), 401)
    error_of(await crowded.get("/v1/items/1", headers=bearer("web:web-key")), 401)


# --- other origins -----------------------------------------------------------------------------------------

ORIGIN = "https://app.example.org"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


async def test_pages_of_other_origins_may_not_call_by_default(http: httpx.AsyncClient) -> None:
    preflight = await http.options("/v1/echo", headers=PREFLIGHT)
    assert preflight.status_code == 405
    answer = await http.post("/v1/echo", json={"text": "a"}, headers={"Origin": ORIGIN})
    for response in (preflight, answer):
        assert not any(name.lower().startswith("access-control-") for name in response.headers)


async def test_an_allowed_origin_may_call_and_read_errors_and_no_other(client_for: ClientFor) -> None:
    settings = TinySettings(api_key=SecretStr(READER), cors_origins=f"{ORIGIN}, http://localhost:3000")
    async with client_for(create_tiny_app(settings)) as http:
        preflight = await http.options("/v1/echo", headers=PREFLIGHT)
        assert preflight.status_code == 200
        assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
        for key, status in ((READER, 200), ("wrong", 401)):
            response = await http.post("/v1/echo", json={"text": "a"}, headers={"Origin": ORIGIN, **bearer(key)})
            assert response.status_code == status
            assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
            assert "Access-Control-Allow-Credentials" not in response.headers
            assert response.headers["X-Content-Type-Options"] == "nosniff"
        foreign = await http.get("/v1/items/1", headers={"Origin": "https://evil.example", **bearer(READER)})
        assert "Access-Control-Allow-Origin" not in foreign.headers
        refused = await http.options("/v1/echo", headers={**PREFLIGHT, "Origin": "https://evil.example"})
        assert refused.status_code == 400
