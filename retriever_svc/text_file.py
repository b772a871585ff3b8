"""The texts of a generation's passages as they are read to answer: two files, mapped into memory.

``texts.bin`` holds title, text and, where the collection has metadata, its JSON, passage after passage, in UTF-8 and
without anything between them; ``texts.offsets`` (int64) where each begins, and the end of the last. So
a passage lies in one place: a cold one costs a page fault or two, a warm one microseconds. Both are derived from the
passage table, which stays the record; a generation without them is read from the table.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from retriever_svc.checkpoint import GrowingFile
from retriever_svc.generation import FileRecord
from retriever_svc.metadata import to_wire
from shared.documents import metadata_column, passage_columns
from shared.errors import InvalidRequest, StartupError
from shared.retrieval import Int64Array

TEXTS = "texts.bin"
OFFSETS = "texts.offsets"

MOST_BYTES = 2**31 - 1  # what the 32-bit offsets of a string column reach

_OFFSET_BYTES = 8


def offsets_bytes(count: int, *, metadata: bool = False) -> int:
    """Size of ``texts.offsets``."""
    return _OFFSET_BYTES * ((3 if metadata else 2) * count + 1)


class TextWriter:
    """Writes both files into ``folder``, batch by batch, in row order."""

    def __init__(
        self, folder: Path, metadata: Sequence[str], grow: Callable[[Path], GrowingFile] = GrowingFile
    ) -> None:
        """``metadata``: names of the metadata columns. ``grow`` opens a file, which may hold the rows before."""
        self._metadata = list(metadata)
        self._texts, self._offsets = grow(folder / TEXTS), grow(folder / OFFSETS)
        self._end = self._texts.size
        if not self._offsets.size:
            self._offsets.append(np.zeros(1, np.int64))

    def records(self) -> dict[str, FileRecord]:
        """Of both files, as far as they are written."""
        return {TEXTS: self._texts.record(), OFFSETS: self._offsets.record()}

    def add(self, batch: pa.RecordBatch) -> None:
        """``batch``: of the passage table's schema."""
        columns = [batch.column("title"), batch.column("text")]
        if self._metadata:
            columns.append(metadata_column(to_wire(batch.select(self._metadata), len(batch))))
        # Large: a batch of long documents may exceed what offsets of 32 bits can say.
        parts = pa.concat_arrays([column.cast(pa.large_string()) for column in columns])
        by_passage = np.arange(len(parts)).reshape(len(columns), len(batch)).T.reshape(-1)
        together = parts.take(pa.array(by_passage))
        _, offsets, texts = together.buffers()
        starts = np.frombuffer(offsets, np.int64, len(together) + 1)
        if texts is not None:
            self._texts.append(memoryview(texts)[starts[0] : starts[-1]])
        self._offsets.append(self._end + starts[1:] - starts[0])
        self._end += int(starts[-1] - starts[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._texts.close()
        self._offsets.close()


class MappedTexts:
    """Both files of a generation, open for reading. Safe to use from several threads."""

    def __init__(self, strings: pa.LargeStringArray, parts: int) -> None:
        self._strings = strings
        self._parts = parts  # of a passage: 2, or 3 with metadata

    @classmethod
    def open(cls, folder: Path, count: int, *, metadata: bool) -> "MappedTexts | None":
        """Those of ``count`` passages; None where the generation was built without.

        Raises: StartupError: the two do not belong together, or hold other passages.
        """
        path = folder / OFFSETS
        if not path.exists():
            return None
        wanted = offsets_bytes(count, metadata=metadata)
        offsets, texts = _mapped(path), _mapped(folder / TEXTS)
        if offsets.size != wanted or np.frombuffer(offsets, np.int64)[-1] != texts.size:
            raise StartupError(f"{path} does not fit {folder / TEXTS} or the {count} passages; rebuild the collection")
        strings = pa.LargeStringArray.from_buffers(wanted // _OFFSET_BYTES - 1, offsets, texts)
        return cls(strings, 3 if metadata else 2)

    def take(self, rows_K: Int64Array, ids_K: Int64Array) -> pa.StructArray:
        """The passages of ``rows_K`` (any order, repeats allowed), in that order; ``ids_K`` are their ids.

        Arrow reads them without Python's lock: where the disk has to be waited for, nothing else waits.

        Raises: InvalidRequest: more text than one Arrow column takes.
        """
        count = len(rows_K)
        at = np.concatenate([rows_K * self._parts + part for part in range(self._parts)])
        _, bounds, texts = self._strings.take(pa.array(at)).buffers()
        offsets = np.frombuffer(bounds, np.int64, len(at) + 1)
        if offsets[-1] > MOST_BYTES:
            raise InvalidRequest(f"the passages have {offsets[-1]} bytes together; ask for fewer", param="n_docs")
        narrow = pa.py_buffer(offsets.astype(np.int32))
        columns = [
            pa.StringArray.from_buffers(count, narrow, texts, null_count=0, offset=part * count)
            for part in range(self._parts)
        ]
        return passage_columns(pa.array(ids_K), *columns)


def _mapped(path: Path) -> Any:
    """The bytes of a file, as an Arrow buffer that keeps it mapped."""
    if not path.stat().st_size:  # nothing can be mapped
        return pa.py_buffer(b"")
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()
