"""What Prometheus reads. Each app has its own registry, so that two can live in one process."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Gauge, Histogram, ProcessCollector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class HttpMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        ProcessCollector(registry=registry)
        self.duration = Histogram(
            "http_request_duration_seconds",
            "Time from the request's head to the end of its response.",
            ["method", "route", "status"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("http_requests_in_flight", "Requests being answered.", registry=registry)


class WorkerMetrics:
    """Of one device worker; ``name`` becomes a label."""

    def __init__(self, registry: CollectorRegistry, name: str) -> None:
        self._depth = Gauge("worker_queue_depth", "Items that wait for a batch.", ["worker"], registry=registry)
        self._size = Histogram(
            "worker_batch_size", "Sum of the sizes of a batch.", ["worker"], buckets=_SIZES, registry=registry
        )
        self._seconds = Histogram(
            "worker_batch_duration_seconds", "Time a batch ran.", ["worker"], buckets=_SECONDS, registry=registry
        )
        self._name = name

    def watch_queue(self, depth: Callable[[], int]) -> None:
        self._depth.labels(self._name).set_function(depth)

    def ran(self, size: int, seconds: float) -> None:
        self._size.labels(self._name).observe(size)
        self._seconds.labels(self._name).observe(seconds)
