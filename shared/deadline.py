"""A point in time by which a request must have ended; handed down the call, never restarted."""

import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Self

from shared.errors import DeadlineExceeded

ARRIVED_S: ContextVar[float | None] = ContextVar("arrived_s", default=None)
"""When the request that is being answered had arrived, on the monotonic clock; None outside of one."""


@dataclass(frozen=True)
class Deadline:
    """``at_s`` is on the monotonic clock, so that a change of the wall clock moves no deadline."""

    at_s: float

    @classmethod
    def after(cls, timeout_ms: float | None, default_ms: float) -> Self:
        """``timeout_ms`` after the request arrived (or from now), ``default_ms`` where the caller named none."""
        arrived_s = ARRIVED_S.get()
        begins_s = time.monotonic() if arrived_s is None else arrived_s
        return cls(begins_s + (default_ms if timeout_ms is None else timeout_ms) / 1000)

    @property
    def remaining_s(self) -> float:
        """Seconds left; zero or below when the time is up."""
        return self.at_s - time.monotonic()

    @property
    def expired(self) -> bool:
        return self.remaining_s <= 0

    def check(self, doing: str) -> None:
        """Raises: DeadlineExceeded, naming what was about to be done."""
        if self.expired:
            raise DeadlineExceeded(f"the deadline passed before {doing}")
