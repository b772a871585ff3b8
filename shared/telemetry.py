"""Traces: one a question, through both services, sent to an OTLP collector. Off unless ``otlp_endpoint`` is set.

FastAPI opens a request's span and takes up the trace that its ``traceparent`` names. Within it the code names stages:

    with stage("encode"): ...               on the event loop
    trace = current_trace()                 handed with a job to a worker's thread; None where nothing is recorded
    trace.add("queue", began_s, ended_s, …) a stage that is over, from any thread

Where nothing is recorded, each of these costs the look at one context variable. Spans never hold what was asked or
answered, and of errors only their kind: messages may quote the request.
"""

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, MutableMapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from contextvars import ContextVar
from typing import TYPE_CHECKING

import httpx
from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from opentelemetry import context as otel_context
from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from shared.errors import RagError
from shared.settings import ServiceSettings
from shared.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

Attributes = Mapping[str, AttributeValue]
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_FLUSH_S = 5.0  # what a stop waits for a collector that does not answer
_EXPORT_TIMEOUT_S = 5.0
_W3C = TraceContextTextMapPropagator()
_recorder: ContextVar["_Recorder | None"] = ContextVar("recorder", default=None)
_nothing = nullcontext(INVALID_SPAN)


class Tracing:
    """The traces of one app; ``tracer`` is None where it makes none."""

    def __init__(self, settings: ServiceSettings, service: str) -> None:
        self._settings = settings
        self._provider = None if settings.otlp_endpoint is None else _provider(settings, service)
        self.tracer = None if self._provider is None else self._provider.get_tracer("rag-services", VERSION)

    def config(self, unseen: frozenset[str]) -> TelemetryConfig:
        """FastAPI's part: the span of each request, but for the paths ``unseen``."""
        return {
            "tracing": self._provider is not None,
            "tracer_provider": self._provider,
            "exclude": lambda scope: scope["path"] in unseen,
            "operation_spans": False,
            "metrics": False,
            "logs": False,
            "auto_configure": False,
        }

    def around(self, lifespan: Lifespan) -> Lifespan:
        """``lifespan``, with the sending of spans around it."""
        provider = self._provider
        return lifespan if provider is None else lambda app: self._exporting(provider, lifespan(app))

    @asynccontextmanager
    async def _exporting(
        self, provider: "TracerProvider", inner: AbstractAsyncContextManager[None]
    ) -> AsyncIterator[None]:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415  see _provider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        exporter = OTLPSpanExporter(f"{self._settings.otlp_endpoint}/v1/traces", timeout=_EXPORT_TIMEOUT_S)
        provider.add_span_processor(BatchSpanProcessor(exporter))  # sends from a thread of its own
        try:
            async with inner:
                yield
        finally:
            # Not a thread of the pool: one that waits for a dead collector would keep the process from ending.
            flush = threading.Thread(target=provider.shutdown, name="telemetry-flush", daemon=True)
            flush.start()
            await asyncio.to_thread(flush.join, _FLUSH_S)


def _provider(settings: ServiceSettings, service: str) -> "TracerProvider":
    # Imported here: who makes no traces does not pay for the SDK, either.
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased  # noqa: PLC0415

    about = {
        "service.name": settings.otlp_service_name or f"rag-{service}",
        "service.version": VERSION,
        "service.instance.id": str(uuid.uuid4()),
    }
    sampler = ParentBased(TraceIdRatioBased(settings.otlp_sample_ratio))
    return TracerProvider(sampler, Resource.create(about), shutdown_on_exit=False)


class _Recorder:
    """Of one request whose span is recorded. Belongs to the event loop.

    What lies before the first stage is the stage ``receive``, what lies behind the last one is ``respond``.
    """

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self.tracer = tracer
        self._context = otel.set_span_in_context(span)
        self._began_ns: int | None = getattr(span, "start_time", None)
        self._idle_since_ns: int | None = None

    def stage_begins(self, at_ns: int) -> None:
        if self._began_ns is not None:
            self.tracer.start_span("receive", self._context, start_time=self._began_ns).end(at_ns)
            self._began_ns = None

    def stage_ended(self, at_ns: int) -> None:
        self._idle_since_ns = at_ns

    def response_ends(self) -> None:
        if self._idle_since_ns is not None:
            self.tracer.start_span("respond", self._context, start_time=self._idle_since_ns).end()
            self._idle_since_ns = None


