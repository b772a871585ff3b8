"""Recall as it is, not as it was tested: a sample of the queries that are answered is searched again, exactly.

Sampled in the thread that searches, compared in a thread of its own, of low priority and at rest most of the time; what
comes faster than that is skipped. A query is compared with what could be found when it was answered: the same
generation, the changes until then, the rows that its filter selected.

Where a collection's embeddings are larger than memory, each pass reads them from the disk.
"""

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import structlog

from retriever_svc.catalog import InWorker
from retriever_svc.collection import Collection
from retriever_svc.delta import Moment
from retriever_svc.exact import Best, slices
from retriever_svc.filters import Selection
from retriever_svc.metrics import RetrieverMetrics
from retriever_svc.ranking import BoolArray, Ranked
from retriever_svc.settings import RetrieverSettings
from shared.errors import RagError
from shared.retrieval import Float32Array, RetrieveQuery
from shared.schemas import Recall

MOST_WAITING = 16  # compared in one pass over the vectors
SHARE_OF_A_CORE = 0.2
LOWEST_PRIORITY = 19
FEWEST_TO_WARN = 20  # queries

log = structlog.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class Sample:
    """A query that was answered: ``scores`` (N,) of its documents, ``chosen``: the rows that its filter selected."""

    collection: Collection
    query: Float32Array  # (D,)
    k: int
    scores: Float32Array
    moment: Moment
    chosen: tuple[BoolArray, BoolArray] | None

    def alive(self) -> BoolArray:
        """Who could be found: of the generation's rows and those written by then."""
        alive = self.collection.delta.alive_at(self.moment)
        if self.chosen is not None:
            base, added = self.chosen
            alive &= np.concatenate([base, added[: self.moment.written]])
        return alive


class _Window:
    """The last queries compared of one generation."""

    def __init__(self, generation: str, size: int) -> None:
        self.generation = generation
        self.low = False
        self._shares: deque[float] = deque(maxlen=size)

    def add(self, share: float) -> None:
        self._shares.append(share)

    def recall(self, k: int) -> Recall:
        return Recall(at_k=k, estimate=sum(self._shares) / len(self._shares), queries=len(self._shares), low=self.low)


