"""The FastAPI app that both services build on.

A request passes, from the outside in (the span of a trace is FastAPI's, around all of it: :mod:`shared.telemetry`):

1. :class:`SecurityHeaders`    and CORS headers, where origins are allowed: on every response
2. :class:`RequestContext`     gets its id, is counted and logged; every error that comes back out gets its wire form
3. :class:`DrainGate`          503 where the service is stopping
4. :class:`Authenticate`       401 without a valid key, where keys are set; whom the request is counted to
5. :class:`Knock`              429 where it would be refused at the door anyway
6. :class:`BodyLimit`          413, counted while the body arrives
7. :class:`CancelOnDisconnect` ends the work of a client that went away
8. :class:`Enter`              takes in the body and waits for the request's turn
9. the router, validation, and the route of the service
"""

import math
from collections.abc import Callable, Collection
from typing import Any, Literal

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from shared.admission import Enter, HeldBodies, Knock
from shared.auth import Authenticate, auth_is_on, requires
from shared.body_limit import BodyLimit
from shared.deadline import Deadline
from shared.disconnect import CancelOnDisconnect
from shared.door import Door
from shared.drain import STILL_ANSWERED, Drain, DrainGate
from shared.errors import InvalidRequest
from shared.metrics import DoorMetrics, HttpMetrics
from shared.openapi import describe, raises
from shared.request_context import RequestContext
from shared.responses import install_error_handlers
from shared.schemas import Health, ServiceInfo
from shared.security_headers import SecurityHeaders
from shared.settings import ServiceSettings
from shared.telemetry import Lifespan, Tracing
from shared.version import VERSION

__all__ = ["create_base_app", "raises", "request_deadline", "requires"]


def create_base_app(
    settings: ServiceSettings,
    *,
    service: Literal["retriever", "generator"],
    lifespan: Lifespan,
    readiness: Callable[[], list[str]],
    info: Callable[[], ServiceInfo],
    open_paths: Collection[str] = (),
    warnings: Callable[[], list[str]] = list,
) -> FastAPI:
    """An app with everything but the routes of the service.

    Args:
        lifespan: starts and stops what the service needs; ``app.state.registry`` is there for its metrics.
        readiness: why the service cannot answer now, one line a cause; empty when it can.
        info: the answer of ``/info``.
        warnings: what is wrong although the service can answer, one line each.
        open_paths: paths that need no key besides ``/livez``, ``/readyz`` and ``/metrics``.
    """
    tracing = Tracing(settings, service)
    app = FastAPI(
        title=f"rag {service}",
        version=VERSION,
        lifespan=tracing.around(lifespan),
        telemetry=tracing.config(unseen=STILL_ANSWERED),
        docs_url=None,  # FastAPI's pages load their scripts from a CDN
        redoc_url=None,
        redirect_slashes=False,  # an unknown path is a 404, not a guess
    )
    registry = CollectorRegistry()
    drain = Drain()

    def problems() -> list[str]:
        return (["the service is stopping"] if drain.draining else []) + readiness()

    app.state.settings = settings
    app.state.registry = registry
    app.state.drain = drain
    app.state.door = door = Door(
        max_inside=max(1, settings.max_concurrent),  # the generator's depends on its device, and is set when it has one
        max_waiting=settings.max_queue,
        share=settings.client_share,
        shed_after_s=settings.shed_after_ms / 1000 or math.inf,
    )
    DoorMetrics(registry, door)
    bodies = HeldBodies(settings.max_held_bytes, settings.client_share)
    opened = STILL_ANSWERED | frozenset(open_paths)

    install_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(Enter, door=door, bodies=bodies, patience_s=settings.default_timeout_ms / 1000)
    app.add_middleware(CancelOnDisconnect)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(Knock, door=door)
    app.add_middleware(Authenticate, settings=settings, open_paths=opened)
    app.add_middleware(DrainGate, drain=drain)
    metrics = HttpMetrics(registry, service, ready=lambda: not problems())
    app.add_middleware(RequestContext, metrics=metrics, drain=drain, tracer=tracing.tracer)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID", "traceparent", "tracestate"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    app.add_middleware(SecurityHeaders)
    _add_operational_routes(app, registry, problems, info, warnings=warnings)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app, auth=auth_is_on(settings), open_paths=opened)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    return app


def request_deadline(timeout_ms: int | None, settings: ServiceSettings) -> Deadline:
    """The deadline of a request that came in now.

    Raises: InvalidRequest: it asks for more than this service grants.
    """
    if timeout_ms is not None and timeout_ms > settings.max_timeout_ms:
        raise InvalidRequest(
            f"timeout_ms: {timeout_ms} is above this service's limit of {settings.max_timeout_ms}", param="timeout_ms"
        )
    return Deadline.after(timeout_ms, settings.default_timeout_ms)


def _add_operational_routes(
    app: FastAPI,
    registry: CollectorRegistry,
    problems: Callable[[], list[str]],
    info: Callable[[], ServiceInfo],
    *,
    warnings: Callable[[], list[str]],
) -> None:
    @app.get("/livez", tags=["operation"])
    async def livez() -> Health:
        """The process answers. Says nothing about whether it can do its work."""
        return Health(status="ok")

    @app.get(
        "/readyz",
        tags=["operation"],
        response_model=Health,
        responses={503: {"model": Health, "description": "It cannot; `reasons` say why."}},
    )
    async def readyz() -> Response:
        """Whether a request can be answered now."""
        reasons = problems()
        health = Health(status="unavailable" if reasons else "ok", reasons=reasons, warnings=warnings())
        return JSONResponse(
            health.model_dump(), 503 if reasons else 200, headers={"Retry-After": "1"} if reasons else None
        )

    @app.get(
        "/metrics",
        tags=["operation"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """In Prometheus' text form."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_1_0_0)

    @app.get("/info", tags=["operation"])
    async def service_info() -> ServiceInfo:
        """Versions, device, and every limit."""
        return info()
