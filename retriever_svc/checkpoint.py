"""What an unfinished build has come to: enough to go on after a kill at any moment, and never with other files.

    generations/.building-<digest>/
        plan.json          what the build is of; the folder's name is its digest
        checkpoint.json    how far it is, and size and sha256 of every file that counts; replaced atomically
        generation/        files of the generation to be
        …                  a trained index, or one that is half full

A file counts from the checkpoint on that lists it, which is written once the file is on the disk. Whoever goes on
compares each with its checksum, cuts off what was appended since, and removes what is not listed.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from retriever_svc.generation import FileRecord, flush

if TYPE_CHECKING:
    from hashlib import _Hash

Model = TypeVar("Model", bound=BaseModel)

TEMPORARY = ".building-"
PLAN = "plan.json"
CHECKPOINT = "checkpoint.json"
GENERATION = "generation"
KEPT_S = 7 * 86_400.0  # how long builds in the background leave what somebody began by hand

Progress = Callable[[str, int, int | None], None]
"""Called with the stage, the rows done, those of earlier runs included, and the rows in all, where known."""

log = structlog.get_logger(__name__)


class BuildPlan(BaseModel):
    """Whatever the files of an unfinished build depend on. Another plan has another folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    source: str  # digest of what is read
    schema_: str
    encoder: str
    kind: str
    keeps_embeddings: bool
    index: str | None  # name, size and time of one that is taken as it is
    lineage: str | None  # of a build in the background: the change log that goes on
    applied: int
    origin: str
    versions: dict[str, str]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


