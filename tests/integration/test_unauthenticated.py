"""Where keys are set, nothing that writes is done without one: every route of both services, as the app has them."""

import re
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from pydantic import SecretStr

from generator_svc.app import create_app as create_generator
from generator_svc.settings import GeneratorSettings
from retriever_svc.app import create_app as create_retriever
from retriever_svc.settings import RetrieverSettings

READER, ADMIN = "reader-1234", "admin-1234"
KEYS = {"api_key": SecretStr(READER), "admin_key": SecretStr(ADMIN)}
APPS = {
    "generator": create_generator(GeneratorSettings(**KEYS)),
    "retriever": create_retriever(RetrieverSettings(**KEYS)),
}
SAFE = {"GET", "HEAD", "OPTIONS"}
OPEN = {"/livez", "/readyz", "/metrics", "/", "/page/{name}"}
# What only reads although it is a POST: the question is too long for an address. A new route is not among them.
ONLY_READS = {
    ("generator", path)
    for path in ("/v1/answer", "/v1/score", "/v1/search", "/v1/encode", "/v1/chat/completions", "/v1/embeddings")
} | {("retriever", "/v1/retrieve")}


def routes(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Method and path of every route, those that are not in the OpenAPI document included."""
    for route in iter_route_contexts(app.routes):
        for method in sorted(route.methods or {"GET"}):
            yield method, route.path_format


EVERY = [(service, method, path) for service, app in APPS.items() for method, path in routes(app)]
CLOSED = [route for route in EVERY if route[2] not in OPEN]
WRITING = [(service, method, path) for service, method, path in EVERY if method not in SAFE]


async def send(service: str, method: str, path: str, key: str | None) -> httpx.Response:
    """Without the lifespan: no request may get as far as to need it."""
    address = re.sub(r"{.*?}", "1", path)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(APPS[service], raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        return await http.request(method, address, headers=headers)


def test_the_routes_are_those_that_the_services_have() -> None:
    assert len(WRITING) >= 15
    assert {(service, path) for service, _, path in WRITING} >= ONLY_READS
    assert ("retriever", "DELETE", "/v1/aliases/{alias}") in WRITING


@pytest.mark.parametrize("key", [None, "guessed", ADMIN[:-1]], ids=repr)
@pytest.mark.parametrize("route", CLOSED, ids=" ".join)
async def test_nothing_is_done_without_a_key(route: tuple[str, str, str], key: str | None) -> None:
    response = await send(*route, key)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("route", [r for r in WRITING if (r[0], r[2]) not in ONLY_READS], ids=" ".join)
async def test_a_reader_cannot_write(route: tuple[str, str, str]) -> None:
    response = await send(*route, READER)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden")
