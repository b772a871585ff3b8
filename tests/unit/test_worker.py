"""The device worker: what shares a batch, who is refused, and that every item ends exactly once."""

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from shared.deadline import Deadline
from shared.errors import (
    DeadlineExceeded,
    InferenceError,
    InvalidRequest,
    Overloaded,
    RagError,
    Unavailable,
)
from shared.metrics import WorkerMetrics
from shared.worker import DeviceWorker


@dataclass(frozen=True)
class Item:
    name: str
    key: str = "k"
    size: int = 1


@dataclass
class Device:
    """Answers each item with its name; remembers its batches, and waits where a test holds it."""

    batches: list[list[str]] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    running: threading.Event = field(default_factory=threading.Event)
    free: threading.Event = field(default_factory=threading.Event)
    fails: Callable[[list[Item]], None] = lambda _: None

    def __post_init__(self) -> None:
        self.free.set()

    async def began(self) -> None:
        assert await asyncio.to_thread(self.running.wait, 10)

    def run(self, items: list[Item]) -> Sequence[str]:
        self.batches.append([item.name for item in items])
        self.threads.add(threading.current_thread().name)
        self.running.set()
        assert self.free.wait(10)
        self.fails(items)
        return [item.name for item in items]


@asynccontextmanager
async def working(device: Device, **options: Any) -> AsyncIterator[DeviceWorker[Item, str]]:
    made: dict[str, Any] = {"max_batch_size": 4, "max_wait_ms": 0, "max_queue": 64, **options}
    worker = DeviceWorker(device.run, name="device", key=lambda i: i.key, size=lambda i: i.size, **made)
    await worker.start()
    try:
        yield worker
    finally:
        device.free.set()
        await worker.stop()


@asynccontextmanager
async def busy(device: Device, **options: Any) -> AsyncIterator[tuple[DeviceWorker[Item, str], asyncio.Task[str]]]:
    """A worker whose first batch, of the item `first`, is under way until the test sets ``device.free``."""
    device.free.clear()
    async with working(device, **options) as worker:
        first = submit(worker, Item("first"))
        await device.began()
        yield worker, first


def submit(worker: DeviceWorker[Item, str], item: Item, timeout_ms: float = 10_000) -> asyncio.Task[str]:
    return asyncio.create_task(worker.submit(item, Deadline.after(timeout_ms, 0)))


async def queued(worker: DeviceWorker[Item, str], *items: Item) -> list[asyncio.Task[str]]:
    tasks = [submit(worker, item) for item in items]
    await asyncio.sleep(0.01)
    return tasks


# --- batches -----------------------------------------------------------------------------------------------


async def test_each_item_gets_its_own_result_from_one_thread() -> None:
    device = Device()
    async with working(device) as worker:
        names = [str(i) for i in range(50)]
        assert await asyncio.gather(*(submit(worker, Item(name)) for name in names)) == names
    assert device.threads == {"device"}


async def test_what_waits_with_an_equal_key_shares_a_batch_up_to_the_size() -> None:
    device = Device()
    async with busy(device) as (worker, _):
        tasks = await queued(worker, *(Item(str(i)) for i in range(6)))
        device.free.set()
        await asyncio.gather(*tasks)
    assert device.batches == [["first"], ["0", "1", "2", "3"], ["4", "5"]]


async def test_sizes_and_not_items_are_summed() -> None:
    device = Device()
    async with busy(device) as (worker, _):
        tasks = await queued(worker, Item("a", size=3), Item("b", size=2), Item("c", size=1))
        device.free.set()
        await asyncio.gather(*tasks)
    # c would fit beside a, but it came after b.
    assert device.batches == [["first"], ["a"], ["b", "c"]]


async def test_an_item_above_the_size_of_a_batch_runs_alone() -> None:
    device = Device()
    async with busy(device) as (worker, _):
        tasks = await queued(worker, Item("huge", size=9), Item("small"))
        device.free.set()
        await asyncio.gather(*tasks)
    assert device.batches == [["first"], ["huge"], ["small"]]


