"""Stopping without breaking a request: those in flight finish, new ones are sent elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from shared.errors import Unavailable

STILL_ANSWERED = frozenset({"/livez", "/readyz", "/metrics"})  # whoever watches a stop reads these


class Drain:
    """Whether the service is stopping, and how many requests it still answers. Lives on the event loop."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0

    def begin(self) -> None:
        """Only sets a flag, so that a signal handler may call it."""
        self.draining = True

    @contextmanager
    def request(self) -> Iterator[None]:
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1


class DrainGate:
    """Refuses requests that come after the drain began."""

    def __init__(self, app: ASGIApp, *, drain: Drain) -> None:
        self.app = app
        self.drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in STILL_ANSWERED:
            await self.app(scope, receive, send)
        elif self.drain.draining:
            raise Unavailable("the service is stopping; try another instance, or again", retry_after_s=1)
        else:
            with self.drain.request():
                await self.app(scope, receive, send)
