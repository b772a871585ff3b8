"""Builds a generation of a collection: all of it or nothing, whenever the power goes.

Everything is written to a folder with a temporary name and flushed to the disk; then the folder gets its name in
one rename, and CURRENT points to it in another. A build that dies leaves a temporary folder, which the next build
removes. One build of a collection runs at a time: a lock file, released by the kernel when its holder dies.
"""

import fcntl
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import structlog

from retriever_svc import generation as gen
from retriever_svc.index import FLAT, IndexBuilder
from retriever_svc.passages import PassageTable, passage_schema
from retriever_svc.source import Source, embeddings_of, first_repeated
from retriever_svc.text_file import TextWriter
from retriever_svc.versions import library_versions
from shared.errors import InvalidRequest
from shared.retrieval import Int64Array
from shared.schemas import SearchParams

LOCK = ".lock"
TEMPORARY = ".building-"


@dataclass(frozen=True)
class Options:
    """What to make of a source.

    ``kind``: preset or factory string; ``search_params``: where they differ from the preset's. ``index_file``: an index
    over the rows of the source, taken as it is; ``kind`` is what the next generation is built as. ``lineage`` and
    ``applied``: the change log that goes on, and its last change in the source; a new log otherwise.
    """

    kind: str = FLAT
    search_params: SearchParams | None = None
    origin: Literal["seed", "build"] = "build"
    index_file: Path | None = None
    lineage: str | None = None
    applied: int = 0


Progress = Callable[[int, int | None], None]
"""Called with the rows taken so far and the rows of the source, where known."""

log = structlog.get_logger(__name__)


def build_collection(
    collection: Path,
    source: Source,
    *,
    options: Options | None = None,
    progress: Progress | None = None,
) -> str:
    """Build a generation from ``source`` and make it the current one.

    ``collection`` is the folder ``data/collections/<name>``, made where it is missing. What served before stays in
    place, for whoever has it open.

    Returns: the generation's name.
    Raises: InvalidRequest: the source is empty, repeats an id, or has values that cannot be served.
    """
    with collection_lock(collection):
        return build_locked(collection, source, options, progress)


def build_locked(
    collection: Path, source: Source, options: Options | None = None, progress: Progress | None = None
) -> str:
    """As :func:`build_collection`, for a caller that holds the lock."""
    generations = collection / gen.GENERATIONS
    generations.mkdir(exist_ok=True)
    for abandoned in generations.glob(f"{TEMPORARY}*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    now = datetime.now(UTC)
    name = f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    folder = generations / f"{TEMPORARY}{name}"
    folder.mkdir()
    try:
        manifest = _write_generation(folder, source, options or Options(), now, progress)
        gen.write_manifest(folder, manifest)
        for path in [*folder.rglob("*"), folder]:
            gen.flush(path)
        folder.rename(generations / name)
    except BaseException:
        shutil.rmtree(folder)
        raise
    gen.flush(generations)
    gen.set_current(collection, name)
    log.info("generation_built", collection=collection.name, generation=name, passages=manifest.count)
    return name


@contextmanager
def collection_lock(collection: Path) -> Iterator[None]:
    """Keep every other builder of this collection out, in this process and in others; waits for its turn."""
    collection.mkdir(parents=True, exist_ok=True)
    with (collection / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting_for_another_build", collection=collection.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_generation(
    folder: Path, source: Source, options: Options, now: datetime, progress: Progress | None
) -> gen.Manifest:
    keep = options.index_file is not None
    index = IndexBuilder(folder, source.dimension, source.dtype, options.kind, keep=keep)
    schema = passage_schema(source.dimension, source.dtype, source.metadata)
    try:
        with TextWriter(folder, source.metadata.names) as texts:
            writing = _Writing(source, index, texts, progress)
            passages_version = PassageTable.write(folder / gen.PASSAGES, schema, writing.batches())
    except OSError as error:
        # Lance reads the batches from Rust, which turns whatever our generator raised into an OSError with its text.
        raise writing.failure or error from error
    if not writing.count:
        raise InvalidRequest("the source has no passages", param="source")
    if repeated := first_repeated(writing.ids()):
        raise InvalidRequest("id {} stands in rows {} and {}; ids must be unique".format(*repeated), param="id")
    settled = writing.index.write(options.search_params, progress, options.index_file)
    return gen.Manifest(
        kind=settled.kind,
        factory=settled.factory,
        search_params=settled.params,
        dimension=source.dimension,
        count=writing.count,
        dtype="float16" if source.dtype == "float16" else "float32",
        max_norm=writing.max_norm,
        encoder=source.encoder,
        origin=options.origin,
        source_sha256=source.sha256,
        attribution=source.attribution,
        passages_version=passages_version,
        lineage=options.lineage or uuid.uuid4().hex,
        applied=options.applied,
        versions=library_versions(),
        created_at=now.isoformat(timespec="seconds"),
        files=gen.describe_files(folder),
    )


class _Writing:
    """Passes clean batches on to the table; on the way the index, the texts and the manifest take what they need."""

    def __init__(self, source: Source, index: IndexBuilder, texts: TextWriter, progress: Progress | None) -> None:
        self._source = source
        self._texts = texts
        self._progress = progress
        self._ids: list[Int64Array] = []
        self.index = index
        self.count = 0
        self.max_norm = 0.0
        self.failure: BaseException | None = None

    def batches(self) -> Iterator[pa.RecordBatch]:
        try:
            for batch in self._source.clean_batches():
                embeddings_BD = embeddings_of(batch)
                self.index.add(embeddings_BD)
                self._texts.add(batch)
                norms_B = np.linalg.norm(embeddings_BD.astype(np.float64), axis=1)
                self.max_norm = max(self.max_norm, float(norms_B.max()))
                self._ids.append(batch.column("id").to_numpy())
                self.count += len(batch)
                if self._progress is not None:
                    self._progress(self.count, self._source.count)
                yield batch
        except BaseException as error:
            self.failure = error
            raise

    def ids(self) -> Int64Array:
        return np.concatenate(self._ids)
