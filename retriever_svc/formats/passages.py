"""A stream of passages without embeddings, and the rules for its ids, shared by all formats.

Rows are counted from 0 as in :mod:`retriever_svc.source`; lines of text files from 1, as editors do.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from retriever_svc.metadata import EXPECTED, NO_METADATA
from retriever_svc.source import BATCH_ROWS, first_repeated
from shared.errors import InvalidRequest
from shared.retrieval import Int64Array
from shared.schemas import MetadataType

PASSAGE_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)
BATCH_CHARACTERS = 64 * 2**20  # a string column of Arrow addresses 2 GB: a batch of long texts ends before that
LARGEST_ID = 2**63 - 1
INTEGER = re.compile(r"-?[0-9]{1,40}")


class Row(NamedTuple):
    """``metadata``: a value for each column that is kept."""

    id: int | None
    title: str
    text: str
    metadata: tuple[Any, ...] = ()


class Rereadable:
    """Batches that are read anew from the disk each time they are iterated over."""

    def __init__(self, read: Callable[[], Iterator[pa.RecordBatch]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return self._read()


@dataclass(frozen=True)
class Passages:
    """``batches`` have the columns of :data:`PASSAGE_SCHEMA` and then those of ``metadata``; ``count`` is the number of
    rows where it is known before reading."""

    batches: Iterable[pa.RecordBatch]
    format: str
    count: int | None = None
    metadata: pa.Schema = NO_METADATA


def with_metadata(metadata: pa.Schema) -> pa.Schema:
    """The schema of passages with these columns."""
    return pa.schema([*PASSAGE_SCHEMA, *metadata])


class UniqueIds:
    """Remembers the ids that pass, 8 bytes each, to say at the end whether one stood there twice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ids: list[Int64Array] = []
        self._last = -1
        self._ascending = True

    def add(self, ids_B: Int64Array) -> None:
        if len(ids_B):
            self._ascending &= bool(ids_B[0] > self._last and (ids_B[1:] > ids_B[:-1]).all())
            self._last = int(ids_B[-1])
            self._ids.append(ids_B)

    def check(self) -> None:
        """Raises: InvalidRequest: names the id and both of its rows."""
        if self._ascending:
            return
        if repeated := first_repeated(np.concatenate(self._ids)):
            raise refusal(self._path, "id {} stands in rows {} and {}; ids must be unique".format(*repeated), "id")


def refusal(path: Path, says: str, column: str | None = None) -> InvalidRequest:
    return InvalidRequest(f"{path}: {says}", param=column or "source")


def shown(value: object) -> str:
    """A value for a message, short whatever it is: only plain ones are written out."""
    if isinstance(value, str):
        return repr(value[:40])
    if isinstance(value, float | bool | np.generic | type(None)) or (isinstance(value, int) and abs(value) < 10**40):
        return str(value)[:40]
    return f"<{type(value).__name__}>"


def parse_id(path: Path, where: str, value: object) -> int:
    """An id from a cell, a JSON value or a pickle.

    Raises: InvalidRequest: it is no integer, negative, or beyond 64 bits.
    """
    if isinstance(value, str) and INTEGER.fullmatch(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise refusal(path, f"`id` is {shown(value)} in {where}; it must be an integer", "id")
    if not 0 <= value <= LARGEST_ID:
        raise refusal(path, f"`id` is {shown(value)} in {where}; it must be from 0 to {LARGEST_ID}", "id")
    return int(value)


def check_not_negative(path: Path, ids_B: Int64Array, first_row: int) -> None:
    """Raises: InvalidRequest: names the row."""
    if len(ids_B) and ids_B.min() < 0:
        row = int(np.argmax(ids_B < 0))
        raise refusal(path, f"`id` is {ids_B[row]} in row {first_row + row}; ids must not be negative", "id")


def metadata_of_row(
    path: Path,
    where: str,
    row: Mapping[str, Any],
    types: Mapping[str, MetadataType],
    read: Callable[[Any, MetadataType], Any],
) -> tuple[Any, ...]:
    """What ``read`` makes of a text file's values for each column of ``types``; null where there is none.

    Raises: InvalidRequest: names where the row stands, and the column whose value is of another type.
    """
    kept = []
    for name, kind in types.items():
        try:
            kept.append(read(row.get(name), kind))
        except (TypeError, ValueError, OverflowError):
            says = f"`{name}` is {shown(row[name])} in {where}; expected is {EXPECTED[kind]}, or nothing"
            raise refusal(path, says, name) from None
    return tuple(kept)


class RowBatches:
    """Gathers rows into batches of a schema of :func:`with_metadata`."""

    def __init__(self, schema: pa.Schema = PASSAGE_SCHEMA) -> None:
        self._schema = schema
        self._rows: list[tuple[Any, ...]] = []
        self._characters = 0

    def add(self, passage_id: int, title: str, text: str, metadata: tuple[Any, ...] = ()) -> pa.RecordBatch | None:
        """The batch that is full with this row, if one is."""
        self._rows.append((passage_id, title, text, *metadata))
        self._characters += sum(len(value) for value in (title, text, *metadata) if isinstance(value, str))
        full = len(self._rows) >= BATCH_ROWS or self._characters >= BATCH_CHARACTERS
        return self.rest() if full else None

    def rest(self) -> pa.RecordBatch | None:
        """The rows gathered since the last batch, if there are any."""
        if not self._rows:
            return None
        columns = [
            pa.array(values, field.type)
            for values, field in zip(zip(*self._rows, strict=True), self._schema, strict=True)
        ]
        self._rows, self._characters = [], 0
        return pa.record_batch(columns, schema=self._schema)


def batches_of_rows(
    path: Path, rows: Iterable[tuple[str, Row]], metadata: pa.Schema = NO_METADATA
) -> Iterator[pa.RecordBatch]:
    """Rows gathered into batches, numbered from 0 where they have no ids.

    ``rows`` are pairs of where a row stands ("line 3") and the row.
    Raises: InvalidRequest: an id stands twice, or only some rows have one.
    """
    unique, gathered = UniqueIds(path), RowBatches(with_metadata(metadata))
    given: bool | None = None
    for row, (where, found) in enumerate(rows):
        given = found.id is not None if given is None else given
        if given != (found.id is not None):
            says = f"{where} has {'no' if given else 'an'} `id`, unlike the rows before it: give all rows one, or none"
            raise refusal(path, says, "id")
        if full := gathered.add(row if found.id is None else found.id, *found[1:]):
            unique.add(full.column("id").to_numpy())
            yield full
    if last := gathered.rest():
        unique.add(last.column("id").to_numpy())
        yield last
    unique.check()
