"""Who may come in now, who waits, and who is told to come back later.

A service works on a few requests at once. The others wait in front of the door, in an order that is fair to clients
(:mod:`shared.fair_queue`), and hold nothing but their body. No client takes more than its share of the room inside or
of the places in front.

For a moment any queue may form, so that a burst is served and not refused; but one that stands longer than
``shed_after_s``, and than two requests take, is no burst: more comes than can be served, and everyone would wait for
ever longer. Then nobody waits any more (compare CoDel, RFC 8289): a request takes a place that is free, or is refused
at once, and there is always one soon that finds a place. So what is accepted stays quick, whatever is offered. Only a
modest client, one that had less than three quarters of an equal share of the last seconds, may still wait, and is next:
no flood keeps it out.

Everything happens on the event loop.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import exp, isfinite
from typing import NoReturn

from shared.errors import Overloaded
from shared.fair_queue import FairQueue

_SMOOTHING = 0.1  # weight of the newest request in the mean time that one takes
_MEMORY_S = 10.0  # after which what a client had counts for a third
_PRESENT_S = 5.0  # after its last request a client is not there any more, and needs no room kept for it
_MODEST = 0.75  # of an equal share
_PATIENCE = 2.0  # mean times of a request: where each takes seconds, a queue of a second is a short one


@dataclass(eq=False)
class _Client:
    inside: int = 0
    waiting: int = 0
    mean_s: float | None = None  # of its requests, from the door to the answer
    _had_s: float = 0.0
    _as_of_s: float = 0.0

    @property
    def idle(self) -> bool:
        return self.inside == self.waiting == 0

    def since_s(self, now_s: float) -> float:
        """Since its latest answer."""
        return now_s - self._as_of_s

    def had_s(self, now_s: float) -> float:
        """Its time inside, summed over its requests, the older the less."""
        return self._had_s * exp((self._as_of_s - now_s) / _MEMORY_S)

    def took(self, seconds: float, now_s: float) -> None:
        self.mean_s = seconds if self.mean_s is None else self.mean_s + (seconds - self.mean_s) * _SMOOTHING
        self._had_s, self._as_of_s = self.had_s(now_s) + seconds, now_s


@dataclass(eq=False)
class _Waiting:
    client: str
    let_in: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Door:
    """
    Args:
        max_inside: requests that are worked on at once; may be changed later.
        max_waiting: requests that wait in front.
        share: the largest part of either that one client takes; all the room inside while it is the only one.
        shed_after_s: how long a queue may stand before only those are let in who hardly wait; infinite: always.
    """

    def __init__(self, *, max_inside: int, max_waiting: int, share: float, shed_after_s: float) -> None:
        self.max_inside = max_inside
        self.max_waiting = max_waiting
        self.share = share
        self.shed_after_s = shed_after_s
        self.inside = 0
        self._queue: FairQueue[_Waiting] = FairQueue()
        self._clients: dict[str, _Client] = {}
        self._mean_s = 0.0
        self._standing_since_s: float | None = None
        self._shedding_until_s = 0.0

    @property
    def max_inside_a_client(self) -> int:
        return max(1, int(self.share * self.max_inside))

    @property
    def max_waiting_a_client(self) -> int:
        return max(1, int(self.share * self.max_waiting))

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def shedding(self) -> bool:
        """Whether more comes than can be served: a queue stood too long, or a request was refused a moment ago."""
        now_s = time.monotonic()
        patience_s = max(self.shed_after_s, _PATIENCE * self._mean_s)
        stands = self._standing_since_s is not None and now_s - self._standing_since_s > patience_s
        return stands or now_s < self._shedding_until_s

    def check(self, client: str) -> None:
        """Looks without coming in, before a body is read for nothing. Raises: Overloaded: it would be refused now."""
        known = self._clients.get(client) or _Client()
        if self._free_for(known):
            return
        if known.waiting >= self.max_waiting_a_client:
            self._refuse(f"{known.waiting} requests of yours wait already", client, known)
        cost = self._cost(known)
        if len(self._queue) >= self.max_waiting and not self._queue.displaces(client, cost):
            self._refuse(f"{len(self._queue)} requests wait already", client, known)
        if self.shedding and not self._may_still_wait(client, known):
            self._refuse("more is asked than can be answered now", client, known)

    @asynccontextmanager
    async def turn(self, client: str, until_s: float) -> AsyncIterator[None]:
        """Waits to be let in, and is inside until the block ends.

        Raises: Overloaded: there is no room, or not before ``until_s`` on the monotonic clock.
        """
        self.check(client)
        of = self._clients.setdefault(client, _Client())
        try:
            if not self._free_for(of):
                await self._wait(client, of, until_s)
            else:
                self.inside += 1
                of.inside += 1
            began_s = time.monotonic()
            try:
                yield
            finally:
                self._leave(of, time.monotonic() - began_s)
        finally:
            if of.idle and len(self._clients) > self.max_waiting:
                self._clients = {name: known for name, known in self._clients.items() if not known.idle}

    def _free_for(self, client: _Client) -> bool:
        """Whether it can come in past those who wait: where there is room, they wait for their own share only."""
        return self.inside < self.max_inside and not client.waiting and self._within_share(client)

    def _within_share(self, client: _Client) -> bool:
        if client.inside < self.max_inside_a_client:
            return True
        now_s = time.monotonic()
        return client.inside < self.max_inside and all(other is client for other in self._present(now_s))

    def _present(self, now_s: float) -> list[_Client]:
        """The clients that the room is shared between."""
        return [client for client in self._clients.values() if not client.idle or client.since_s(now_s) < _PRESENT_S]

    def _modest(self, client: _Client) -> bool:
        now_s = time.monotonic()
        present = self._present(now_s)
        equal_s = sum(self._had_s(other, now_s) for other in present) / max(1, len(present))
        return self._had_s(client, now_s) < _MODEST * equal_s

    def _had_s(self, client: _Client, now_s: float) -> float:
        """Time inside, that of its requests there included, which will probably take as long as others did."""
        return client.had_s(now_s) + client.inside * (self._mean_s or 1.0)

    def _may_still_wait(self, client: str, known: _Client) -> bool:
        return self._queue.ahead(client, self._cost(known)) < self.max_inside and self._modest(known)

    def _cost(self, client: _Client) -> float:
        """What a turn costs it: the seconds that its requests take, and more the more of them are inside."""
        return max(1e-6, client.mean_s or self._mean_s) * (1 + client.inside)

    def _wait_s(self, client: str, known: _Client) -> float:
        """How long it would wait, going by the queue before it and the mean time of a request."""
        return (1 + self._queue.ahead(client, self._cost(known))) * self._mean_s / self.max_inside

    async def _wait(self, client: str, of: _Client, until_s: float) -> None:
        if len(self._queue) >= self.max_waiting:
            self._give_up(self._queue.last)
        if not self._queue:
            self._standing_since_s = time.monotonic()
        place = _Waiting(client)
        self._queue.push(place, client, self._cost(of))
        of.waiting += 1
        try:
            async with asyncio.timeout(until_s - time.monotonic()):
                await place.let_in
        except BaseException as error:
            if place in self._queue:
                self._remove(place, served=False)
            elif not place.let_in.cancelled() and place.let_in.exception() is None:
                self._leave(of, None)  # it was let in at the moment at which it went away
            if isinstance(error, TimeoutError):
                self._refuse("the deadline passed before there was room", client, of)
            raise

    def _let_in(self) -> None:
        """Those whose turn it is, as far as there is room; while shedding, who waits since before hears it now."""
        shedding = self.shedding
        for place in self._queue:
            if self.inside >= self.max_inside and not shedding:
                return
            if place.let_in.done():
                continue  # it is on its way out: its client went away, or its deadline passed
            of = self._clients[place.client]
            if shedding and not self._modest(of):
                self._give_up(place)
            elif self.inside < self.max_inside and self._within_share(of):
                self._remove(place, served=True)
                self.inside += 1
                of.inside += 1
                place.let_in.set_result(None)

    def _give_up(self, place: _Waiting) -> None:
        of = self._clients[place.client]
        self._remove(place, served=False)
        if place.let_in.done():
            return
        try:
            self._refuse("more is asked than can be answered now", place.client, of)
        except Overloaded as error:
            place.let_in.set_exception(error)

    def _remove(self, place: _Waiting, *, served: bool) -> None:
        if served:
            self._queue.take(place)
        else:
            self._queue.remove(place)
        self._clients[place.client].waiting -= 1
        if not self._queue:
            self._standing_since_s = None

    def _leave(self, of: _Client, took_s: float | None) -> None:
        self.inside -= 1
        of.inside -= 1
        if took_s is not None:
            self._mean_s += (took_s - self._mean_s) * (_SMOOTHING if self._mean_s else 1.0)
            of.took(took_s, time.monotonic())
        self._let_in()

    def _refuse(self, why: str, client: str, known: _Client) -> NoReturn:
        """Raises: Overloaded, with the time after which all who wait now will have had their turn."""
        if isfinite(self.shed_after_s):
            self._shedding_until_s = time.monotonic() + self.shed_after_s
        raise Overloaded(f"{why}; try again later", retry_after_s=max(1.0, self._wait_s(client, known)))
