"""The way through the door: refused by the head alone, or with the body at hand and one's turn come.

Only requests that make work pass it (``POST``, ``PUT``, ``PATCH``, ``DELETE`` under ``/v1/``). Health, metrics and what
is looked up is answered however much is asked.
"""

import time
from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.clients import CLIENT, client_of
from shared.deadline import ARRIVED_S
from shared.door import Door
from shared.errors import Overloaded

_WORK = frozenset({"POST", "PUT", "PATCH", "DELETE"})


def _makes_work(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["method"] in _WORK and scope["path"].startswith("/v1/")


class Knock:
    """Refuses what would be refused anyway, before its body is read."""

    def __init__(self, app: ASGIApp, *, door: Door) -> None:
        self.app = app
        self.door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _makes_work(scope):
            self.door.check(client_of(scope))
        await self.app(scope, receive, send)


class HeldBodies:
    """The memory for bodies of requests that wait or are worked on. A client holds no more than its share."""

    def __init__(self, max_bytes: int, share: float) -> None:
        self.max_bytes = max_bytes
        self.max_bytes_a_client = int(share * max_bytes)
        self._held: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self._held.total()

    def add(self, client: str, size: int) -> None:
        """Raises: Overloaded: there is no room for it now."""
        if self._held[client] + size > self.max_bytes_a_client or self.total + size > self.max_bytes:
            raise Overloaded("the bodies of other requests fill the memory for them; try again later", retry_after_s=1)
        self._held[client] += size

    def release(self, client: str, size: int) -> None:
        self._held[client] -= size
        if not self._held[client]:
            del self._held[client]


class Enter:
    """Takes in the whole body, waits for the request's turn, and passes it on.

    In this order, so that a client that sends slowly holds up nobody inside.
    """

    def __init__(self, app: ASGIApp, *, door: Door, bodies: HeldBodies, patience_s: float) -> None:
        self.app = app
        self.door = door
        self.bodies = bodies
        self.patience_s = patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _makes_work(scope):
            await self.app(scope, receive, send)
            return
        client, size = client_of(scope), 0
        chunks: list[bytes] = []
        who, when = CLIENT.set(client), ARRIVED_S.set(None)
        try:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                chunk = message.get("body", b"")
                self.bodies.add(client, len(chunk))
                size += len(chunk)
                chunks.append(chunk)
                more = message.get("more_body", False)
            ARRIVED_S.set(time.monotonic())  # a deadline runs from here: how fast a client sends is its own affair
            async with self.door.turn(client, time.monotonic() + self.patience_s):
                await self.app(scope, _replaying(b"".join(chunks), receive), send)
        finally:
            self.bodies.release(client, size)
            CLIENT.reset(who)
            ARRIVED_S.reset(when)


def _replaying(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
