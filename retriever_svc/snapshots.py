"""Copies of a collection, to a folder or an object store, and back.

A snapshot is the current generation, the changes since, and a list of all files with their checksums, written last: a
copy without it is no snapshot.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.fs

from retriever_svc import generation as gen
from retriever_svc.build import collection_lock
from retriever_svc.changes import FOLDER, LOCK
from retriever_svc.collection import Collection
from shared.errors import Conflict, InvalidRequest, StartupError

CONTENTS = "snapshot.json"
CHUNK = 1 << 22

Progress = Callable[[int, int | None], None]


def save_snapshot(collection: Path, target: str, progress: Progress | None = None) -> int:
    """Copy the collection to ``target``, a folder or a URL that Arrow opens; the number of files.

    A file that grows while it is copied (the last of the change log) is copied as far as it was whole: what was
    acknowledged before the call is in the copy.

    Raises: StartupError: the collection is damaged. InvalidRequest: the target cannot be written, or is a snapshot.
    """
    current = gen.current_generation(collection)
    manifest = gen.read_manifest(current)
    gen.verify_files(current, manifest)
    changes = collection / FOLDER / manifest.lineage
    files = [gen.CURRENT, f"{gen.GENERATIONS}/{current.name}/{gen.MANIFEST}"]
    files += [f"{gen.GENERATIONS}/{current.name}/{name}" for name in manifest.files]
    files += [str(path.relative_to(collection)) for path in sorted(changes.glob("*")) if path.name != LOCK]
    try:
        system, base = _opened(target)
        if system.get_file_info(f"{base}/{CONTENTS}").type != pa.fs.FileType.NotFound:
            raise InvalidRequest(f"{target} holds a snapshot already", param="target")
        contents = {}
        for done, name in enumerate(files):
            path = f"{base}/{name}"
            system.create_dir(path.rpartition("/")[0], recursive=True)
            with (collection / name).open("rb") as read, system.open_output_stream(path) as write:
                contents[name] = _copied(read, write)
            if progress is not None:
                progress(done + 1, len(files))
        with system.open_output_stream(f"{base}/{CONTENTS}") as file:
            file.write(json.dumps({"collection": collection.name, "files": contents}, indent=2).encode())
    except (OSError, pa.ArrowException) as error:
        raise InvalidRequest(f"{target} cannot be written: {error}", param="target") from error
    return len(files)


def restore_snapshot(source: str, collection: Path, progress: Progress | None = None) -> int:
    """Make ``collection`` from a snapshot, verified; the number of files.

    Raises: Conflict: it is there. InvalidRequest: no snapshot. StartupError: a file is missing or damaged.
    """
    try:
        system, base = _opened(source)
        with system.open_input_stream(f"{base}/{CONTENTS}") as file:
            contents: dict[str, str] = json.loads(file.read())["files"]
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InvalidRequest(f"{source} holds no snapshot: {error}", param="source") from error
    with collection_lock(collection):
        if (collection / gen.CURRENT).exists():
            raise Conflict(f"there is a collection `{collection.name}`: restore under another name", param="name")
        fresh = collection.parent / f".restoring-{uuid.uuid4().hex[:8]}"
        try:
            for done, (name, sha256) in enumerate(contents.items()):
                path = fresh / name
                if not path.resolve().is_relative_to(fresh.resolve()):
                    raise InvalidRequest(f"{source} names a file outside of itself: {name}", param="source")
                path.parent.mkdir(parents=True, exist_ok=True)
                with system.open_input_stream(f"{base}/{name}") as read, path.open("wb") as write:
                    found = _copied(read, write)
                if found != sha256:
                    raise StartupError(f"{source}/{name} is damaged: its sha256 is not that of the snapshot")
                gen.flush(path)
                if progress is not None:
                    progress(done + 1, len(contents))
            Collection.open(fresh, device="cpu")
            for path in sorted(fresh.iterdir(), key=lambda path: path.name == gen.CURRENT):  # CURRENT last
                path.rename(collection / path.name)
            gen.flush(collection)
        except (OSError, pa.ArrowException) as error:
            raise StartupError(f"{source} cannot be read to its end: {error}") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return len(contents)


def _opened(where: str) -> tuple[pa.fs.FileSystem, str]:
    """Arrow's own file systems (file, s3, gs, hdfs), and any of fsspec's where that is installed (abfs, memory, …)."""
    if "://" not in where:
        return pa.fs.LocalFileSystem(), str(Path(where).resolve())
    try:
        system, base = pa.fs.FileSystem.from_uri(where)
    except pa.ArrowInvalid as unknown:
        if "Unrecognized filesystem" not in str(unknown):
            raise
        try:
            from fsspec.core import url_to_fs  # noqa: PLC0415  not among what this package needs

            found, base = url_to_fs(where)
        except (ImportError, ValueError) as error:
            raise OSError(f"{unknown}; {error}") from error
        system = pa.fs.PyFileSystem(pa.fs.FSSpecHandler(found))
    return system, base.rstrip("/")


def _copied(read: object, write: object) -> str:
    digest = hashlib.sha256()
    while chunk := read.read(CHUNK):  # type: ignore[attr-defined]
        digest.update(chunk)
        write.write(chunk)  # type: ignore[attr-defined]
    return digest.hexdigest()
