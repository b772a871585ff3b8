"""A queue in which many items of one client keep no other client waiting.

Every item gets a *turn*: one step of its cost after the turn of the item that its client queued before it, and never in
the past (start-time fair queueing: the finish times of an ideal server that divides itself equally between the clients
that wait). The queue is ordered by turns. With one client that is the order of arrival; with two, the first item of the
one stands before the second of the other, however many the other sent first.

A full queue makes room for an item by giving up the one whose turn is last, so who sends too much loses his own.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class _Place(NamedTuple):
    turn: float
    arrival: int  # unique, so that items are never compared
    item: object


class FairQueue(Generic[T]):
    """Not thread-safe; an item may be in it once."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._of: dict[T, _Place] = {}
        self._latest: dict[Hashable, float] = {}  # turn of each client's latest item, where it is not in the past
        self._now = 0.0  # turn of what was taken last
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[T]:
        """In order, over a copy."""
        return iter([place.item for place in self._places])  # type: ignore[misc]

    def __contains__(self, item: T) -> bool:
        return item in self._of

    @property
    def first(self) -> T:
        return self._places[0].item  # type: ignore[return-value]

    @property
    def last(self) -> T:
        return self._places[-1].item  # type: ignore[return-value]

    def turn(self, client: Hashable, cost: float) -> float:
        """The turn that an item would get if it came now."""
        return max(self._now, self._latest.get(client, 0.0)) + cost

    def ahead(self, client: Hashable, cost: float) -> int:
        """How many items it would find before it."""
        turn = self.turn(client, cost)
        return sum(place.turn <= turn for place in self._places)

    def displaces(self, client: Hashable, cost: float) -> bool:
        """Whether its turn would be before the last one's, which a full queue should give up for it."""
        return bool(self._places) and self.turn(client, cost) < self._places[-1].turn

    def push(self, item: T, client: Hashable, cost: float = 1.0) -> None:
        """``cost`` is above 0, in any unit that is the same for all."""
        turn = self._latest[client] = self.turn(client, cost)
        self._arrivals += 1
        place = self._of[item] = _Place(turn, self._arrivals, item)
        insort(self._places, place)

    def take(self, item: T) -> None:
        """Removes an item because it is served now: whoever comes from here on has a turn after it."""
        place = self.remove(item)
        if place.turn > self._now:
            self._now = place.turn
            self._latest = {client: turn for client, turn in self._latest.items() if turn > self._now}

    def remove(self, item: T) -> _Place:
        """Removes an item that nobody wants any more."""
        place = self._of.pop(item)
        del self._places[bisect_left(self._places, place)]
        return place
