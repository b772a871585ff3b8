"""How long each step of a request took, waiting included."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Histogram


class Timings:
    """Milliseconds a step, in the order of the steps; seconds go to the histogram, by the label ``stage``."""

    def __init__(self, seconds: Histogram) -> None:
        self._seconds = seconds
        self._began_s = time.perf_counter()
        self._steps_ms: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        began_s = time.perf_counter()
        with self._seconds.labels(name).time():
            yield
        self._steps_ms[name] = _ms_since(began_s)

    def total(self) -> dict[str, float]:
        """The steps so far, and ``total`` since this object was made."""
        return {**self._steps_ms, "total": _ms_since(self._began_s)}


def _ms_since(began_s: float) -> float:
    return round((time.perf_counter() - began_s) * 1000, 3)
