"""The retriever: its collections, the thread that searches them, and the limits of a request."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry

from retriever_svc.canary import Canary
from retriever_svc.catalog import Catalog
from retriever_svc.collection import Collection
from retriever_svc.filters import Selection
from retriever_svc.index import recipe, use_threads
from retriever_svc.jobs import Jobs
from retriever_svc.metrics import RetrieverMetrics
from retriever_svc.search import Call, SearchItem, run_batch
from retriever_svc.settings import RetrieverSettings
from retriever_svc.writer import Writer
from shared.deadline import Deadline
from shared.errors import DeadlineExceeded, InvalidRequest, NotFound, Overloaded, StartupError, Unavailable
from shared.metrics import WorkerMetrics
from shared.retrieval import RetrieveQuery, RetrieveResult
from shared.schemas import BuildRequest, CollectionInfo, Job, NewCollection
from shared.telemetry import current_trace, stage
from shared.worker import DeviceWorker

FULL_QUEUE_S = 0.005
FILTER_THREADS = 2

Result = TypeVar("Result")


class Retriever:
    """Answers batches of query vectors. :meth:`start` loads; every other method belongs to the event loop."""

    def __init__(self, settings: RetrieverSettings, registry: CollectorRegistry) -> None:
        self.settings = settings
        self._metrics = RetrieverMetrics(registry)
        self._metrics.watch_indexes(lambda: self.collections)
        self._catalog: Catalog | None = None
        self._writers: dict[str, Writer] = {}
        self.jobs = Jobs()
        self._filter_threads = ThreadPoolExecutor(FILTER_THREADS, thread_name_prefix="filter")
        self._filtering = 0
        self._canary = Canary(settings, self._metrics, self._in_worker, self._serves)
        self._worker = DeviceWorker[SearchItem | Call, Any](
            lambda items: run_batch(items, self._metrics, self._canary),
            name="search",
            setup=self._load,
            key=lambda item: item.key if isinstance(item, SearchItem) else id(item),
            size=lambda item: item.size if isinstance(item, SearchItem) else settings.max_batch_size,
            max_batch_size=settings.max_batch_size,
            max_wait_ms=settings.max_wait_ms,
            max_queue=settings.max_queue,
            metrics=WorkerMetrics(registry, "search"),
            trace=lambda item: item.trace if isinstance(item, SearchItem) else current_trace(),
        )

    def _load(self) -> None:
        # In the worker's thread: faiss's threads and its GPU resources belong to the thread that searches.
        use_threads(self.settings.faiss_threads)
        catalog = Catalog.open(
            self.settings.data_dir,
            seed=self.settings.seed,
            device=self.settings.device,
            gpu_storage=self.settings.gpu_storage,
        )
        for collection in catalog.collections.values():
            collection.warm_up()
            self._metrics.watch_builds(collection.name)  # a counter that appears with its first failure alerts nobody
        self._metrics.watch_gpus(collection.index.device for collection in catalog.collections.values())
        self._catalog = catalog

    async def start(self) -> None:
        """Raises: StartupError: nothing to serve, or a collection is damaged."""
        await self._worker.start()
        await self._canary.start()

    async def stop(self) -> None:
        await self._canary.stop()
        for writer in self._writers.values():
            await writer.close()
        await self._worker.stop()
        self._filter_threads.shutdown(wait=False, cancel_futures=True)

    async def _in_worker(self, function: Callable[[], Result]) -> Result:
        """Run a function in the thread that searches, between two batches."""
        while True:
            try:
                result: Result = await self._worker.submit(Call(function), Deadline(float("inf")))
            except Overloaded:  # searches fill the queue; a change that is on the disk waits for its turn
                await asyncio.sleep(FULL_QUEUE_S)
            else:
                return result

    def writer(self, name: str) -> Writer:
        """Raises: NotFound, or Unavailable while loading."""
        collection = self.collection(name)
        if collection.name not in self._writers:
            assert self._catalog is not None  # noqa: S101  there is a collection
            self._writers[collection.name] = Writer(
                self._catalog,
                collection.name,
                self._in_worker,
                keep_generations=self.settings.keep_generations,
                rebuild_after=self.settings.rebuild_after,
                on_build=self._metrics.watch_builds(collection.name),
            )
        return self._writers[collection.name]

    async def reload(self, name: str) -> Collection:
        """Serve the generation that is current on the disk.

        Raises: NotFound: there is none. Conflict: another is being built, or the name is an alias. Unavailable: it
        cannot be loaded.
        """
        try:
            if name in self.collections:
                await self.writer(name).reload()
            else:
                await self.catalog.add(name, self._in_worker)
        except StartupError as error:
            raise Unavailable(error.message) from error
        return self.collections[name]

    async def create(self, asked: NewCollection) -> Collection:
        """Make a collection without passages. Raises: InvalidRequest; Conflict: there is one. Unavailable: no disk."""
        try:
            return await self.catalog.create(asked, self._in_worker)
        except OSError as error:
            raise Unavailable(f"not created: {error}") from error

    async def drop(self, name: str, *, remove_aliases: bool) -> None:
        """Remove a collection, for good.

        Raises: NotFound. Conflict: an alias stands for it, or is what is named, or a generation is being built.
        """
        catalog = self.catalog
        if name in catalog.collections:
            async with self.writer(name).ending():
                await catalog.drop(name, self._in_worker, remove_aliases=remove_aliases)
            del self._writers[name]
        else:
            await catalog.drop(name, self._in_worker, remove_aliases=remove_aliases)
        self._canary.forget(name)

    def build(self, name: str, request: BuildRequest) -> Job:
        """Begin to build a generation.

        Raises: NotFound, InvalidRequest: no such kind; Conflict: one is being built.
        """
        writer = self.writer(name)
        if request.kind is not None:
            recipe(request.kind, writer.collection.manifest.dimension, max(1, writer.collection.count))
        writer.begin_build()
        return self.jobs.start(writer.collection.name, writer.build(request))

    @property
    def catalog(self) -> Catalog:
        """Raises: Unavailable while loading."""
        if self._catalog is None:
            raise Unavailable("the collections are being loaded", retry_after_s=1)
        return self._catalog

    def problems(self) -> list[str]:
        """Why no search can be answered now; empty when one can."""
        if self._worker.failure is not None:
            return [self._worker.failure]
        return ["the collections are being loaded"] if self._catalog is None else []

    def warnings(self) -> list[str]:
        """What is wrong although searches are answered."""
        return [] if self._catalog is None else self._catalog.warnings

    @property
    def collections(self) -> dict[str, Collection]:
        return {} if self._catalog is None else self._catalog.collections

    def collection(self, name: str) -> Collection:
        """Raises: NotFound, or Unavailable while loading."""
        return self.catalog.get(name)

    def info(self, collection: Collection) -> CollectionInfo:
        """What it is, and the recall of its searches."""
        return collection.info.model_copy(update={"recall": self._canary.recall(collection)})

    def _serves(self, collection: Collection) -> bool:
        now = self.collections.get(collection.name)
        return now is not None and now.generation == collection.generation

    async def retrieve(self, query: RetrieveQuery, deadline: Deadline) -> RetrieveResult:
        """The documents of each query vector; the search may be shared with other requests.

        Raises: NotFound, InvalidRequest: the request; Overloaded, DeadlineExceeded, Unavailable: the service.
        """
        began = time.perf_counter()
        collection = self.collection(query.collection)
        collection.check_queries(query.vectors)
        collection.check_params(query.search_params)
        self._check_limits(query, collection)
        try:
            selection = None if query.filter is None else await self._selection(collection, query.filter, deadline)
        except InvalidRequest:
            _check_there(collection, query.collection)  # its files may have gone while they were read
            raise
        _check_there(collection, query.collection)
        selected = {} if selection is None else {"filter": (time.perf_counter() - began) * 1e3}
        result: RetrieveResult = await self._worker.submit(SearchItem(query, collection, selection), deadline)
        total = {"total": (time.perf_counter() - began) * 1e3}
        return replace(result, timings_ms={**selected, **result.timings_ms, **total})

    async def _selection(self, collection: Collection, expression: str, deadline: Deadline) -> Selection:
        """The rows that a filter selects; a new one is evaluated in threads of its own."""
        if (known := collection.filters.kept(expression)) is not None:
            return known
        if self._filtering >= self.settings.max_queue:
            raise Overloaded(f"{self._filtering} filters are being evaluated already", retry_after_s=1)
        deadline.check("the filter could be evaluated")
        loop = asyncio.get_running_loop()
        self._filtering += 1
        try:
            with stage("filter"):
                async with asyncio.timeout(deadline.remaining_s):
                    return await loop.run_in_executor(self._filter_threads, collection.filters.select, expression)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed while the filter was evaluated") from None
        finally:
            self._filtering -= 1

    def _check_limits(self, query: RetrieveQuery, collection: Collection) -> None:
        limits, n_vectors = self.settings, len(query.vectors)
        if n_vectors > limits.max_batch_vectors:
            raise InvalidRequest(
                f"{n_vectors} vectors in one request, at most {limits.max_batch_vectors} are taken", param="vectors"
            )
        if query.n_docs > limits.max_n_docs:
            raise InvalidRequest(f"n_docs is {query.n_docs}, at most {limits.max_n_docs} is taken", param="n_docs")
        documents = n_vectors * min(query.n_docs, collection.count)
        if documents > limits.max_documents:
            raise InvalidRequest(
                f"{n_vectors} vectors with {query.n_docs} documents each make {documents} documents, "
                f"at most {limits.max_documents} are sent in one response",
                param="n_docs",
            )


def _check_there(collection: Collection, name: str) -> None:
    """Raises: NotFound: it was removed."""
    if collection.dropped:
        raise NotFound(f"there is no collection `{name}` any more", param="collection")
