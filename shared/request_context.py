"""The layer around all work: names each request, sees it end, and turns whatever was raised into the error form."""

import asyncio
import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

import structlog
from opentelemetry.trace import Tracer
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.drain import Drain
from shared.errors import RagError, Unavailable
from shared.metrics import HttpMetrics
from shared.responses import REQUEST_ID, error_response
from shared.telemetry import joined, response_ends

log = structlog.get_logger("http")

# Visible ASCII: what goes into a header and a log line must not be able to end either.
_SANE_ID = re.compile(rb"[!-~]{1,128}")
_KNOWN_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"}
_POLLED = frozenset({"/livez", "/readyz", "/metrics"})
_CLIENT_GONE = 499  # nginx's number; it reaches logs and metrics only


class RequestContext:
    def __init__(self, app: ASGIApp, *, metrics: HttpMetrics, drain: Drain, tracer: Tracer | None) -> None:
        self.app = app
        self.metrics = metrics
        self.drain = drain
        self.tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id", b""))
        scope[REQUEST_ID] = request_id
        response = _Response(send, request_id, self.drain)
        began_s = time.perf_counter()
        with joined(headers, self.tracer) as trace_id, self.metrics.in_flight.track_inprogress():
            ids = {"request_id": request_id} if trace_id is None else {"request_id": request_id, "trace_id": trace_id}
            with structlog.contextvars.bound_contextvars(**ids):
                try:
                    await self._answer(scope, receive, response)
                finally:
                    self._record(scope, response, time.perf_counter() - began_s)

    async def _answer(self, scope: Scope, receive: Receive, response: "_Response") -> None:
        try:
            await self.app(scope, receive, response.send)
        except RagError as error:
            await response.fail(error, scope, receive)
        except asyncio.CancelledError:
            # The server gives up waiting for us; the client still deserves to hear it.
            await response.fail(Unavailable("the service stopped before the request was done"), scope, receive)
            raise
        except Exception:
            log.exception("request_crashed")
            await response.fail(RagError("an internal error; the log has the trace"), scope, receive)

    def _record(self, scope: Scope, response: "_Response", seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None)
        method = scope["method"] if scope["method"] in _KNOWN_METHODS else "other"
        status = response.status or _CLIENT_GONE
        # An unknown path is logged, but no label: anyone could make endless series of it.
        self.metrics.answered(method, route or "none", status, seconds, cancelled=not response.ended)
        known: MutableMapping[str, Any] = {"route": route} if route else {"path": scope["path"][:200]}
        # What is polled every second would bury the rest.
        say = log.debug if route in _POLLED and status < 400 else log.info
        say("request", method=method, **known, status=status, duration_ms=round(seconds * 1000, 2))


class _Response:
    """Passes a response on, with the headers that every response has, and remembers how far it got."""

    def __init__(self, send: Send, request_id: str, drain: Drain) -> None:
        self._send = send
        self._request_id = request_id
        self._drain = drain
        self.status: int | None = None
        self.ended = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._request_id
            if self._drain.draining:
                headers["Connection"] = "close"
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.ended = True
            response_ends()
        await self._send(message)

    async def fail(self, error: RagError, scope: Scope, receive: Receive) -> None:
        if self.status is not None:
            # The head is out: nothing can be said any more. Ending here closes the connection, which a client
            # that counts the announced bytes or chunks notices.
            self.ended = True
            log.warning("response_cut_short", code=error.code)
            return
        await error_response(error, scope)(scope, receive, self.send)


def _request_id(given: bytes) -> str:
    return given.decode("ascii") if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