@contextmanager
def joined(headers: Mapping[bytes, bytes], tracer: Tracer | None) -> Iterator[str | None]:
    """Within: the request's stages are recorded, if its span is. Gives the trace's id, where it belongs to a trace.

    A service that makes no traces passes on the one that it was called with.
    """
    if tracer is None and b"traceparent" not in headers:
        yield None
        return
    passed_on = None
    if tracer is None:
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
        passed_on = otel_context.attach(_W3C.extract(carrier))
    span = otel.get_current_span()
    recorder = _recorder.set(None if tracer is None or not span.is_recording() else _Recorder(tracer, span))
    about = span.get_span_context()
    try:
        yield otel.format_trace_id(about.trace_id) if about.is_valid else None
    finally:
        _recorder.reset(recorder)
        if passed_on is not None:
            otel_context.detach(passed_on)


def response_ends() -> None:
    """Called when the last of the response goes out."""
    if (recorder := _recorder.get()) is not None:
        recorder.response_ends()


def stage(
    name: str, attributes: Attributes | None = None, *, kind: SpanKind = SpanKind.INTERNAL
) -> AbstractContextManager[Span]:
    """A span around a block of the request's own task."""
    recorder = _recorder.get()
    return _nothing if recorder is None else _span(recorder, name, attributes, kind)


@contextmanager
def _span(recorder: _Recorder, name: str, attributes: Attributes | None, kind: SpanKind) -> Iterator[Span]:
    recorder.stage_begins(time.time_ns())
    with recorder.tracer.start_as_current_span(
        name, kind=kind, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield span
        except BaseException as error:
            span.set_attribute("error.type", error.code if isinstance(error, RagError) else type(error).__name__)
            span.set_status(StatusCode.ERROR)
            raise
    recorder.stage_ended(time.time_ns())


class Trace:
    """A place in a trace, where stages are added that ran elsewhere.

    A thread only notes them: making spans takes time that the next batch waits for. :meth:`flush` makes them, on the
    event loop.
    """

    __slots__ = ("_context", "_over", "_recorder")

    def __init__(self, recorder: _Recorder, context: Context) -> None:
        self._recorder = recorder
        self._context = context
        self._over: list[tuple[str, float, float, Attributes]] = []

    def add(self, name: str, began_s: float, ended_s: float, attributes: Attributes) -> None:
        """A stage that is over; its times are those of ``time.perf_counter``."""
        self._over.append((name, began_s, ended_s, attributes))

    def flush(self) -> None:
        """Makes spans of what was added."""
        zero_ns = time.time_ns() - time.perf_counter_ns()
        for name, began_s, ended_s, attributes in sorted(self._over, key=lambda over: over[1]):
            began_ns, ended_ns = (zero_ns + round(at_s * 1e9) for at_s in (began_s, ended_s))
            self._recorder.stage_begins(began_ns)
            span = self._recorder.tracer.start_span(name, self._context, attributes=attributes, start_time=began_ns)
            span.end(ended_ns)
            self._recorder.stage_ended(ended_ns)
        self._over.clear()


def current_trace() -> Trace | None:
    """Where the request's task is now; None where nothing is recorded."""
    recorder = _recorder.get()
    return None if recorder is None else Trace(recorder, otel_context.get_current())


def pass_on(headers: MutableMapping[str, str]) -> None:
    """Adds ``traceparent`` and ``tracestate`` to the headers of a call, if this request belongs to a trace."""
    _W3C.inject(headers)


def http_attributes(method: str, url: httpx.URL) -> dict[str, AttributeValue]:
    """Of a call; user and password of the URL are left out."""
    return {
        "http.request.method": method,
        "url.full": str(url.copy_with(userinfo=b"")),
        "server.address": url.host,
        "server.port": url.port or {"http": 80, "https": 443}[url.scheme],
    }
