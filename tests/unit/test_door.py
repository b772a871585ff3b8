"""Who comes in, who waits, who is refused."""

import asyncio
import math
import time
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from shared.door import Door
from shared.errors import Overloaded


def door(**options: Any) -> Door:
    made = {"max_inside": 2, "max_waiting": 8, "share": 1.0, "shed_after_s": math.inf, **options}
    return Door(**made)


class Visitors:
    """Requests at a door, each inside until a test lets it leave."""

    def __init__(self, door: Door) -> None:
        self.door = door
        self.inside: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._leave: dict[str, asyncio.Event] = {}

    async def come(self, *names: str, within_s: float = 60) -> None:
        """``a1`` is the first of client ``a``."""
        for name in names:
            self._leave[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._visit(name, within_s))
        await asyncio.sleep(0.005)

    async def _visit(self, name: str, within_s: float) -> None:
        async with self.door.turn(name[0], time.monotonic() + within_s):
            self.inside.append(name)
            try:
                await self._leave[name].wait()
            finally:
                self.inside.remove(name)

    async def leave(self, name: str) -> None:
        self._leave[name].set()
        await self.tasks[name]
        await asyncio.sleep(0.005)

    async def refused(self, name: str) -> Overloaded:
        with pytest.raises(Overloaded) as caught:
            await self.tasks[name]
        return caught.value

    async def end(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        assert (self.door.inside, self.door.waiting) == (0, 0)


async def test_as_many_are_inside_as_there_is_room_for() -> None:
    visitors = Visitors(door())
    await visitors.come("a1", "a2", "a3", "a4")
    assert visitors.inside == ["a1", "a2"]
    await visitors.leave("a1")
    assert visitors.inside == ["a2", "a3"]
    await visitors.end()


async def test_clients_come_in_by_turns() -> None:
    visitors = Visitors(door(max_inside=1))
    await visitors.come("a1", "a2", "a3", "a4", "b1")
    await visitors.leave("a1")
    assert visitors.inside == ["b1"]
    await visitors.end()


async def test_one_client_never_takes_all_the_room() -> None:
    visitors = Visitors(door(max_inside=4, share=0.75))
    await visitors.come("b1", "a1", "a2", "a3", "a4", "a5")
    assert visitors.inside == ["b1", "a1", "a2", "a3"]
    await visitors.leave("b1")
    assert visitors.inside == ["a1", "a2", "a3"]  # a place stays free for b, which was there a moment ago
    await visitors.come("b2")
    assert visitors.inside == ["a1", "a2", "a3", "b2"]
    await visitors.end()


async def test_a_client_that_is_alone_has_all_the_room() -> None:
    visitors = Visitors(door(max_inside=4, share=0.25))
    await visitors.come("a1", "a2", "a3", "a4")
    assert len(visitors.inside) == 4
    await visitors.end()


async def test_one_client_never_takes_all_the_places_in_front() -> None:
    visitors = Visitors(door(max_inside=1, max_waiting=4, share=0.5))
    await visitors.come("a1", "a2", "a3", "a4")
    assert (await visitors.refused("a4")).retry_after_s == 1
    await visitors.come("b1")
    assert visitors.door.waiting == 3
    await visitors.end()


async def test_a_full_queue_gives_up_the_place_of_who_has_most() -> None:
    visitors = Visitors(door(max_inside=1, max_waiting=3))
    await visitors.come("a1", "a2", "a3", "a4", "b1")
    await visitors.refused("a4")
    await visitors.come("a5")
    await visitors.refused("a5")
    await visitors.leave("a1")
    assert visitors.inside == ["b1"]
    await visitors.end()


async def test_who_goes_away_while_waiting_frees_the_place() -> None:
    visitors = Visitors(door(max_inside=1))
    await visitors.come("a1", "a2", "a3")
    visitors.tasks["a2"].cancel()
    await visitors.leave("a1")
    assert visitors.inside == ["a3"]
    await visitors.end()


async def test_the_wait_ends_with_the_deadline() -> None:
    visitors = Visitors(door(max_inside=1))
    await visitors.come("a1")
    await visitors.come("a2", within_s=0.02)
    assert "deadline" in (await visitors.refused("a2")).message
    await visitors.end()


async def test_a_burst_waits_and_is_served() -> None:
    visitors = Visitors(door(max_inside=1, shed_after_s=60))
    await visitors.come(*(f"a{i}" for i in range(8)))
    for i in range(8):
        await visitors.leave(f"a{i}")
    assert not visitors.door.shedding
    await visitors.end()


async def test_a_queue_that_stands_is_shed_and_what_is_taken_is_taken_at_once() -> None:
    visitors = Visitors(door(max_inside=4, shed_after_s=0.05))
    await visitors.come("a0")
    await visitors.leave("a0")  # now it is known how long a request takes
    await visitors.come("a1", "a2", "a3", "a4", "a5", "a6", "a7")
    await asyncio.sleep(0.1)
    assert visitors.door.shedding
    await visitors.come("a8")
    await visitors.refused("a8")
    with pytest.raises(Overloaded):
        visitors.door.check("a")
    await visitors.leave("a1")
    for stale in ("a5", "a6", "a7"):
        await visitors.refused(stale)
    await visitors.come("a9")
    assert "a9" in visitors.inside
    await visitors.end()


async def test_while_one_sheds_a_client_that_sends_little_is_next() -> None:
    visitors = Visitors(door(max_inside=2, shed_after_s=0.02))
    await visitors.come("a0")
    await visitors.leave("a0")
    await visitors.come("a1", "a2", "a3")
    await asyncio.sleep(0.05)
    assert visitors.door.shedding
    await visitors.come("b1")
    await visitors.leave("a1")
    assert visitors.inside == ["a2", "b1"]
    await visitors.end()


async def test_while_one_sheds_a_modest_client_waits_for_its_own_requests_but_not_for_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now_s=100.0, monotonic=lambda: clock.now_s)
    monkeypatch.setattr("shared.door.time", clock)  # whoever is modest follows from how long each was inside
    visitors = Visitors(door(max_inside=2, share=0.5, shed_after_s=0.02))
    await visitors.come("a0")
    clock.now_s += 0.005
    await visitors.leave("a0")
    await visitors.come("a1", "a2", "a3")
    clock.now_s += 0.05
    assert visitors.door.shedding
    await visitors.come("b1")
    clock.now_s += 0.005
    await visitors.leave("a1")
    assert visitors.inside == ["a2", "b1"]
    await visitors.come("b2", "b3", "b4")
    await visitors.refused("b4")
    await visitors.leave("b1")
    assert visitors.inside == ["a2", "b2"]
    await visitors.leave("b2")
    assert visitors.inside == ["a2", "b3"]
    await visitors.end()


async def test_who_never_had_an_answer_is_modest_beside_who_fills_the_room() -> None:
    visitors = Visitors(door(max_inside=2, max_waiting=2, share=0.5, shed_after_s=60))
    await visitors.come("a1", "a2", "a3", "a4")
    await visitors.refused("a4")
    assert visitors.door.shedding
    await visitors.come("b1")
    await visitors.leave("a1")
    assert visitors.inside == ["a2", "b1"]
    await visitors.refused("a3")
    await visitors.end()


async def test_it_takes_everyone_again_once_the_flood_is_over() -> None:
    visitors = Visitors(door(max_inside=1, shed_after_s=0.05))
    await visitors.come("a1", "a2")
    await asyncio.sleep(0.1)
    await visitors.come("a3")
    await visitors.end()
    await asyncio.sleep(0.1)
    assert not visitors.door.shedding
    await visitors.come("a4", "a5", "a6")
    for name in ("a4", "a5", "a6"):
        await visitors.leave(name)


async def test_clients_that_are_gone_are_forgotten() -> None:
    entrance = door(max_inside=4, max_waiting=2)
    for number in range(100):
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(entrance.turn(str(number), time.monotonic() + 1))
    assert len(entrance._clients) <= 4
