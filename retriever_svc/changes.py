"""The changes of a collection since its generation was built: a log, on the disk before a change is acknowledged.

    data/collections/<collection>/changes/<lineage>/<first change>.log

A record holds the changes that were written together:

    length of the body (8 bytes) | number of its first change (8) | changes (4) | crc32 of the body (4) |
    crc32 of these four (4) | body

little-endian. The body is an Arrow IPC stream a change: the columns ``id``, ``title``, ``text``, ``embedding`` and
metadata of passages that are new or replace others, or the column ``id`` alone of passages that are deleted. Numbers
count from 1 without a gap, through all files of a lineage.

A record is all there or not: what a crash left incomplete at the end of the last file was never acknowledged, and is
cut off. After a power cut any part of it may be missing, for the disk writes in an order of its own. A damage anywhere
else is refused with the file's name: a record that another one follows was on the disk before that was begun.
"""

import fcntl
import itertools
import os
import shutil
import struct
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
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
HEAD = struct.Struct("<QQIII")
SECTOR = 512  # bytes that a disk writes as a whole

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
        self._file: FileIO | None = None
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
        try:
            for record in _read(folder, repair=True):
                last = max(last, record.last)
        except BaseException:
            lock.close()
            raise
        return cls(folder, dtype, lock, last=last)

    def append(self, changes: Sequence[Change]) -> int:
        """Write ``changes`` and wait until they are on the disk; the number of the last one.

        Raises: OSError: nothing was written.
        """
        if self._broken is not None:
            raise OSError(f"the change log {self._folder} takes no writes since an earlier one failed: {self._broken}")
        if not changes:
            return self.last
        record = _record(self.last + 1, [to_batch(change, self._dtype) for change in changes])
        file = self._file or self._begin()
        size = file.seek(0, os.SEEK_END)
        try:
            _write(file, record)
            os.fsync(file.fileno())
        except OSError as error:
            # After a failed fsync nobody knows what the disk holds: take it back, or take nothing more.
            try:
                file.truncate(size)
                os.fsync(file.fileno())
            except OSError:
                self._broken = str(error)
            raise
        self.last += len(changes)
        return self.last

    def _begin(self) -> FileIO:
        # Without a buffer: what a full disk refused must not be written by a later close.
        file = FileIO(self._folder / f"{self.last + 1:020d}{SUFFIX}", "ab")
        try:
            for folder in (self._folder, self._folder.parent, self._folder.parent.parent):
                flush(folder)
        except OSError:
            file.close()
            raise
        self._file = file
        return file

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
    for record in _read(collection / FOLDER / lineage):
        if record.last < wanted:
            continue
        if record.first > wanted:
            raise StartupError(
                f"the changes {wanted} to {record.first - 1} are missing in {collection / FOLDER / lineage}"
            )
        for number, change in enumerate(record.changes(), start=record.first):
            if upto is not None and number > upto:
                return
            if number == wanted:
                yield number, change
                wanted += 1


def remove_until(collection: Path, lineage: str, applied: int) -> None:
    """Remove the files that hold nothing after change ``applied``."""
    paths = _paths(collection / FOLDER / lineage)
    for path, following in itertools.pairwise(paths):
        if _first(following) <= applied + 1:
            path.unlink()


def remove_lineages(collection: Path, kept: Collection[str]) -> None:
    """Remove the logs of lineages that no generation goes on from any more."""
    for folder in (collection / FOLDER).glob("*/"):
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)
            log.info("changes_removed", collection=collection.name, lineage=folder.name)


@dataclass(frozen=True)
class _Record:
    first: int
    last: int
    body: bytes

    def changes(self) -> Iterator[Change]:
        streams = pa.BufferReader(self.body)
        for _ in range(self.first, self.last + 1):
            with pa.ipc.open_stream(streams) as reader:
                (batch,) = reader
            yield from_batch(batch)


def _record(first: int, batches: Sequence[pa.RecordBatch]) -> bytes:
    sink = pa.BufferOutputStream()
    for batch in batches:
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
    body = bytes(sink.getvalue())
    said = (len(body), first, len(batches), zlib.crc32(body))
    return HEAD.pack(*said, _checksum(*said)) + body


def _checksum(*said: int) -> int:
    return zlib.crc32(struct.pack("<QQII", *said))


def _write(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def _first(path: Path) -> int:
    return int(path.stem)


def _read(folder: Path, *, repair: bool = False) -> Iterator[_Record]:
    paths = _paths(folder)
    for path in paths:
        expected, at, size = _first(path), 0, path.stat().st_size
        with path.open("r+b" if repair else "rb") as file:
            while at < size:
                file.seek(at)
                head = file.read(HEAD.size)
                if (length := _length(head, expected)) is not None and at + len(head) + length <= size:
                    *_, n_changes, checksum, _ = HEAD.unpack(head)
                    body = file.read(length)
                    if zlib.crc32(body) == checksum:
                        yield _Record(expected, expected + n_changes - 1, body)
                        expected, at = expected + n_changes, at + len(head) + length
                        continue
                if path != paths[-1] or not _incomplete(file, at, size, expected):
                    raise StartupError(
                        f"{path} is damaged at byte {at}: restore the collection from a snapshot, or remove the file "
                        "and lose its changes"
                    )
                if repair:
                    log.warning("incomplete_change_dropped", file=str(path), bytes=size - at)
                    file.truncate(at)
                    os.fsync(file.fileno())
                break


def _length(head: bytes, expected: int) -> int | None:
    """Of the body that follows a sound head of the record that begins with change ``expected``."""
    if len(head) < HEAD.size:
        return None
    *said, checksum = HEAD.unpack(head)
    return said[0] if _checksum(*said) == checksum and said[1] == expected else None


def _incomplete(file: BinaryIO, at: int, size: int, expected: int) -> bool:
    """Whether the unsound record at byte ``at``, in the last file, may be one that was being written."""
    file.seek(at)
    head = file.read(HEAD.size)
    if (length := _length(head, expected)) is not None:
        return at + HEAD.size + length >= size
    first_sector = -at % SECTOR
    torn = len(head) < HEAD.size or any(part and not any(part) for part in (head[:first_sector], head[first_sector:]))
    return torn and not _another_begins(file, at, size, expected)


def _another_begins(file: BinaryIO, at: int, size: int, expected: int) -> bool:
    """Whether behind byte ``at`` there is the head of a record after the one with change ``expected``."""
    for shift in range(8):
        file.seek(at + shift)
        words = np.frombuffer(file.read(max(0, size - at - shift) // 8 * 8), "<u8")
        lengths, numbers = words[:-1], words[1:]
        for word in np.flatnonzero((numbers > expected) & (numbers < expected + 2**32) & (lengths < size)).tolist():
            file.seek(at + shift + 8 * word)
            if _length(file.read(HEAD.size), int(numbers[word])) is not None:
                return True
    return False
