"""How long each step of a request took, waiting included: for its answer, the metrics and its trace."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.trace import Span

from generator_svc.metrics import GeneratorMetrics
from shared.telemetry import Attributes, stage


class Timings:
    """Milliseconds a step, in the order of the steps. ``began_s`` is the request's beginning."""

    def __init__(self, metrics: GeneratorMetrics) -> None:
        self._metrics = metrics
        self.began_s = time.perf_counter()
        self._steps_ms: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, attributes: Attributes | None = None) -> Iterator[Span]:
        began_s = time.perf_counter()
        try:
            with stage(name, attributes) as span:
                yield span
        finally:
            self._metrics.stage(name, time.perf_counter() - began_s)
        self._steps_ms[name] = _ms_since(began_s)

    def total(self) -> dict[str, float]:
        """The steps so far, and ``total`` since this object was made."""
        return {**self._steps_ms, "total": _ms_since(self.began_s)}


def _ms_since(began_s: float) -> float:
    return round((time.perf_counter() - began_s) * 1000, 3)
