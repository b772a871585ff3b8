"""The changes of a collection since its generation was built: a log, on the disk before a change is acknowledged.

    data/collections/<collection>/changes/<lineage>/<first change>.log

A record is ``length (8 bytes) | number (8) | crc32 of the body (4) | crc32 of these three (4) | body``, little-endian.
The body is an Arrow IPC stream: the columns ``id``, ``title``, ``text``, ``embedding`` and metadata of passages that
are new or replace others, or the column ``id`` alone of passages that are deleted. Numbers count from 1 without a gap,
through all files of a lineage.

A record is all there or not: what a crash left incomplete at the end of the last file was never acknowledged, and is
cut off. A damage anywhere else is refused with the file's name.
"""

import fcntl
import itertools
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
import pyarrow as pa
import structlog

from retriever_svc.generation import flush
from retriever_svc.metadata import NO_METADATA, PASSAGE_COLUMNS
from retriever_svc.passages import passage_schema
from shared.errors import Conflict, StartupError
from shared.retrieval import Float32Array, Int64Array

FOLDER = "changes"
SUFFIX = ".log"
LOCK = ".lock"
HEAD = struct.Struct("<QQII")

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Upsert:
    """``ids`` (n,), all different; ``embeddings`` (n, D) as the collection stores them.

    ``metadata``: n rows of the collection's metadata columns; None where it has none.
    """

    ids: Int64Array
    titles: Sequence[str]
    texts: Sequence[str]
    embeddings: Float32Array
    metadata: pa.RecordBatch | None = None


@dataclass(frozen=True)
class Delete:
    """``ids`` (n,); those that are not there are no error."""

    ids: Int64Array


Change = Upsert | Delete


def to_batch(change: Change, dtype: str) -> pa.RecordBatch:
    if isinstance(change, Delete):
        return pa.record_batch({"id": pa.array(change.ids, pa.int64())})
    dimension = change.embeddings.shape[1]
    flat = pa.array(np.ascontiguousarray(change.embeddings, dtype=dtype).reshape(-1))
    return pa.record_batch(
        [
            pa.array(change.ids, pa.int64()),
            pa.array(change.titles, pa.string()),
            pa.array(change.texts, pa.string()),
            pa.FixedSizeListArray.from_arrays(flat, dimension),
            *([] if change.metadata is None else change.metadata.columns),
        ],
        schema=passage_schema(dimension, dtype, NO_METADATA if change.metadata is None else change.metadata.schema),
    )


def from_batch(batch: pa.RecordBatch) -> Change:
    ids = batch.column("id").to_numpy()
    if batch.num_columns == 1:
        return Delete(ids)
    column = batch.column("embedding")
    embeddings = column.flatten().to_numpy(zero_copy_only=False).reshape(len(batch), column.type.list_size)
    titles, texts = batch.column("title").to_pylist(), batch.column("text").to_pylist()
    names = [name for name in batch.schema.names if name not in PASSAGE_COLUMNS]
    return Upsert(ids, titles, texts, embeddings.astype(np.float32), batch.select(names) if names else None)


class ChangeLog:
    """One lineage's changes. One writer at a time: a lock file, released by the kernel when its holder dies."""

    def __init__(self, folder: Path, dtype: str, lock: TextIO, *, last: int) -> None:
        self._folder, self._dtype, self._lock = folder, dtype, lock
        self.last = last  # number of the last change, 0 before the first
        self._file: BinaryIO | None = None
        self._broken: str | None = None

    @classmethod
    def open(cls, collection: Path, lineage: str, dtype: str, *, applied: int) -> "ChangeLog":
        """Open for writing, after the last whole record; ``applied`` changes are known to have been there.

        Raises: StartupError: a file is damaged. Conflict: another process writes to it.
        """
        folder = collection / FOLDER / lineage
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise Conflict(f"another process writes to the collection `{collection.name}`") from None
        last = applied
        for number, _ in _read(folder, repair=True):
            last = max(last, number)
        return cls(folder, dtype, lock, last=last)

    def append(self, changes: Sequence[Change]) -> int:
        """Write ``changes`` and wait until they are on the disk; the number of the last one.

        Raises: OSError: nothing was written.
        """
        if self._broken is not None:
            raise OSError(f"the change log {self._folder} takes no writes since an earlier one failed: {self._broken}")
        records, number = [], self.last
        for change in changes:
            number += 1
            records.append(_record(number, to_batch(change, self._dtype)))
        file = self._file or self._begin()
        size = file.tell()
        try:
            file.write(b"".join(records))
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            # After a failed fsync nobody knows what the disk holds: take it back, or take nothing more.
            try:
                file.truncate(size)
                file.seek(size)
                os.fsync(file.fileno())
            except OSError:
                self._broken = str(error)
            raise
        self.last = number
        return number

    def _begin(self) -> BinaryIO:
        path = self._folder / f"{self.last + 1:020d}{SUFFIX}"
        self._file = path.open("ab")
        for folder in (self._folder, self._folder.parent, self._folder.parent.parent):
            flush(folder)
        return self._file

    def roll(self) -> None:
        """Go on in a new file, so that those before can be removed once no generation needs them."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        self.roll()
        self._lock.close()


def read_changes(
    collection: Path, lineage: str, *, after: int, upto: int | None = None
) -> Iterator[tuple[int, Change]]:
    """The changes numbered ``after`` + 1 to ``upto``, with their numbers, in order.

    Raises: StartupError: a file is damaged, or changes are missing.
    """
    wanted = after + 1
    for number, body in _read(collection / FOLDER / lineage):
        if number < wanted:
            continue
        if number > wanted:
            raise StartupError(f"the changes {wanted} to {number - 1} are missing in {collection / FOLDER / lineage}")
        if upto is not None and number > upto:
            return
        wanted += 1
        with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
            yield number, from_batch(reader.read_next_batch())


def remove_until(collection: Path, lineage: str, applied: int) -> None:
    """Remove the files that hold nothing after change ``applied``."""
    paths = _paths(collection / FOLDER / lineage)
    for path, following in itertools.pairwise(paths):
        if _first(following) <= applied + 1:
            path.unlink()


def _record(number: int, batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    body = bytes(sink.getvalue())
    said = (len(body), number, zlib.crc32(body))
    return HEAD.pack(*said, _checksum(*said)) + body


def _checksum(*said: int) -> int:
    return zlib.crc32(struct.pack("<QQI", *said))


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def _first(path: Path) -> int:
    return int(path.stem)


def _read(folder: Path, *, repair: bool = False) -> Iterator[tuple[int, bytes]]:
    paths = _paths(folder)
    for path in paths:
        expected, at, size = _first(path), 0, path.stat().st_size
        with path.open("r+b" if repair else "rb") as file:
            while at < size:
                head = file.read(HEAD.size)
                if len(head) < HEAD.size or not any(head):
                    torn = True
                else:
                    length, number, checksum, of_head = HEAD.unpack(head)
                    end = at + HEAD.size + length
                    sound = _checksum(length, number, checksum) == of_head and number == expected
                    body = file.read(length) if sound and end <= size else b""
                    if sound and end <= size and zlib.crc32(body) == checksum:
                        yield number, body
                        expected, at = number + 1, end
                        continue
                    torn = sound and end >= size
                if not torn or path != paths[-1]:
                    raise StartupError(
                        f"{path} is damaged at byte {at}: restore the collection from a snapshot, or remove the file "
                        "and lose its changes"
                    )
                if repair:
                    log.warning("incomplete_change_dropped", file=str(path), bytes=size - at)
                    file.truncate(at)
                    os.fsync(file.fileno())
                break
