"""The smallest service on the chassis: echoes, keeps items, waits, fails. Also a program, for real processes."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from fastapi import Depends, FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from shared.app import create_base_app, raises, request_deadline, requires
from shared.errors import ERRORS_BY_CODE, Conflict, NotFound, StartupError
from shared.schemas import NonNegative, Request, ServiceInfo, Wire
from shared.server import run
from shared.settings import ServiceSettings

log = structlog.get_logger(__name__)


class TinySettings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="TINY_")


class EchoRequest(Request):
    text: str = Field(max_length=1000)
    times: NonNegative = Field(default=1, description="At most ten.")
    weights: list[float] = Field(default=[], max_length=8)


class Echo(Wire):
    text: str
    times: int


class Slept(Wire):
    seconds: float


def create_tiny_app(settings: ServiceSettings | None = None, **options: Any) -> FastAPI:
    settings = settings or TinySettings()
    reasons: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.reasons = reasons
        app.state.cancelled = 0
        if problem := os.environ.get("STARTUP_PROBLEM"):
            raise StartupError(problem)
        yield
        log.info("lifespan_ended")

    def info() -> ServiceInfo:
        return ServiceInfo(service="retriever", version="1", versions={}, device="cpu", limits={})

    app = create_base_app(
        settings, service="retriever", lifespan=lifespan, readiness=lambda: list(reasons), info=info, **options
    )

    @app.post("/v1/echo", responses=raises(NotFound))
    async def echo(request: EchoRequest) -> Echo:
        request_deadline(request.timeout_ms, settings)
        if request.times > 10:
            raise NotFound("nobody repeats that often", param="times")
        return Echo(text=request.text * request.times, times=request.times)

    @app.get("/v1/items/{item_id}", responses=raises(NotFound))
    async def item(item_id: int) -> Echo:
        if item_id != 1:
            raise NotFound(f"there is no item {item_id}", param="item_id")
        return Echo(text="one", times=1)

    @app.delete("/v1/items/{item_id}", dependencies=[Depends(requires("admin"))], responses=raises(Conflict))
    async def delete_item(item_id: int) -> Echo:
        if item_id != 1:
            raise Conflict("only the first item can go")
        return Echo(text="one", times=0)

    @app.post("/v1/sleep", include_in_schema=False)
    async def sleep(slept: Slept) -> Slept:
        try:
            await asyncio.sleep(slept.seconds)
        except asyncio.CancelledError:
            app.state.cancelled += 1
            raise
        return slept

    @app.get("/v1/raise/{code}", include_in_schema=False)
    async def raise_error(code: str) -> None:
        raise ERRORS_BY_CODE[code]("on purpose", param="code", retry_after_s=2.5)

    @app.get("/v1/large", include_in_schema=False)
    async def large() -> PlainTextResponse:
        return PlainTextResponse("x" * 2**24)

    @app.get("/v1/crash", include_in_schema=False)
    async def crash() -> None:
        raise KeyError("the secret of the crash")

    return app


if __name__ == "__main__":
    sys.exit(run(TinySettings, create_tiny_app, grace_s=float(os.environ.get("CONNECTION_GRACE_S", "10"))))