async def test_keys_do_not_mix_and_the_oldest_goes_first() -> None:
    device = Device()
    async with busy(device) as (worker, _):
        tasks = await queued(worker, Item("a1", "a"), Item("b1", "b"), Item("a2", "a"), Item("b2", "b"))
        device.free.set()
        await asyncio.gather(*tasks)
    assert device.batches == [["first"], ["a1", "a2"], ["b1", "b2"]]


async def test_a_busy_key_starves_no_other() -> None:
    device = Device()
    async with busy(device, max_batch_size=2) as (worker, _):
        tasks = await queued(
            worker, *(Item(f"a{i}", "a") for i in range(3)), Item("b", "b"), *(Item(f"c{i}", "a") for i in range(9))
        )
        device.free.set()
        await asyncio.gather(*tasks)
    assert ["b"] in device.batches[:4]


async def test_it_waits_for_company_only_while_nothing_else_waits() -> None:
    device = Device()
    async with working(device, max_wait_ms=10_000) as worker:
        lonely = submit(worker, Item("a1", "a"))
        await asyncio.sleep(0.02)
        assert device.batches == []
        other = submit(worker, Item("b1", "b"))
        assert await lonely == "a1"
        filling = [submit(worker, Item(f"b{i}", "b")) for i in (2, 3, 4)]
        assert await asyncio.gather(other, *filling) == ["b1", "b2", "b3", "b4"]
    assert device.batches == [["a1"], ["b1", "b2", "b3", "b4"]]


async def test_the_wait_for_company_ends() -> None:
    async with working(Device(), max_wait_ms=30) as worker:
        began_s = time.monotonic()
        assert await submit(worker, Item("alone")) == "alone"
        assert time.monotonic() - began_s < 5


# --- refusals ----------------------------------------------------------------------------------------------


async def test_a_full_queue_refuses_and_serves_on() -> None:
    device = Device()
    async with busy(device, max_queue=2) as (worker, _):
        waiting = await queued(worker, Item("1"), Item("2"))
        assert worker.queue_depth == 2
        with pytest.raises(Overloaded) as refused:
            await worker.submit(Item("3"), Deadline.after(None, 1000))
        assert refused.value.retry_after_s == 1
        device.free.set()
        assert await asyncio.gather(*waiting) == ["1", "2"]


async def test_who_went_away_is_dropped_before_the_batch_and_frees_its_place() -> None:
    device = Device()
    async with busy(device, max_queue=2) as (worker, _):
        stays, leaves = await queued(worker, Item("stays"), Item("leaves"))
        leaves.cancel()
        await asyncio.sleep(0.01)
        assert worker.queue_depth == 1
        device.free.set()
        assert await stays == "stays"
    assert device.batches == [["first"], ["stays"]]


async def test_an_expired_item_never_runs() -> None:
    device = Device()
    async with busy(device) as (worker, _):
        with pytest.raises(DeadlineExceeded):
            await worker.submit(Item("late"), Deadline.after(20, 0))
        with pytest.raises(DeadlineExceeded):
            await worker.submit(Item("later"), Deadline.after(-1, 0))
        device.free.set()
        await submit(worker, Item("next"))
    assert device.batches == [["first"], ["next"]]


async def test_a_deadline_ends_the_wait_for_a_batch_that_runs() -> None:
    device = Device()
    device.free.clear()
    async with working(device) as worker:
        began_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await worker.submit(Item("slow"), Deadline.after(50, 0))
        assert time.monotonic() - began_s < 2


# --- failures ----------------------------------------------------------------------------------------------


def failing(on: str, error: BaseException) -> Callable[[list[Item]], None]:
    def fail(items: list[Item]) -> None:
        if any(item.name == on for item in items):
            raise error

    return fail


