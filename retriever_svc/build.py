"""Builds a generation of a collection: all of it or nothing, whenever the power goes.

Rows are stored, the index is trained, and filled, each from where an earlier run of the same build left it
(:mod:`retriever_svc.checkpoint`). Then the folder gets its name in one rename, and CURRENT points to it in another.
One build of a collection runs at a time: a lock file, released by the kernel when its holder dies.
"""

import fcntl
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import structlog

from retriever_svc import generation as gen
from retriever_svc.checkpoint import TEMPORARY, BuildPlan, Progress, Work, clear_abandoned
from retriever_svc.index import EMBEDDINGS, FLAT, build_index, empty_index_of, recipe, take_index
from retriever_svc.index.kinds import Recipe
from retriever_svc.index.vectors import VectorsFile, VectorSource
from retriever_svc.passages import TableVectors
from retriever_svc.record import Record
from retriever_svc.source import Source
from retriever_svc.versions import library_versions
from shared.errors import Conflict, InvalidRequest
from shared.schemas import SearchParams

__all__ = ["TEMPORARY", "Options", "Progress", "build_collection", "build_locked", "collection_lock"]

LOCK = ".lock"


@dataclass(frozen=True)
class Options:
    """What to make of a source.

    ``kind``: preset or factory string; ``search_params``: where they differ from the preset's. ``index_file``: an index
    over the rows of the source, taken as it is; ``kind`` is what the next generation is built as. ``lineage`` and
    ``applied``: the change log that goes on, and its last change in the source; a new log otherwise. ``current``: make
    it the generation that serves. ``may_be_empty``: a source without passages is no mistake.
    """

    kind: str = FLAT
    search_params: SearchParams | None = None
    origin: Literal["seed", "build"] = "build"
    index_file: Path | None = None
    lineage: str | None = None
    applied: int = 0
    current: bool = True
    may_be_empty: bool = False

    @property
    def keeps_embeddings(self) -> bool:
        """In a file of their own; that of a flat index is one already."""
        return self.kind != FLAT or self.index_file is not None


log = structlog.get_logger(__name__)


def build_collection(
    collection: Path,
    source: Source,
    *,
    options: Options | None = None,
    progress: Progress | None = None,
) -> str:
    """Build a generation from ``source`` and make it the current one, unless ``options`` say otherwise.

    ``collection`` is the folder ``data/collections/<name>``, made where it is missing. What served before stays in
    place, for whoever has it open. A build of a source with an ``identity`` that was killed, in any way, goes on when
    it is called again with the same source and options; ``search_params`` may be others.

    Returns: the generation's name.
    Raises: InvalidRequest: the source is empty, repeats an id, or has values that cannot be served.
    """
    with collection_lock(collection):
        return build_locked(collection, source, options, progress)


def build_locked(
    collection: Path, source: Source, options: Options | None = None, progress: Progress | None = None
) -> str:
    """As :func:`build_collection`, for a caller that holds the lock."""
    options = options or Options()
    recipe(options.kind, source.dimension, 1)  # refuses a kind that cannot be, before anything is read
    generations = collection / gen.GENERATIONS
    generations.mkdir(exist_ok=True)
    plan = _plan(source, options)
    clear_abandoned(generations, plan)
    work = Work.open(generations, plan, progress)
    name = work.state.sealed
    try:
        if name is None or not (generations / name).exists():
            name = _finish(work, generations, source, options, progress)
    except BaseException as error:
        refused = isinstance(error, InvalidRequest) and not isinstance(error.__cause__, OSError)
        if source.identity is None or refused:  # nobody can go on with it
            work.remove()
        raise
    if options.current:
        gen.set_current(collection, name)
    work.remove()
    log.info("generation_built", collection=collection.name, generation=name)
    return name


@contextmanager
def collection_lock(collection: Path, *, wait: bool = True) -> Iterator[None]:
    """Keep every other builder of this collection out, in this process and in others; waits for its turn.

    Raises: Conflict: another builds, and ``wait`` is false.
    """
    collection.mkdir(parents=True, exist_ok=True)
    with (collection / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise Conflict(f"another process builds the collection `{collection.name}`") from None
            log.info("waiting_for_another_build", collection=collection.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _plan(source: Source, options: Options) -> BuildPlan:
    versions = library_versions()
    return BuildPlan(
        source=source.identity or uuid.uuid4().hex,
        schema_=source.schema.remove_metadata().to_string(),
        encoder=source.encoder,
        kind=options.kind,
        keeps_embeddings=options.keeps_embeddings,
        index=None if options.index_file is None else _described(options.index_file),
        lineage=options.lineage,
        applied=options.applied,
        origin=options.origin,
        versions={name: versions[name] for name in ("faiss", "lance")},
    )


def _described(path: Path) -> str:
    found = path.stat()
    return f"{path.name} {found.st_size} {found.st_mtime_ns}"


def _finish(work: Work, generations: Path, source: Source, options: Options, progress: Progress | None) -> str:
    """Do what is left to do, and give the generation its name."""
    Record(work, source, keeps_embeddings=options.keeps_embeddings, progress=progress).finish(
        may_be_empty=options.may_be_empty
    )
    settled = recipe(options.kind, source.dimension, work.state.rows, options.search_params)
    factory = _index(work, source, options, settled, progress)
    now = datetime.now(UTC)
    name = f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    manifest = gen.Manifest(
        kind=settled.kind,
        factory=factory,
        search_params=settled.params,
        dimension=source.dimension,
        count=work.state.rows,
        dtype="float16" if source.dtype == "float16" else "float32",
        max_norm=work.state.max_norm,
        encoder=source.encoder,
        origin=options.origin,
        source_sha256=source.sha256,
        attribution=source.attribution,
        passages_version=work.state.table_version,
        lineage=options.lineage or uuid.uuid4().hex,
        applied=options.applied,
        versions=library_versions(),
        created_at=now.isoformat(timespec="seconds"),
        files=work.records(),
    )
    gen.write_manifest(work.generation, manifest)
    gen.flush(work.generation / gen.MANIFEST)
    gen.flush(work.generation)
    work.save({}, sealed=name)
    work.generation.rename(generations / name)
    gen.flush(generations)
    return name


def _index(work: Work, source: Source, options: Options, settled: Recipe, progress: Progress | None) -> str:
    """Build the index, or take the one that is there; faiss's name of it."""
    if options.index_file is not None:
        return take_index(work, options.index_file, work.state.rows, source.dimension)
    if not work.state.rows:  # nothing to train on: the kind is that of the next generation
        return empty_index_of(work, source.dimension)
    vectors: VectorSource
    if options.keeps_embeddings:
        vectors = VectorsFile(work.generation / EMBEDDINGS, source.dimension, source.dtype)
    else:
        vectors = TableVectors(work.generation / gen.PASSAGES, work.state.table_version)
    build_index(work, vectors, settled, progress)
    return settled.factory
