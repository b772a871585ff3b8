"""One thread that owns a device, and the bounded queue in front of it.

torch models and faiss indexes are used by one thread each: it loads them, warms them up and is the only one to touch
them. Requests wait in a queue that is fair to clients (:mod:`shared.fair_queue`; "oldest" below is the first in its
order); the thread takes the oldest, adds those behind it that may share a batch (an equal key), runs the batch and
hands each result to the event loop that waits for it. Whatever happens, every item that was taken in
ends in exactly one outcome: a result, an error, or nobody waiting any more.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

import structlog

from shared.clients import CLIENT
from shared.deadline import Deadline
from shared.errors import DeadlineExceeded, InferenceError, Overloaded, RagError, Unavailable
from shared.fair_queue import FairQueue
from shared.metrics import WorkerMetrics
from shared.telemetry import Trace, current_trace

Item = TypeVar("Item")
Result = TypeVar("Result")

log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class _Entry(Generic[Item, Result]):
    """An item and who waits for it."""

    item: Item
    key: Hashable
    size: int
    deadline: Deadline
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Result]"
    queued_s: float = field(default_factory=time.perf_counter)
    began_s: float | None = None
    shared_by: int = 0  # items of its batch

    @property
    def wanted(self) -> bool:
        return not self.future.done() and not self.deadline.expired

    def resolve(self, result: Result) -> None:
        self._on_loop(lambda: self.future.set_result(result))

    def reject(self, error: BaseException) -> None:
        self._on_loop(lambda: self.future.set_exception(error))

    def _on_loop(self, settle: Callable[[], None]) -> None:
        def unless_done() -> None:
            if not self.future.done():  # it may have been cancelled on the way here
                settle()

        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it everyone who waited
            self.loop.call_soon_threadsafe(unless_done)


class Deferred(Generic[Result]):
    """What ``run_batch`` gives for an item whose result comes from a later step of the thread.

    Whoever holds it settles it once, in the thread, and drops it when it is no longer ``wanted``.
    """

    def __init__(self) -> None:
        self._entry: _Entry[object, Result] | None = None

    @property
    def wanted(self) -> bool:
        """False once the caller went away, the deadline passed, or it was settled."""
        return self._entry is not None and self._entry.wanted

    def resolve(self, result: Result) -> None:
        if self._entry is not None:
            self._entry.resolve(result)

    def reject(self, error: RagError) -> None:
        if self._entry is not None:
            self._entry.reject(error.copy())


class DeviceWorker(Generic[Item, Result]):
    """Runs ``run_batch`` on batches of items, one at a time, in a thread of its own.

    Args:
        run_batch: called in the thread; returns one result an item, in order.
        name: of the thread, in logs and metrics.
        setup: called in the thread first (load, warm up); what it raises, :meth:`start` raises.
        key: items with equal keys may share a batch.
        size: what an item adds to its batch.
        max_batch_size: largest sum of sizes; an item above it runs alone.
        max_wait_ms: how long a batch waits for company after its first item was taken, and only while nothing
            else waits: with a queue behind it there is company already.
        max_queue: items that may wait; the next one is refused, or takes the place of a client's that has more.
        metrics: where batches are counted.
        trace: where in its request's trace the stages of an item belong.
        step: called in the thread between batches, once :class:`Deferred` results are outstanding and for as long as
            it returns True. It moves them all on, so that long work never holds up short work by more than a step.
        admits: whether these items may run together with the deferred work there is; the ones that may not yet keep
            their place. Not asked about a single item while no deferred work runs.
    """

    def __init__(
        self,
        run_batch: Callable[[list[Item]], Sequence[Result | Deferred[Result]]],
        *,
        name: str,
        setup: Callable[[], None] | None = None,
        key: Callable[[Item], Hashable],
        size: Callable[[Item], int],
        max_batch_size: int,
        max_wait_ms: float,
        max_queue: int,
        metrics: WorkerMetrics | None = None,
        trace: Callable[[Item], Trace | None] = lambda _: current_trace(),
        step: Callable[[], bool] | None = None,
        admits: Callable[[list[Item]], bool] | None = None,
    ) -> None:
        self._run_batch = run_batch
        self._step = step
        self._admits = admits
        self._setup = setup
        self._key = key
        self._size = size
        self._max_batch_size = max_batch_size
        self._max_wait_s = max_wait_ms / 1000
        self._max_queue = max_queue
        self._metrics = metrics
        self._trace = trace
        self.name = name

        self._queue: FairQueue[_Entry[Item, Result]] = FairQueue()
        self._deferred: list[_Entry[Item, Result]] = []  # touched by the thread only
        self._changed = threading.Condition()  # guards everything below, and the queue
        self._accepting = False
        self._stopping = False
        self._failure: str | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        if metrics is not None:
            metrics.watch_queue(lambda: self.queue_depth)

    # --- on the event loop -----------------------------------------------------------------------------

    @property
    def failure(self) -> str | None:
        """Why the worker is dead, or None."""
        return self._failure

    @property
    def queue_depth(self) -> int:
        """Items that wait for a batch."""
        return len(self._queue)

    async def start(self) -> None:
        """Starts the thread and waits for ``setup``. Raises: what ``setup`` raised."""
        if self._thread is not None:
            raise RuntimeError(f"{self.name} was started before")
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        self._thread = threading.Thread(target=self._live, args=(loop, ready), name=self.name, daemon=True)
        self._thread.start()
        await ready

    async def stop(self, timeout_s: float = 30.0) -> None:
        """Waits for the batch in flight and fails what waits behind it with Unavailable.

        A batch that has not ended after ``timeout_s`` dies with the process: a device call cannot be interrupted.
        """
        with self._changed:
            self._accepting = False
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None and not await asyncio.to_thread(self._ended.wait, timeout_s):
            log.error("worker_did_not_stop", worker=self.name, waited_s=timeout_s)
            self._fail_waiting("the service is stopping")

    async def submit(self, item: Item, deadline: Deadline) -> Result:
        """The item's result.

        Raises:
            Overloaded: the queue is full, now or when a client's turn comes that has fewer items in it.
            Unavailable: the worker is not running, died, or stopped before the item's batch.
            DeadlineExceeded: the deadline passed; an item that had not begun never will.
            InferenceError: the batch failed for a reason that is ours.
            RagError: what ``run_batch`` raised on purpose.
        """
        outcome = "failed"
        try:
            result = await self._submit(item, deadline)
            outcome = "done"
        except Overloaded:
            outcome = "shed"
            raise
        except DeadlineExceeded:
            outcome = "expired"
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            if self._metrics is not None:
                self._metrics.ended(outcome)
        return result

    async def _submit(self, item: Item, deadline: Deadline) -> Result:
        deadline.check(f"the {self.name} could begin")
        loop = asyncio.get_running_loop()
        entry: _Entry[Item, Result] = _Entry(
            item, self._key(item), self._size(item), deadline, loop, loop.create_future()
        )
        client = CLIENT.get()
        with self._changed:
            if not self._accepting:
                raise Unavailable(self._failure or f"the {self.name} is not running", retry_after_s=1)
            self._make_room(client, entry.size)
            self._queue.push(entry, client, max(1, entry.size))
            self._changed.notify()
        try:
            async with asyncio.timeout(deadline.remaining_s):
                return await entry.future
        except TimeoutError:
            raise DeadlineExceeded(f"the deadline passed while the {self.name} was busy") from None
        finally:
            # Nobody waits any more, which the thread learns from the future. A settled one has left the queue.
            if entry.future.cancel() or entry.future.cancelled():
                self._forget(entry)
            if (trace := self._trace(item)) is not None:
                began_s = time.perf_counter() if entry.began_s is None else entry.began_s
                trace.add(
                    "queue", entry.queued_s, began_s, {"rag.worker": self.name, "rag.batch.items": entry.shared_by}
                )
                trace.flush()

    def _make_room(self, client: str, size: int) -> None:
        if len(self._queue) < self._max_queue:
            return
        full = Overloaded(f"{self._max_queue} requests wait for the {self.name} already", retry_after_s=1)
        if not self._queue.displaces(client, max(1, size)):
            raise full
        given_up = self._queue.last
        self._queue.remove(given_up)
        given_up.reject(full)

    def _forget(self, entry: _Entry[Item, Result]) -> None:
        """Frees the place of an item that nobody waits for, so that it keeps nobody else out."""
        with self._changed:
            if entry in self._queue:
                self._queue.remove(entry)

    # --- in the thread ---------------------------------------------------------------------------------

    def _live(self, loop: asyncio.AbstractEventLoop, ready: "asyncio.Future[None]") -> None:
        started: _Entry[None, None] = _Entry(None, None, 0, Deadline(float("inf")), loop, ready)
        try:
            if self._setup is not None:
                self._setup()
        except BaseException as error:  # noqa: BLE001  handed to start(), whatever it is
            self._failure = f"{self.name} could not start: {error}"
            started.reject(error)
            self._ended.set()
            return
        with self._changed:
            self._accepting = not self._stopping
        started.resolve(None)
        try:
            busy = False
            while (batch := self._next_batch(wait=not busy)) is not None:
                self._run(batch)
                # One step more than there are results to wait for: whoever holds the last one learns to drop it.
                busy = (busy or bool(self._deferred)) and self._advance()
        except BaseException as error:
            log.exception("worker_died", worker=self.name)
            self._failure = f"{self.name} died: {type(error).__name__}"
        finally:
            self._fail_waiting(self._failure or "the service is stopping")
            self._ended.set()

    def _next_batch(self, *, wait: bool) -> list[_Entry[Item, Result]] | None:
        """The oldest item and those that may join it; empty when there is none to run now, None when to stop."""
        with self._changed:
            while wait and not self._queue and not self._stopping:
                self._changed.wait()
            if self._stopping:
                return None
            # The oldest item that may run is in every batch, so no key can starve another.
            first = self._queue.first if wait else self._oldest_that_may_run()
            if first is None:
                return []
            self._queue.take(first)
            batch = [first]
            until_s = time.monotonic() + self._max_wait_s
            while self._join(batch) and wait and not self._queue and not self._stopping:
                remaining_s = until_s - time.monotonic()
                if remaining_s <= 0 or not self._changed.wait(remaining_s):
                    break
            return batch

    def _oldest_that_may_run(self) -> _Entry[Item, Result] | None:
        """None of a key's items overtakes one that must wait for room: small ones would keep a large one out."""
        held: set[Hashable] = set()
        for entry in self._queue:
            if entry.key not in held and self._may_run([entry]):
                return entry
            held.add(entry.key)
        return None

    def _may_run(self, entries: list[_Entry[Item, Result]]) -> bool:
        return self._admits is None or self._admits([entry.item for entry in entries])

    def _join(self, batch: list[_Entry[Item, Result]]) -> bool:
        """Moves the items that fit from the queue into the batch, in order; whether there is room for more."""
        room = self._max_batch_size - sum(entry.size for entry in batch)
        for entry in [entry for entry in self._queue if entry.key == batch[0].key]:
            if entry.size > room or not self._may_run([*batch, entry]):
                return False  # a smaller one behind it must not overtake it
            self._queue.take(entry)
            batch.append(entry)
            room -= entry.size
        return room > 0

    def _advance(self) -> bool:
        """One step of all deferred work; whether there is more."""
        assert self._step is not None, "run_batch deferred a result, and there is no step to give it"  # noqa: S101
        try:
            more = self._step()
        except Exception:
            log.exception("step_failed", worker=self.name, items=len(self._deferred))
            self._reject(self._deferred, InferenceError("the computation failed; the log has the trace"))
            more = False
        self._deferred = [entry for entry in self._deferred if more and entry.wanted]
        return more

    def _run(self, batch: list[_Entry[Item, Result]]) -> None:
        wanted = [entry for entry in batch if entry.wanted]
        if not wanted:
            return
        began_s = time.perf_counter()
        for entry in wanted:
            entry.began_s, entry.shared_by = began_s, len(wanted)
            if self._metrics is not None:
                self._metrics.waited(began_s - entry.queued_s)
        try:
            results = self._measured(wanted)
            if len(results) != len(wanted):
                raise RuntimeError(f"{len(results)} results for {len(wanted)} items")
        except RagError as error:
            self._reject(wanted, error)
        except Exception:
            log.exception("batch_failed", worker=self.name, items=len(wanted))
            self._reject(wanted, InferenceError("the computation failed; the log has the trace"))
        except BaseException:
            self._reject(wanted, Unavailable(f"{self.name} died", retry_after_s=1))
            raise
        else:
            for entry, result in zip(wanted, results, strict=True):
                if isinstance(result, Deferred):
                    result._entry = cast("_Entry[object, Result]", entry)
                    self._deferred.append(entry)
                else:
                    entry.resolve(result)

    def _measured(self, entries: Sequence[_Entry[Item, Result]]) -> Sequence[Result | Deferred[Result]]:
        """Runs the batch. It is counted before anyone has its result: who reads the metrics next finds it there."""
        began_s = time.monotonic()
        try:
            return self._run_batch([entry.item for entry in entries])
        finally:
            if self._metrics is not None:
                self._metrics.ran(sum(entry.size for entry in entries), time.monotonic() - began_s)

    def _reject(self, entries: Sequence[_Entry[Item, Result]], error: RagError) -> None:
        for entry in entries:
            entry.reject(error.copy())

    def _fail_waiting(self, why: str) -> None:
        with self._changed:
            self._accepting = False
            waiting, self._queue = [*self._queue, *self._deferred], FairQueue()
        self._reject(waiting, Unavailable(why, retry_after_s=1))