class Canary:
    """:meth:`sample` belongs to the thread that searches, the rest to the event loop."""

    def __init__(
        self,
        settings: RetrieverSettings,
        metrics: RetrieverMetrics,
        in_worker: InWorker,
        serves: Callable[[Collection], bool],
    ) -> None:
        """``in_worker`` runs a function in the thread that searches; ``serves``: whether requests go there now."""
        self._fraction, self._k = settings.canary_fraction, settings.canary_k
        self._window, self._least = settings.canary_window, settings.canary_min_recall
        self._metrics, self._in_worker, self._serves = metrics, in_worker, serves
        self._dice = np.random.default_rng()
        self._waiting: deque[Sample] = deque()
        self._windows: dict[str, _Window] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="canary", initializer=_be_nice)
        self._stopping = threading.Event()
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    def sample(
        self,
        collection: Collection,
        query: RetrieveQuery,
        answers: Sequence[Ranked],
        selection: Selection | None = None,
    ) -> None:
        """Take some of a request's vectors, just answered, with the rows that its filter selected."""
        if not self._fraction or collection.index.exact or self._loop is None or self._stopping.is_set():
            return
        for b in np.flatnonzero(self._dice.random(len(answers)) < self._fraction).tolist():
            if len(self._waiting) >= MOST_WAITING:
                self._metrics.canary.labels(collection.name, "skipped").inc()
                continue
            k = min(self._k, query.n_docs)
            chosen = None if selection is None else selection.chosen()
            scores = answers[b].scores[:k].copy()
            self._waiting.append(
                Sample(collection, query.vectors[b].copy(), k, scores, collection.delta.moment, chosen)
            )
            self._loop.call_soon_threadsafe(self._wake.set)

    async def start(self) -> None:
        if self._fraction:
            self._loop = asyncio.get_running_loop()
            self._task = asyncio.create_task(self._compare_all(), name="canary")

    async def stop(self) -> None:
        self._stopping.set()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._thread.shutdown(wait=False, cancel_futures=True)

    def recall(self, collection: Collection) -> Recall | None:
        """What was found of what there was, by the queries compared last; None where none was."""
        window = self._windows.get(collection.name)
        return None if window is None or window.generation != collection.generation else window.recall(self._k)

    def forget(self, name: str) -> None:
        """The collection is gone."""
        if self._windows.pop(name, None) is not None:
            self._metrics.recall.remove(name)

    # --- in the background -----------------------------------------------------------------------------

    async def _compare_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                collection = self._waiting[0].collection
                samples = [sample for sample in list(self._waiting) if sample.collection is collection]
                try:
                    shares = await self._compared(collection, samples)
                except Exception as error:
                    if not isinstance(error, RagError):  # the service stops
                        log.exception("canary_failed", collection=collection.name)
                    self._metrics.canary.labels(collection.name, "failed").inc(len(samples))
                else:
                    self._record(collection, [share for share in shares if share is not None])
                for sample in samples:
                    self._waiting.remove(sample)

    async def _compared(self, collection: Collection, samples: Sequence[Sample]) -> list[float | None]:
        """The recall of each sample."""
        loop, delta = asyncio.get_running_loop(), collection.delta
        in_thread = partial(loop.run_in_executor, self._thread)
        alive = await in_thread(lambda: [sample.alive() for sample in samples])
        bests = [Best(sample.query, sample.k) for sample in samples]
        await in_thread(self._see_generation, collection, alive, bests)
        stored = collection.index.count
        for part in slices(max(sample.moment.written for sample in samples), collection.manifest.dimension):
            # What is written since moves in memory as it grows: only the thread that searches may look.
            rows = stored + np.arange(part.start, part.stop)
            embeddings_KD = await self._in_worker(partial(delta.embeddings, rows))
            began_s = time.perf_counter()
            masks = [rows_alive[rows[0] : rows[-1] + 1] for rows_alive in alive]
            await in_thread(_see, embeddings_KD, masks, bests)
            await asyncio.sleep(self._rest_s(time.perf_counter() - began_s))
        return await in_thread(
            lambda: [best.recall(sample.scores) for best, sample in zip(bests, samples, strict=True)]
        )

    def _see_generation(self, collection: Collection, alive: Sequence[BoolArray], bests: Sequence[Best]) -> None:
        for part in slices(collection.index.count, collection.manifest.dimension):
            began_s = time.perf_counter()
            _see(collection.index.embeddings(part), [rows_alive[part] for rows_alive in alive], bests)
            if self._stopping.wait(self._rest_s(time.perf_counter() - began_s)):
                return

    def _rest_s(self, worked_s: float) -> float:
        return worked_s * (1 / SHARE_OF_A_CORE - 1)

    def _record(self, collection: Collection, shares: Sequence[float]) -> None:
        self._metrics.canary.labels(collection.name, "checked").inc(len(shares))
        if not shares or not self._serves(collection):
            return
        window = self._windows.get(collection.name)
        if window is None or window.generation != collection.generation:
            window = self._windows[collection.name] = _Window(collection.generation, self._window)
        for share in shares:
            window.add(share)
        recall = window.recall(self._k)
        self._metrics.recall.labels(collection.name).set(recall.estimate)
        low = recall.queries >= FEWEST_TO_WARN and recall.estimate < self._least
        if low != window.low:
            window.low = low
            about = {"collection": collection.name, **recall.model_dump(exclude={"low"}), "threshold": self._least}
            if low:
                log.warning("recall_is_low", **about)
            else:
                log.info("recall_is_back", **about)


def _see(embeddings_KD: Float32Array, masks: Sequence[BoolArray], bests: Sequence[Best]) -> None:
    for mask, best in zip(masks, bests, strict=True):
        seen = mask[: len(embeddings_KD)]
        if len(seen) == len(embeddings_KD) and seen.all():
            best.see(embeddings_KD)
        elif seen.any():
            best.see(embeddings_KD[: len(seen)][seen])


def _be_nice() -> None:
    """The calling thread alone, as Linux has it; where the system knows no such thing, rests have to do."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
