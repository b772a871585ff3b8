"""The collections of a data folder, by name."""

import re
from pathlib import Path

import structlog

from retriever_svc import generation as gen
from retriever_svc.collection import Collection
from retriever_svc.index import Device, GpuStorage
from retriever_svc.seed import seed_default
from shared.errors import NotFound, StartupError

COLLECTIONS = "collections"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

log = structlog.get_logger(__name__)


class Catalog:
    """Every collection of the data folder, verified and loaded."""

    def __init__(self, collections: dict[str, Collection]) -> None:
        self.collections = collections

    @classmethod
    def open(
        cls, data_dir: Path, *, seed: Path, device: Device = "auto", gpu_storage: GpuStorage = "float32"
    ) -> "Catalog":
        """Load what the folder holds, after seeding ``default`` where that is due.

        Raises: StartupError: nothing to serve, or a collection is damaged.
        """
        folder = data_dir / COLLECTIONS
        seed_default(folder, seed)
        opened = {}
        for path in sorted(folder.glob(f"*/{gen.CURRENT}")):
            name = path.parent.name
            if NAME.fullmatch(name) is None:
                raise StartupError(f"{path.parent} is no name for a collection (pattern {NAME.pattern}); rename it")
            opened[name] = Collection.open(path.parent, device=device, gpu_storage=gpu_storage)
            log.info("serving", **opened[name].info.model_dump())
        if not opened:
            raise StartupError(
                f"{folder} holds no collection and the seed file {seed} does not exist: name a data folder that has "
                "one in RETRIEVER_DATA_DIR, or a Parquet file (id, title, text, embedding) in RETRIEVER_SEED, or make "
                "the demo's with `make demo-model`"
            )
        return cls(opened)

    def get(self, name: str) -> Collection:
        """Raises: NotFound."""
        collection = self.collections.get(name)
        if collection is None:
            raise NotFound(
                f"there is no collection `{name}`; there are: {', '.join(self.collections)}", param="collection"
            )
        return collection
