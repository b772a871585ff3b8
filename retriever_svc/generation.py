"""A generation: one build of passages and index, in a folder of its own, described and sealed by its manifest.

    data/collections/<collection>/
        CURRENT                        name of the generation that serves, replaced atomically
        generations/<generation>/
            manifest.json              what the others are, with the sha256 of each
            index.faiss                vectors, row by row
            embeddings.bin             the true embeddings, where the index does not keep them
            passages.lance/            id, title, text, embedding, metadata of the same rows: the record
            texts.bin, texts.offsets   title, text and metadata once more, as they are read to answer

A generation never changes once it has its name. Another one is built beside it and takes over by CURRENT.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import StartupError
from shared.schemas import SearchParams

FORMAT = 2
MANIFEST = "manifest.json"
PASSAGES = "passages.lance"
CURRENT = "CURRENT"
CURRENT_LOCK = ".current-lock"
GENERATIONS = "generations"

REBUILD = "restore it from a copy, or remove the collection's folder and build it anew from its source"


class FileRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class Manifest(BaseModel):
    """What a generation holds. Additions raise ``FORMAT``; another format is refused, not guessed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    kind: str  # preset, or faiss factory string
    factory: str  # what faiss built
    search_params: SearchParams  # how widely it is searched
    metric: Literal["inner_product"] = "inner_product"
    dimension: int
    count: int
    dtype: Literal["float16", "float32"]  # storage of the embeddings in the passage table
    max_norm: float  # largest norm of an embedding: bounds rounding and overflow of scores
    encoder: str  # fingerprint of the question encoder whose space the embeddings live in
    origin: Literal["seed", "build"]  # only a collection that was seeded is renewed when the seed changes
    source_sha256: str | None = None  # of the file it was built from, where it was one
    attribution: str | None = None
    passages_version: int  # version of the Lance data set
    lineage: str  # the change log that goes on from this generation
    applied: int = 0  # its last change that is in this generation
    versions: dict[str, str]  # of the libraries that wrote it
    created_at: str
    files: dict[str, FileRecord]  # by path inside the generation's folder


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and sha256 of files in ``folder``."""
    return dict(_hash_files(folder, names))


def current_generation(collection: Path) -> Path:
    """Folder of the generation that CURRENT names.

    Raises: StartupError: there is no such folder.
    """
    pointer = collection / CURRENT
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{pointer} cannot be read ({error}); write the name of a generation into it") from error
    folders = {path.name: path for path in (collection / GENERATIONS).glob("*/")}
    if name not in folders:
        raise StartupError(
            f"{pointer} names {name!r}, which is no folder of {collection / GENERATIONS}; "
            "write the name of one that is there into it"
        )
    return folders[name]


def set_current(collection: Path, generation: str, *, after: str | None = None) -> bool:
    """Make ``generation`` the one that serves: readers see the old name or the new one, never less.

    ``after``: only if CURRENT still names that one, and not what another process has built meanwhile; whether it did.
    """
    with (collection / CURRENT_LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held for as long as the disk takes
        if after is not None and (collection / CURRENT).read_text(encoding="utf-8").strip() != after:
            return False
        fresh = collection / f"{CURRENT}.new"
        fresh.write_text(f"{generation}\n", encoding="utf-8")
        flush(fresh)
        fresh.replace(collection / CURRENT)
        flush(collection)
    return True


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a generation.

    Raises: StartupError: missing, damaged, or of a format that this version does not know.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StartupError(f"{path} is missing; {REBUILD}") from error
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} cannot be read ({error}); {REBUILD}") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found == 1:  # knew kind flat only, and no changes
        raw, found = {**raw, "format": FORMAT, "factory": "Flat", "search_params": {}, "lineage": folder.name}, FORMAT
    if found != FORMAT:
        raise StartupError(
            f"{path} has format {found!r}, this version reads format {FORMAT}; "
            "serve it with the version that wrote it, or rebuild the collection"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        field = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise StartupError(f"{path} is damaged at `{field}`; {REBUILD}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Read every file of the generation and compare it with the manifest.

    Raises: StartupError: names the first file that is missing or differs.
    """
    verify_sizes(folder, manifest)
    for name, found in _hash_files(folder, manifest.files):
        if found.sha256 != manifest.files[name].sha256:
            raise StartupError(f"{folder / name} is damaged: its sha256 is not that of the manifest; {REBUILD}")


def verify_sizes(folder: Path, manifest: Manifest) -> None:
    """Look whether every file of the generation is there and as long as the manifest says, without reading it.

    Raises: StartupError: names the first file that is missing or differs.
    """
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise StartupError(f"{path} is missing; {REBUILD}")
        if path.stat().st_size != record.size:
            raise StartupError(
                f"{path} has {path.stat().st_size} bytes where its manifest says {record.size}; {REBUILD}"
            )


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Streamed, so that a file larger than memory can be hashed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_files(folder: Path, names: Iterable[str]) -> Iterable[tuple[str, FileRecord]]:
    # hashlib releases the interpreter lock: the files are hashed in parallel.
    def record(name: str) -> tuple[str, FileRecord]:
        path = folder / name
        return name, FileRecord(size=path.stat().st_size, sha256=file_sha256(path))

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="hash") as pool:
        return list(pool.map(record, names))
