"""The collections of a data folder, by name."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar

import structlog
from pydantic import TypeAdapter

from retriever_svc import generation as gen
from retriever_svc.collection import Collection
from retriever_svc.index import Device, GpuStorage
from retriever_svc.seed import seed_default
from shared.errors import Conflict, NotFound, StartupError

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
        self._folder, self._device, self._gpu_storage = folder, device, gpu_storage

    @classmethod
    def open(
        cls, data_dir: Path, *, seed: Path, device: Device = "auto", gpu_storage: GpuStorage = "float32"
    ) -> "Catalog":
        """Load what the folder holds, after seeding ``default`` where that is due.

        Raises: StartupError: nothing to serve, or a collection is damaged.
        """
        folder = data_dir / COLLECTIONS
        seed_default(folder, seed)
        catalog = cls(folder, device, gpu_storage)
        for path in sorted(folder.glob(f"*/{gen.CURRENT}")):
            name = path.parent.name
            if NAME.fullmatch(name) is None:
                raise StartupError(f"{path.parent} is no name for a collection (pattern {NAME.pattern}); rename it")
            catalog.collections[name] = Collection.open(path.parent, device=device, gpu_storage=gpu_storage)
            log.info("serving", **catalog.collections[name].info.model_dump())
        if not catalog.collections:
            raise StartupError(
                f"{folder} holds no collection and the seed file {seed} does not exist: name a data folder that has "
                "one in RETRIEVER_DATA_DIR, or a Parquet file (id, title, text, embedding) in RETRIEVER_SEED, or make "
                "the demo's with `make demo-model`"
            )
        catalog.aliases = _read_aliases(folder / ALIASES, catalog.collections)
        return catalog

    def get(self, name: str) -> Collection:
        """The collection of that name, or that the alias stands for. Raises: NotFound."""
        collection = self.collections.get(self.aliases.get(name, name))
        if collection is None:
            known = ", ".join([*self.collections, *self.aliases])
            raise NotFound(f"there is no collection `{name}`; there are: {known}", param="collection")
        return collection

    def set_alias(self, alias: str, collection: str | None) -> None:
        """Let ``alias`` stand for a collection from now on, or for none; on the disk before it is in effect.

        Raises: NotFound: no such collection, or alias to remove. Conflict: a collection has that name.
        """
        if alias in self.collections:
            raise Conflict(f"`{alias}` is the name of a collection", param="alias")
        if collection is None and alias not in self.aliases:
            raise NotFound(f"there is no alias `{alias}`", param="alias")
        if collection is not None and collection not in self.collections:
            raise NotFound(f"there is no collection `{collection}`", param="collection")
        aliases = {name: target for name, target in self.aliases.items() if name != alias}
        if collection is not None:
            aliases[alias] = collection
        fresh = self._folder / f"{ALIASES}.new"
        fresh.write_text(json.dumps(aliases, indent=2) + "\n", encoding="utf-8")
        gen.flush(fresh)
        fresh.replace(self._folder / ALIASES)
        gen.flush(self._folder)
        self.aliases = aliases

    async def add(self, name: str, in_worker: InWorker) -> None:
        """Serve a collection that was built since the start.

        Raises: NotFound: there is none. Conflict: an alias has that name. StartupError: it is damaged.
        """
        folder = self._folder / name
        if name in self.aliases:
            raise Conflict(f"`{name}` is an alias of `{self.aliases[name]}`", param="collection")
        if not (folder / gen.CURRENT).exists():
            raise NotFound(f"there is no collection `{name}` in the data folder", param="collection")
        current = await asyncio.to_thread(gen.current_generation, folder)
        self.collections[name] = await self.load(folder, current.name, in_worker)

    async def load(self, folder: Path, generation: str, in_worker: InWorker) -> Collection:
        """A generation beside those that serve, warm.

        On a GPU it is loaded by the thread that searches, which faiss demands: searches wait meanwhile.

        Raises: StartupError: it is damaged.
        """

        def opened() -> Collection:
            return Collection.open(folder, generation=generation, device=self._device, gpu_storage=self._gpu_storage)

        on_gpu = any(collection.index.device != "cpu" for collection in self.collections.values())
        collection = await (in_worker(opened) if on_gpu else asyncio.to_thread(opened))
        await in_worker(collection.warm_up)
        return collection


def _read_aliases(path: Path, collections: dict[str, Collection]) -> dict[str, str]:
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