async def test_a_failed_batch_fails_its_own_items_only() -> None:
    device = Device(fails=failing("bad", ValueError("numbers of the caller")))
    async with busy(device) as (worker, first):
        with_it = await queued(worker, Item("bad"), Item("beside", "k"))
        apart = await queued(worker, Item("apart", "other"))
        device.free.set()
        outcomes = await asyncio.gather(first, *with_it, *apart, return_exceptions=True)
    assert (outcomes[0], outcomes[3]) == ("first", "apart")
    assert [type(outcome) for outcome in outcomes[1:3]] == [InferenceError, InferenceError]
    assert "numbers" not in str(outcomes[1])
    assert worker.failure is None


async def test_an_error_of_ours_passes_through_as_an_instance_each() -> None:
    device = Device(fails=failing("bad", InvalidRequest("too deep", param="depth")))
    async with busy(device) as (worker, _):
        tasks = await queued(worker, Item("bad"), Item("beside"))
        device.free.set()
        one, other = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(one, InvalidRequest)
    assert isinstance(other, InvalidRequest)
    assert one is not other
    assert (other.message, other.param) == ("too deep", "depth")


async def test_too_few_results_are_an_error_and_not_a_hang() -> None:
    worker: DeviceWorker[Item, str] = DeviceWorker(
        lambda _: [],
        name="device",
        key=lambda i: i.key,
        size=lambda i: i.size,
        max_batch_size=4,
        max_wait_ms=0,
        max_queue=4,
    )
    await worker.start()
    with pytest.raises(InferenceError):
        await worker.submit(Item("a"), Deadline.after(None, 5000))
    await worker.stop()


async def test_a_thread_that_dies_fails_everyone_and_says_so() -> None:
    device = Device(fails=failing("deadly", SystemExit("out of device")))
    async with busy(device) as (worker, first):
        waiting = await queued(worker, Item("deadly"), Item("beside"), Item("behind", "other"))
        device.free.set()
        outcomes = await asyncio.gather(first, *waiting, return_exceptions=True)
        assert outcomes[0] == "first"
        assert [type(outcome) for outcome in outcomes[1:]] == [Unavailable] * 3
        assert worker.failure == "device died: SystemExit"
        with pytest.raises(Unavailable, match="died"):
            await worker.submit(Item("after"), Deadline.after(None, 1000))


async def test_start_raises_what_setup_raised() -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("cannot be copied by its args")

    def setup() -> None:
        raise Odd(1, 2)

    worker: DeviceWorker[Item, str] = DeviceWorker(
        Device().run,
        name="device",
        setup=setup,
        key=lambda i: i.key,
        size=lambda i: i.size,
        max_batch_size=1,
        max_wait_ms=0,
        max_queue=1,
    )
    with pytest.raises(Odd):
        await worker.start()
    assert worker.failure is not None
    with pytest.raises(Unavailable):
        await worker.submit(Item("a"), Deadline.after(None, 1000))
    await worker.stop()


async def test_setup_runs_in_the_thread_of_the_batches() -> None:
    seen: list[str] = []
    device = Device()
    async with working(device, setup=lambda: seen.append(threading.current_thread().name)) as worker:
        await submit(worker, Item("a"))
    assert set(seen) == device.threads == {"device"}


async def test_a_stop_finishes_the_batch_in_flight_and_fails_the_rest() -> None:
    device = Device()
    async with busy(device) as (worker, first):
        waiting = await queued(worker, Item("1"), Item("2"))
        stopping = asyncio.create_task(worker.stop())
        await asyncio.sleep(0.02)
        assert not stopping.done()
        with pytest.raises(Unavailable):
            await worker.submit(Item("3"), Deadline.after(None, 1000))
        device.free.set()
        await stopping
        assert await first == "first"
        assert [type(e) for e in await asyncio.gather(*waiting, return_exceptions=True)] == [Unavailable] * 2


async def test_a_stop_gives_up_on_a_batch_that_does_not_end() -> None:
    device = Device()
    async with busy(device) as (worker, _):
        [waiting] = await queued(worker, Item("behind"))
        await worker.stop(timeout_s=0.05)
        with pytest.raises(Unavailable):
            await waiting