class Checkpoint(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int = 0  # of the source, stored
    recorded: bool = False  # all of them are
    max_norm: float = 0.0
    table_version: int = 0
    trained: bool = False
    added: int = 0  # rows in the index
    sealed: str | None = None  # the generation that this became
    files: dict[str, FileRecord] = {}


class GrowingFile:
    """A file that is appended to, and the sha256 of what it holds: no second reading at the end."""

    def __init__(self, path: Path, so_far: "_Hash | None" = None) -> None:
        """``so_far``: of what the file holds already."""
        self._digest = hashlib.sha256() if so_far is None else so_far
        self._file = path.open("wb" if so_far is None else "ab")

    def append(self, data: Any) -> None:
        """``data``: bytes, or a contiguous array."""
        view = memoryview(data)
        if not view.nbytes:
            return
        view = view.cast("B")
        self._digest.update(view)
        self._file.write(view)

    @property
    def size(self) -> int:
        return self._file.tell()

    def record(self) -> FileRecord:
        """Of everything appended so far."""
        self._file.flush()
        return FileRecord(size=self.size, sha256=self._digest.hexdigest())

    def close(self) -> None:
        self._file.close()


class Work:
    """The folder of one build. Whoever opens it holds the collection's lock."""

    def __init__(self, path: Path, state: Checkpoint, digests: "dict[str, _Hash]") -> None:
        self.path = path
        self.state = state
        self._digests = digests  # of the listed files, as they were found
        self.generation = path / GENERATION
        self.generation.mkdir(exist_ok=True)

    @classmethod
    def open(cls, generations: Path, plan: BuildPlan, progress: Progress | None = None) -> "Work":
        """The unfinished build of this plan, verified, or a new one where there is none or it is damaged."""
        path = generations / f"{TEMPORARY}{plan.digest}"
        state, digests = Checkpoint(), dict[str, "_Hash"]()
        if path.exists():
            try:
                if (path / CHECKPOINT).exists() and _read(path / PLAN, BuildPlan) == plan:
                    state = _read(path / CHECKPOINT, Checkpoint)
                    if state.sealed is None or not (generations / state.sealed).exists():
                        digests = _verify(path, state, progress)
            except _UnusableError as error:
                log.warning("build_starts_over", folder=str(path), because=str(error))
                shutil.rmtree(path)
                state, digests = Checkpoint(), {}
        path.mkdir(exist_ok=True)
        _remove_unlisted(path, state.files)
        _write(path / PLAN, plan)
        if state.files:
            log.info("build_goes_on", stored=state.rows, indexed=state.added)
        return cls(path, state, digests)

    def grow(self, path: Path) -> GrowingFile:
        """The file to append to, after what is listed of it."""
        found = self._digests.get(str(path.relative_to(self.path)))
        return GrowingFile(path, None if found is None else found.copy())

    def unlisted(self, folder: Path) -> list[str]:
        """Names of the files below ``folder`` that do not count yet."""
        names = (str(path.relative_to(self.path)) for path in folder.rglob("*") if path.is_file())
        return sorted(name for name in names if name not in self.state.files)

    def save(self, written: Mapping[str, FileRecord], dropped: Iterable[str] = (), **changes: object) -> None:
        """From here on the build goes on from here: with the files ``written``, without those ``dropped``."""
        for name in written:
            flush(self.path / name)
        for folder in {parent for name in written for parent in (self.path / name).parents}:
            if folder == self.path or self.path in folder.parents:
                flush(folder)
        dropped = set(dropped) - set(written)
        files = {**{k: v for k, v in self.state.files.items() if k not in dropped}, **written}
        self.state = self.state.model_copy(update={**changes, "files": files})
        _write(self.path / CHECKPOINT, self.state)
        for name in dropped:
            (self.path / name).unlink(missing_ok=True)

    def records(self) -> dict[str, FileRecord]:
        """Of the generation's files, by their path in it."""
        prefix = f"{GENERATION}/"
        return {k.removeprefix(prefix): v for k, v in sorted(self.state.files.items()) if k.startswith(prefix)}

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def clear_abandoned(generations: Path, plan: BuildPlan) -> None:
    """Remove the unfinished builds that nobody will finish: every other one, whose turn it would be now.

    A build in the background leaves what somebody began by hand, for a week after its last checkpoint.
    """
    for folder in generations.glob(f"{TEMPORARY}*"):
        if folder.name == f"{TEMPORARY}{plan.digest}" or (plan.lineage is not None and _may_go_on(folder)):
            continue
        if (folder / CHECKPOINT).exists():
            log.warning("unfinished_build_removed", folder=folder.name)
        shutil.rmtree(folder, ignore_errors=True)


def _may_go_on(folder: Path) -> bool:
    try:
        by_hand = _read(folder / PLAN, BuildPlan).lineage is None
        return by_hand and time.time() - (folder / CHECKPOINT).stat().st_mtime < KEPT_S
    except (_UnusableError, OSError):
        return False


class _UnusableError(Exception):
    """Why an unfinished build cannot be gone on with."""


def _read(path: Path, model: type[Model]) -> Model:
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise _UnusableError(f"{path.name} cannot be read: {error}") from error


def _write(path: Path, value: BaseModel) -> None:
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(json.dumps(value.model_dump(), indent=1) + "\n", encoding="utf-8")
    flush(fresh)
    fresh.replace(path)
    flush(path.parent)


def _verify(path: Path, state: Checkpoint, progress: Progress | None) -> "dict[str, _Hash]":
    """Digest of each listed file, once it has the size and sha256 listed."""
    digests = {}
    for number, (name, record) in enumerate(state.files.items()):
        try:
            with (path / name).open("r+b") as file:
                if (path / name).stat().st_size > record.size:  # appended to after the checkpoint
                    file.truncate(record.size)
                digest = hashlib.file_digest(file, "sha256")
        except OSError as error:
            raise _UnusableError(f"{name} cannot be read: {error}") from error
        if digest.hexdigest() != record.sha256:
            raise _UnusableError(f"{name} is damaged")
        digests[name] = digest
        if progress is not None:
            progress("checking files", number + 1, len(state.files))
    return digests


def _remove_unlisted(path: Path, files: Mapping[str, FileRecord]) -> None:
    for found in sorted(path.rglob("*"), reverse=True):  # what is in a folder comes before it
        if found.is_dir():
            if not any(found.iterdir()):
                found.rmdir()
        elif str(found.relative_to(path)) not in {*files, PLAN, CHECKPOINT}:
            found.unlink()
