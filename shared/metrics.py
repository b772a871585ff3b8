"""What Prometheus reads. Each app has its own registry, so that two can live in one process.

Names follow Prometheus' conventions: base units, `_total` for counters. Every label has few values: routes, not paths.
"""

import platform
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from shared.door import Door
from shared.errors import DeadlineExceeded, Overloaded
from shared.version import VERSION

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_REASONS = {Overloaded.status: "shed", DeadlineExceeded.status: "expired"}


class HttpMetrics:
    """Of the app as a whole; ``service`` becomes a label of the build's versions only."""

    def __init__(self, registry: CollectorRegistry, service: str, ready: Callable[[], bool]) -> None:
        ProcessCollector(registry=registry)
        build = Gauge(
            "rag_build_info", "1; the labels tell what runs.", ["service", "version", "python"], registry=registry
        )
        build.labels(service, VERSION, platform.python_version()).set(1)
        Gauge("rag_ready", "1 where /readyz says ok, else 0.", registry=registry).set_function(lambda: int(ready()))
        self._duration = Histogram(
            "http_request_duration_seconds",
            "Time from the request's head to the end of its response.",
            ["method", "route", "status"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("http_requests_in_flight", "Requests being answered.", registry=registry)
        dropped = Counter(
            "http_requests_dropped",
            "Requests without their answer: shed (429), expired (504), cancelled (the client went away).",
            ["reason"],
            registry=registry,
        )
        self._dropped = {reason: dropped.labels(reason) for reason in (*_REASONS.values(), "cancelled")}

    def answered(self, method: str, route: str, status: int, seconds: float, *, cancelled: bool) -> None:
        """A request is over."""
        self._duration.labels(method, route, str(status)).observe(seconds)
        reason = "cancelled" if cancelled else _REASONS.get(status)
        if reason is not None:
            self._dropped[reason].inc()


class DoorMetrics:
    def __init__(self, registry: CollectorRegistry, door: Door) -> None:
        inside = Gauge("door_inside", "Requests that are worked on.", registry=registry)
        inside.set_function(lambda: door.inside)
        waiting = Gauge("door_waiting", "Requests that wait for their turn.", registry=registry)
        waiting.set_function(lambda: door.waiting)


class ConnectionMetrics:
    def __init__(self, registry: CollectorRegistry, count: Callable[[], int]) -> None:
        Gauge("http_connections", "Connections that are open.", registry=registry).set_function(count)
        self.ended = Counter(
            "http_connections_ended", "Connections that were ended, by reason.", ["reason"], registry=registry
        )


class WorkerMetrics:
    """Of one device worker; ``name`` becomes a label."""

    def __init__(self, registry: CollectorRegistry, name: str) -> None:
        depth = Gauge("worker_queue_depth", "Items that wait for a batch.", ["worker"], registry=registry)
        size = Histogram(
            "worker_batch_size", "Sum of the sizes of a batch.", ["worker"], buckets=_SIZES, registry=registry
        )
        seconds = Histogram(
            "worker_batch_duration_seconds", "Time a batch ran.", ["worker"], buckets=_SECONDS, registry=registry
        )
        waited = Histogram(
            "worker_queue_duration_seconds", "Time an item waited.", ["worker"], buckets=_SECONDS, registry=registry
        )
        items = Counter("worker_items", "What became of items.", ["worker", "outcome"], registry=registry)
        self._depth, self._size, self._seconds = depth.labels(name), size.labels(name), seconds.labels(name)
        self._waited = waited.labels(name)
        outcomes = ("done", "failed", "shed", "expired", "cancelled")
        self._items = {outcome: items.labels(name, outcome) for outcome in outcomes}

    def watch_queue(self, depth: Callable[[], int]) -> None:
        self._depth.set_function(depth)

    def waited(self, seconds: float) -> None:
        self._waited.observe(seconds)

    def ran(self, size: int, seconds: float) -> None:
        self._size.observe(size)
        self._seconds.observe(seconds)

    def ended(self, outcome: str) -> None:
        """An item is out: done, failed, shed, expired or cancelled."""
        self._items[outcome].inc()
