"""Writes to one collection: changes in order, each on the disk and visible before it is acknowledged; and generations.

Belongs to the event loop. Changes that come while one is written share the next wait for the disk.
"""

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import structlog

from retriever_svc import generation as gen
from retriever_svc.catalog import Catalog, InWorker
from retriever_svc.changes import Change, ChangeLog, Delete, remove_lineages, remove_until
from retriever_svc.checkpoint import TEMPORARY
from retriever_svc.collection import Collection
from retriever_svc.upserts import Draft
from shared.errors import Conflict, InferenceError, InvalidRequest, NotFound, RagError, Unavailable
from shared.schemas import BuildRequest, Written

LARGEST_GROUP = 64  # changes that share a wait for the disk

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class _Waiting:
    request: Draft | Delete
    written: "asyncio.Future[Written]"

    @property
    def change(self) -> Change:
        return self.request.change if isinstance(self.request, Draft) else self.request


class Writer:
    def __init__(
        self,
        catalog: Catalog,
        name: str,
        in_worker: InWorker,
        *,
        keep_generations: int,
        rebuild_after: int,
        on_build: Callable[[str], None],
    ) -> None:
        """``in_worker`` runs a function in the thread that searches, between two batches; ``on_build`` is told how each
        build ended: done or failed."""
        self._catalog = catalog
        self._name = name
        self._in_worker = in_worker
        self._keep = keep_generations
        self._rebuild_after = rebuild_after
        self._on_build = on_build
        self._queue: list[_Waiting] = []
        self._lock = asyncio.Lock()  # held while changes are written, and while a generation takes over
        self._log: ChangeLog | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._building = False
        self._dropped = False

    @property
    def collection(self) -> Collection:
        return self._catalog.collections[self._name]

    async def write(self, request: Draft | Delete) -> Written:
        """Store passages, or delete them.

        Raises: Conflict: another process writes to the collection. Unavailable: the disk does not take it, or the
        service stops; the change was not acknowledged.
        """
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._start(self._drain())
        # Whoever asked may go away; a change that was taken is finished.
        return await asyncio.shield(waiting.written)

    def _gone(self) -> NotFound:
        return NotFound(f"there is no collection `{self._name}` any more", param="collection")

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _drain(self) -> None:
        async with self._lock:
            group, self._queue = self._queue[:LARGEST_GROUP], self._queue[LARGEST_GROUP:]
            if not group:
                return
            try:
                if self._dropped:
                    raise self._gone()
                await self._write_group(group)
            except BaseException as error:
                refused = error if isinstance(error, RagError) else Unavailable(f"not stored: {error}", retry_after_s=1)
                for waiting in group:
                    if not waiting.written.done():
                        waiting.written.set_exception(refused.copy())
                if not isinstance(error, Exception):
                    raise
                if not isinstance(error, NotFound):
                    log.exception("write_failed", collection=self._name)
        if not self._dropped and self.collection.delta.size >= self._rebuild_after and not self._building:
            self._start(self._rebuild_quietly())

    async def _write_group(self, group: list[_Waiting]) -> None:
        collection = self.collection
        free = collection.next_id
        for waiting in list(group):
            if isinstance(waiting.request, Draft):
                try:
                    waiting.request.check(collection)
                    free = waiting.request.name(free)
                except (Conflict, InvalidRequest) as error:
                    waiting.written.set_exception(error)
                    group.remove(waiting)
        if not group:
            return
        if self._log is None:
            self._log = await asyncio.to_thread(collection.open_log)
        first = self._log.last + 1
        changes = [waiting.change for waiting in group]
        await asyncio.to_thread(self._log.append, changes)
        gone = await self._in_worker(lambda: [collection.apply(first + i, change) for i, change in enumerate(changes)])
        for i, waiting in enumerate(group):
            if not waiting.written.done():
                ids = waiting.change.ids.tolist()
                waiting.written.set_result(Written(ids=ids, gone=gone[i], version=first + i))

    # --- generations -----------------------------------------------------------------------------------

    def generations(self) -> list[tuple[str, gen.Manifest]]:
        """Newest first; reads the disk."""
        folder = self.collection.folder / gen.GENERATIONS
        names = sorted((path.name for path in folder.iterdir() if (path / gen.MANIFEST).exists()), reverse=True)
        return [(name, gen.read_manifest(folder / name)) for name in names if not name.startswith(".")]

    def begin_build(self) -> None:
        """Raises: Conflict: one is running."""
        if self._building:
            raise Conflict(f"a generation of `{self._name}` is being built already")
        self._building = True

    async def build(self, request: BuildRequest) -> str:
        """Build a generation of what can be found now and let it take over; after :meth:`begin_build`. Its name."""
        outcome = "failed"
        try:
            async with self._lock:
                collection = self.collection
                upto = collection.applied
                if self._log is not None:
                    self._log.roll()
            name = await self._built(collection, upto, request)
            await self._take_over(name, after=collection.generation)
            await asyncio.to_thread(self._prune)
            outcome = "done"
            return name
        finally:
            self._building = False
            self._on_build(outcome)

    async def _built(self, collection: Collection, upto: int, request: BuildRequest) -> str:
        params = [] if request.search_params is None else [request.search_params.model_dump_json()]
        arguments = [str(collection.folder), collection.generation, str(upto), request.kind or "", *params]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "retriever_svc.rebuild",
            *arguments,
            stdin=asyncio.subprocess.PIPE,  # it ends when this end does
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert process.stdout is not None  # noqa: S101
            assert process.stderr is not None  # noqa: S101
            # Not `communicate`, which closes the other end of its input.
            out, err = await asyncio.gather(process.stdout.read(), process.stderr.read())
            await process.wait()
        except BaseException:
            process.kill()
            raise
        if process.returncode:
            said = err.decode(errors="replace").strip()
            log.error("build_failed", collection=self._name, exit_code=process.returncode, error=said)
            if process.returncode < 0:  # what it said last, if anything, is no reason
                raise InferenceError(f"the build was killed by signal {-process.returncode}")
            raise InferenceError(f"the build failed: {said.splitlines()[-1] if said else process.returncode}")
        return out.decode().split()[-1]

    async def rollback(self, generation: str) -> None:
        """Serve an earlier generation again, with the changes that were made to it.

        Raises: InvalidRequest: there is no such generation. Conflict: one is being built.
        """
        if self._building:
            raise Conflict(f"a generation of `{self._name}` is being built")
        if generation not in [name for name, _ in await asyncio.to_thread(self.generations)]:
            raise InvalidRequest(f"collection `{self._name}` has no generation {generation}", param="generation")
        await self._take_over(generation)

    async def reload(self) -> None:
        """Serve the generation that is current on the disk, if it is another.

        Raises: Conflict: one is being built. StartupError: it is damaged.
        """
        if self._building:
            raise Conflict(f"a generation of `{self._name}` is being built")
        current = await asyncio.to_thread(gen.current_generation, self.collection.folder)
        if current.name != self.collection.generation:
            await self._take_over(current.name)
            await asyncio.to_thread(self._prune)

    async def _take_over(self, generation: str, *, after: str | None = None) -> None:
        """Load ``generation`` beside what serves, then swap: requests in flight end with what they began with.

        ``after``: the next start serves it only if CURRENT names that one, and not what somebody has built meanwhile.

        Raises: Unavailable: it is damaged. NotFound: the collection was dropped meanwhile.
        """
        old = self.collection
        fresh = await self._catalog.load(old.folder, generation, self._in_worker)
        async with self._lock:
            if self._dropped:
                raise self._gone()
            await asyncio.to_thread(fresh.catch_up)  # what was written while it was built and loaded
            if not await asyncio.to_thread(partial(gen.set_current, old.folder, generation, after=after)):
                log.warning("another_build_is_current", collection=self._name, generation=generation)
            if self._log is not None and fresh.manifest.lineage != old.manifest.lineage:
                self._log.close()
                self._log = None
            self._catalog.collections[self._name] = fresh
        log.info("serving", **fresh.info.model_dump())

    def _prune(self) -> None:
        """Remove generations beyond those to keep, and the changes that none of the others needs.

        What serves stays, and what the next start will serve, which another process may have chosen.
        """
        found = self.generations()
        kept = {name for name, _ in found[: self._keep]} | {self.collection.generation}
        kept.add(gen.current_generation(self.collection.folder).name)
        for name, _ in found:
            if name not in kept:
                folder = self.collection.folder / gen.GENERATIONS
                # Out of sight in one step: what a crash leaves of it, the next build removes.
                leaving = (folder / name).rename(folder / f"{TEMPORARY}{name}")
                shutil.rmtree(leaving, ignore_errors=True)
                log.info("generation_removed", collection=self._name, generation=name)
        lineage = self.collection.manifest.lineage
        applied = [manifest.applied for _, manifest in self.generations() if manifest.lineage == lineage]
        remove_until(self.collection.folder, lineage, min(applied))
        remove_lineages(self.collection.folder, {manifest.lineage for _, manifest in self.generations()})

    async def _rebuild_quietly(self) -> None:
        try:
            self.begin_build()
            await self.build(BuildRequest())
        except Conflict:
            return
        except Exception:
            log.exception("rebuild_failed", collection=self._name)

    @asynccontextmanager
    async def ending(self) -> AsyncIterator[None]:
        """While the collection is dropped: no change is written, and none after that.

        Raises: Conflict: a generation is being built.
        """
        async with self._lock:
            if self._building:
                raise Conflict(f"a generation of `{self._name}` is being built", param="collection")
            self._building = self._dropped = True
            try:
                yield
            except BaseException:
                self._building = self._dropped = False
                raise
            if self._log is not None:
                self._log.close()
                self._log = None

    async def close(self) -> None:
        """Finish what was taken."""
        for task in list(self._running):
            if not task.done():
                await asyncio.wait([task], timeout=10)
                task.cancel()
        if self._log is not None:
            self._log.close()
