"""The collections of a data folder, by name.

One that is damaged does not keep the others from serving: it answers nothing, and says which file it is.
"""

import asyncio
import json
import re
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import structlog
from pydantic import TypeAdapter

from retriever_svc import generation as gen
from retriever_svc.collection import Collection
from retriever_svc.empty import create_empty, remove_left, take_away
from retriever_svc.index import Device, GpuStorage, goes_to_gpu
from retriever_svc.seed import DEFAULT, seed_default
from shared.errors import Conflict, NotFound, StartupError, Unavailable
from shared.schemas import NewCollection

COLLECTIONS = "collections"
ALIASES = "aliases.json"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

Result = TypeVar("Result")

log = structlog.get_logger(__name__)


class InWorker(Protocol):
    """Runs a function in the thread that searches, between two batches."""

    def __call__(self, function: Callable[[], Result]) -> Awaitable[Result]: ...


class Catalog:
    """Every collection of the data folder, verified and loaded, and the other names that collections go by."""

    def __init__(self, folder: Path, device: Device, gpu_storage: GpuStorage) -> None:
        self.collections: dict[str, Collection] = {}
        self.aliases: dict[str, str] = {}
        self.damaged: dict[str, str] = {}  # why each of them does not serve
        self._changing = asyncio.Lock()  # held while names change
        self._folder, self._device, self._gpu_storage = folder, device, gpu_storage

    @classmethod
    def open(
        cls, data_dir: Path, *, seed: Path, device: Device = "auto", gpu_storage: GpuStorage = "float32"
    ) -> "Catalog":
        """Load what the folder holds, after seeding ``default`` where that is due.

        Raises: StartupError: every collection is damaged, or the seed cannot be used.
        """
        folder = data_dir / COLLECTIONS
        remove_left(folder)
        _seed(folder, seed)
        catalog = cls(folder, device, gpu_storage)
        for path in sorted(folder.glob(f"*/{gen.CURRENT}")):
            name = path.parent.name
            if name.startswith("."):  # of a restore that a crash cut short
                continue
            if NAME.fullmatch(name) is None:
                raise StartupError(f"{path.parent} is no name for a collection (pattern {NAME.pattern}); rename it")
            try:
                catalog.collections[name] = Collection.open(path.parent, device=device, gpu_storage=gpu_storage)
            except StartupError as error:
                log.error("collection_damaged", collection=name, error=error.message)
                catalog.damaged[name] = error.message
            else:
                log.info("serving", **catalog.collections[name].info.model_dump())
        if catalog.damaged and not catalog.collections:
            raise StartupError("; ".join(catalog.damaged.values()))
        if not catalog.collections:
            log.warning("no_collections", folder=str(folder), seed=str(seed))
        catalog.aliases = _read_aliases(folder / ALIASES, [*catalog.collections, *catalog.damaged])
        return catalog

    @property
    def warnings(self) -> list[str]:
        """What is wrong, although others serve."""
        if not self.collections and not self.damaged:
            return [f"{self._folder} holds no collection: create one, or name a seed in RETRIEVER_SEED"]
        return [f"the collection `{name}` is damaged: {why}" for name, why in self.damaged.items()]

    def get(self, name: str) -> Collection:
        """The collection of that name, or that the alias stands for. Raises: NotFound; Unavailable: it is damaged."""
        meant = self.aliases.get(name, name)
        collection = self.collections.get(meant)
        if collection is None:
            if meant in self.damaged:
                raise Unavailable(f"the collection `{meant}` is damaged: {self.damaged[meant]}", param="collection")
            known = ", ".join([*self.collections, *self.aliases]) or "none"
            raise NotFound(f"there is no collection `{name}`; there are: {known}", param="collection")
        return collection

    async def set_alias(self, alias: str, collection: str | None) -> None:
        """Let ``alias`` stand for a collection from now on, or for none; on the disk before it is in effect.

        Raises: NotFound: no such collection, or alias to remove. Conflict: a collection has that name.
        """
        async with self._changing:
            if alias in self.collections or alias in self.damaged:
                raise Conflict(f"`{alias}` is the name of a collection", param="alias")
            if collection is None and alias not in self.aliases:
                raise NotFound(f"there is no alias `{alias}`", param="alias")
            if collection is not None and collection not in self.collections:
                raise NotFound(f"there is no collection `{collection}`", param="collection")
            aliases = {name: target for name, target in self.aliases.items() if name != alias}
            if collection is not None:
                aliases[alias] = collection
            await self._write_aliases(aliases)

    async def _write_aliases(self, aliases: dict[str, str]) -> None:
        def write() -> None:
            fresh = self._folder / f"{ALIASES}.new"
            fresh.write_text(json.dumps(aliases, indent=2) + "\n", encoding="utf-8")
            gen.flush(fresh)
            fresh.replace(self._folder / ALIASES)
            gen.flush(self._folder)

        await asyncio.to_thread(write)
        self.aliases = aliases

    async def create(self, asked: NewCollection, in_worker: InWorker) -> Collection:
        """Make a collection without passages and serve it; on the disk before it is in effect.

        Raises: Conflict: there is one, or an alias of that name. InvalidRequest.
        """
        async with self._changing:
            if asked.name in self.collections or asked.name in self.damaged:
                raise Conflict(f"there is a collection `{asked.name}`", param="name")
            if asked.name in self.aliases:
                raise Conflict(f"`{asked.name}` is an alias of `{self.aliases[asked.name]}`", param="name")
            await asyncio.to_thread(create_empty, self._folder / asked.name, asked)
            return await self._add(asked.name, in_worker)

    async def add(self, name: str, in_worker: InWorker) -> None:
        """Serve a collection that was built since the start, or that was damaged then.

        Raises: NotFound: there is none. Conflict: an alias has that name. StartupError, Unavailable: it is damaged.
        """
        async with self._changing:
            if name in self.aliases:
                raise Conflict(f"`{name}` is an alias of `{self.aliases[name]}`", param="collection")
            if not (self._folder / name / gen.CURRENT).exists():
                raise NotFound(f"there is no collection `{name}` in the data folder", param="collection")
            if name not in self.collections:
                await self._add(name, in_worker)

    async def _add(self, name: str, in_worker: InWorker) -> Collection:
        current = await asyncio.to_thread(gen.current_generation, self._folder / name)
        collection = self.collections[name] = await self.load(self._folder / name, current.name, in_worker)
        self.damaged.pop(name, None)
        log.info("serving", **collection.info.model_dump())
        return collection

    async def drop(self, name: str, in_worker: InWorker, *, remove_aliases: bool) -> None:
        """Serve a collection no more, and remove it; searches that have begun end first.

        Raises: NotFound. Conflict: it is an alias, or one stands for it, or another process builds it. Unavailable: the
        disk does not take it.
        """
        async with self._changing:
            if name in self.aliases:
                raise Conflict(f"`{name}` is an alias of `{self.aliases[name]}`: remove that", param="collection")
            if name not in self.collections and name not in self.damaged:
                raise NotFound(f"there is no collection `{name}`", param="collection")
            pointing = [alias for alias, target in self.aliases.items() if target == name]
            if pointing and not remove_aliases:
                raise Conflict(
                    f"{', '.join(f'`{alias}`' for alias in pointing)} stands for `{name}`: move it, or set "
                    "remove_aliases",
                    param="remove_aliases",
                )
            aliases = self.aliases
            if pointing:  # first: an alias of nothing would stop the next start
                await self._write_aliases({a: target for a, target in aliases.items() if target != name})
            collection = self.collections.pop(name, None)
            if collection is not None:
                collection.dropped = True
                await in_worker(lambda: None)  # what was asked for before is answered then
            try:
                leaving = await asyncio.to_thread(take_away, self._folder / name)
            except (OSError, Conflict) as error:
                if collection is not None:
                    collection.dropped = False
                    self.collections[name] = collection
                if pointing:
                    await self._write_aliases(aliases)
                raise error if isinstance(error, Conflict) else Unavailable(f"not removed: {error}") from error
            self.damaged.pop(name, None)
        log.info("collection_removed", collection=name)
        await asyncio.to_thread(shutil.rmtree, leaving, ignore_errors=True)

    async def load(self, folder: Path, generation: str, in_worker: InWorker) -> Collection:
        """A generation beside those that serve, warm.

        On a GPU it is loaded by the thread that searches, which faiss demands: searches wait meanwhile.

        Raises: Unavailable: it is damaged.
        """

        def opened() -> Collection:
            try:
                return Collection.open(
                    folder, generation=generation, device=self._device, gpu_storage=self._gpu_storage
                )
            except StartupError as error:
                raise Unavailable(error.message) from error

        collection = await (in_worker(opened) if goes_to_gpu(self._device) else asyncio.to_thread(opened))
        await in_worker(collection.warm_up)
        return collection


def _seed(folder: Path, seed: Path) -> None:
    try:
        seed_default(folder, seed)
    except StartupError:
        if not (folder / DEFAULT / gen.CURRENT).exists():
            raise
        log.exception("seed_not_renewed", collection=DEFAULT)  # its damage shows when it is loaded


def _read_aliases(path: Path, collections: Sequence[str]) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        aliases = TypeAdapter(dict[str, str]).validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} cannot be read ({error}); remove it, and set the aliases anew") from error
    for alias, collection in aliases.items():
        if collection not in collections or alias in collections:
            raise StartupError(f"{path}: `{alias}` stands for `{collection}`, which cannot be; edit or remove the file")
    return aliases