def test_a_loop_that_closed_meanwhile_does_no_harm() -> None:
    device = Device()
    device.free.clear()

    async def leave_at_once() -> DeviceWorker[Item, str]:
        worker = DeviceWorker(
            device.run,
            name="device",
            key=lambda i: i.key,
            size=lambda i: i.size,
            max_batch_size=1,
            max_wait_ms=0,
            max_queue=4,
        )
        await worker.start()
        submit(worker, Item("abandoned"))
        await device.began()
        return worker

    worker = asyncio.run(leave_at_once())
    device.free.set()

    async def ask_again() -> str:
        result = await worker.submit(Item("again"), Deadline.after(None, 5000))
        await worker.stop()
        return result

    assert asyncio.run(ask_again()) == "again"
    assert worker.failure is None


async def test_batches_and_the_queue_are_measured() -> None:
    registry = CollectorRegistry()
    device = Device()
    async with busy(device, metrics=WorkerMetrics(registry, "device")) as (worker, _):
        tasks = await queued(worker, Item("a", size=3))
        assert 'worker_queue_depth{worker="device"} 1.0' in generate_latest(registry).decode()
        device.free.set()
        await asyncio.gather(*tasks)
    text = generate_latest(registry).decode()
    assert 'worker_batch_size_count{worker="device"} 2.0' in text
    assert 'worker_batch_size_sum{worker="device"} 4.0' in text


# --- always ------------------------------------------------------------------------------------------------

SCHEDULES = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.integers(1, 6),  # size
        st.sampled_from(["waits", "waits", "leaves", "expires", "fails", "refused"]),
        st.integers(0, 2),  # milliseconds before the next one
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=40)
@given(
    SCHEDULES,
    st.integers(1, 6),
    st.sampled_from([0, 1, 3]),
    st.integers(1, 12),
    st.sampled_from(["stop", "die", "idle"]),
)
def test_every_item_ends_exactly_once(
    schedule: list[tuple[str, int, str, int]], max_batch_size: int, max_wait_ms: float, max_queue: int, end: str
) -> None:
    ran: list[list[Item]] = []

    def run(items: list[Item]) -> list[str]:
        ran.append(items)
        time.sleep(random.random() / 1000)
        for item in items:
            if item.name.startswith("fails"):
                raise ZeroDivisionError
            if item.name.startswith("refused"):
                raise InvalidRequest("refused")
            if item.name == "die":
                raise SystemExit
        return [item.name for item in items]

    async def play() -> list[str | BaseException]:
        worker = DeviceWorker(
            run,
            name="device",
            key=lambda i: i.key,
            size=lambda i: i.size,
            max_batch_size=max_batch_size,
            max_wait_ms=max_wait_ms,
            max_queue=max_queue,
        )
        await worker.start()
        tasks = []
        for i, (key, size, fate, pause_ms) in enumerate(schedule):
            timeout_ms = 1 if fate == "expires" else 5000
            tasks.append(submit(worker, Item(f"{fate}{i}", key, size), timeout_ms))
            await asyncio.sleep(pause_ms / 1000)
            if fate == "leaves":
                tasks[-1].cancel()
        if end == "die":
            tasks.append(submit(worker, Item("die")))
        if end == "stop":
            await worker.stop()
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), timeout=20)
        await worker.stop()
        assert worker.queue_depth == 0
        return outcomes

    outcomes = asyncio.run(play())
    for (_, _, fate, _), outcome, i in zip(schedule, outcomes, range(len(schedule)), strict=False):
        assert isinstance(outcome, RagError | asyncio.CancelledError) or outcome == f"{fate}{i}"
        if fate in {"fails", "refused"}:
            assert isinstance(outcome, RagError)
    for batch in ran:
        assert len({item.key for item in batch}) == 1
        assert len(batch) == 1 or sum(item.size for item in batch) <= max_batch_size
    names = [item.name for batch in ran for item in batch]
    assert len(names) == len(set(names))
    for key in "abc":
        order = [int(i.name.lstrip("abcdefghijklmnopqrstuvwxyz")) for b in ran for i in b if i.key == key]
        assert order == sorted(order)
