"""What tests of every kind share."""

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import httpx
import pytest
import structlog
from fastapi import FastAPI
from hypothesis import HealthCheck, settings

# No test's verdict hangs on time: machines are shared.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

ClientFor = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]


def pytest_configure() -> None:
    # structlog's default prints tracebacks with every local variable: half a second each.
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["level", "event"]),
        ]
    )


@pytest.fixture
def client_for() -> ClientFor:
    """``async with client_for(app) as http:`` runs the lifespan, which ASGITransport alone does not."""

    @contextlib.asynccontextmanager
    async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as http,
        ):
            yield http

    return client
