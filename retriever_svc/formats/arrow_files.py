"""Parquet and Arrow files as one table in several shards, read in batches.

What comes out of a file is validated in full, offsets and UTF-8 too: a damaged file is refused, not followed out of
its buffers. Errors name the file and the row inside it, counted from 0.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retriever_svc.formats.passages import UniqueIds, check_not_negative, parse_id, refusal, with_metadata
from retriever_svc.metadata import clean_column
from retriever_svc.source import BATCH_ROWS, parquet_file
from shared.errors import InvalidRequest
from shared.retrieval import Int64Array

PARQUET, ARROW = ".parquet", ".arrow"
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
NUMBERS = re.compile(r"([0-9]+)")
SHARD_OF = re.compile(r"(?P<table>.*)-(?P<number>[0-9]+)-of-(?P<total>[0-9]{1,6})")
DIGITS = "^[0-9]{1,18}$"


@dataclass(frozen=True)
class Part:
    """Some rows of a shard; ``first_row`` counts inside ``path``."""

    path: Path
    first_row: int
    batch: pa.RecordBatch


@dataclass(frozen=True)
class ShardedTable:
    """``schema`` is that of the first shard; the others must have the same columns of the same types."""

    paths: tuple[Path, ...]
    schema: pa.Schema
    count: int

    @property
    def path(self) -> Path:
        """The file, or the folder of several: what an error about all of it names."""
        return self.paths[0] if len(self.paths) == 1 else self.paths[0].parent

    def parts(self, columns: Sequence[str]) -> Iterator[Part]:
        """Rows of the named columns, at most ``BATCH_ROWS`` at a time.

        Raises: InvalidRequest: a shard cannot be read to its end, or is damaged.
        """
        for path in self.paths:
            row = 0
            try:
                for read in _batches(path, columns):
                    for start in range(0, len(read), BATCH_ROWS):
                        batch = read.slice(start, BATCH_ROWS)
                        batch.validate(full=True)
                        yield Part(path, row, batch)
                        row += len(batch)
            except (OSError, pa.ArrowException) as error:
                raise refusal(path, f"cannot be read beyond row {row}: {error}") from error


def open_shards(paths: Sequence[Path]) -> ShardedTable:
    """Parquet files, or Arrow files of either kind (stream, as ``datasets`` writes, or file), in the order given.

    Raises: InvalidRequest: a file cannot be read, or the files are not of one schema.
    """
    described = [_describe(path) for path in paths]
    schema = described[0][0]
    for path, (other, _) in zip(paths, described, strict=True):
        if not other.equals(schema, check_metadata=False):
            raise refusal(path, f"has the columns {_names(other)}, but {paths[0].name} has {_names(schema)}")
    return ShardedTable(tuple(paths), schema, sum(count for _, count in described))


def shards_of(folder: Path) -> list[Path]:
    """The Parquet files of a folder, or its Arrow files, numbers in the names counted as numbers.

    What ``datasets`` caches beside them (``cache-….arrow``) is passed over.
    Raises: InvalidRequest: there are files of both kinds or of several splits, or some of "…-of-00157" are missing.
    """
    found = {suffix: in_order(folder.glob(f"*{suffix}")) for suffix in (PARQUET, ARROW)}
    if all(found.values()):
        raise refusal(folder, "has both Parquet and Arrow files; give a folder of one kind")
    shards = [path for path in found[PARQUET] or found[ARROW] if not path.name.startswith("cache-")]
    _check_complete(folder, shards)
    return shards


def _check_complete(folder: Path, shards: Sequence[Path]) -> None:
    numbered = [match for path in shards if (match := SHARD_OF.fullmatch(path.stem))]
    tables = sorted({match["table"] for match in numbered})
    if len(tables) > 1 or (numbered and len(numbered) < len(shards)):
        names = ", ".join(path.name for path in shards[:5])
        raise refusal(folder, f"has files of more than one table ({names}); give a folder with one of them")
    if numbered:
        missing = set(range(int(numbered[0]["total"]))) - {int(match["number"]) for match in numbered}
        if missing:
            says = (
                f"lacks {len(missing)} of {numbered[0]['total']} shards of {tables[0]!r}, the first is {min(missing)}"
            )
            raise refusal(folder, says)


def in_order(paths: Iterator[Path]) -> list[Path]:
    """By name, ``shard_2`` before ``shard_10``."""
    return sorted(paths, key=lambda path: [(int(s), "") if s.isdigit() else (-1, s) for s in NUMBERS.split(path.name)])


def passage_batches(table: ShardedTable, metadata: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The passages of a table with these columns beside, numbered by row where it has no column ``id``.

    Raises: InvalidRequest: names file, row and column.
    """
    unique = UniqueIds(table.path)
    row = 0
    for part in table.parts([*passage_columns(table), *metadata.names]):
        batch = passages_of(part, row, metadata)
        unique.add(batch.column("id").to_numpy())
        row += len(batch)
        yield batch
    unique.check()


def passage_columns(table: ShardedTable) -> list[str]:
    """The columns to read for passages: ``id`` only where the table has it.

    Raises: InvalidRequest: names the column that is missing, stands there twice, or is of another type.
    """
    where, names = table.paths[0], table.schema.names
    for name in ("title", "text"):
        if names.count(name) != 1:
            raise refusal(where, f"must have one column `{name}`; it has {names}", name)
        if not _is_text(table.schema.field(name).type):
            raise refusal(where, f"`{name}` must hold strings, it holds {table.schema.field(name).type}", name)
    if "id" not in names:
        return ["title", "text"]
    if names.count("id") > 1:
        raise refusal(where, "has more than one column `id`", "id")
    kind = table.schema.field("id").type
    if not (pa.types.is_integer(kind) or _is_text(kind)):
        raise refusal(where, f"`id` must hold integers, as numbers or as strings; it holds {kind}", "id")
    return ["id", "title", "text"]


def passages_of(part: Part, row: int, metadata: pa.Schema) -> pa.RecordBatch:
    """The passages of a part with these columns beside; ``row`` is the id of its first where it has no ids.

    Raises: InvalidRequest: names file, row and column.
    """
    for name in ("id", "title", "text"):
        if name in part.batch.schema.names:
            check_no_nulls(part, name)
    ids = part.batch.column("id") if "id" in part.batch.schema.names else pa.array(range(row, row + len(part.batch)))
    columns = [_as_ids(part, ids)]
    for name in ("title", "text"):
        try:
            columns.append(part.batch.column(name).cast(pa.string()))
        except pa.ArrowException as error:
            raise refusal(part.path, f"`{name}` from row {part.first_row} on: {error}", name) from error
    for field in metadata:
        try:
            columns.append(clean_column(part.batch.column(field.name), field.type, field.name))
        except InvalidRequest as error:
            raise refusal(part.path, f"{error.message}, from row {part.first_row} on", field.name) from error
    return pa.record_batch(columns, schema=with_metadata(metadata))


def check_no_nulls(part: Part, name: str) -> None:
    """Raises: InvalidRequest: names the row."""
    column = part.batch.column(name)
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise refusal(part.path, f"`{name}` is null in row {part.first_row + row}", name)


def _as_ids(part: Part, column: pa.Array) -> pa.Array:
    if not pa.types.is_integer(column.type):
        texts = column.cast(pa.string())
        if not pc.all(pc.match_substring_regex(texts, DIGITS)).as_py():
            values = enumerate(texts.to_pylist(), part.first_row)
            return pa.array([parse_id(part.path, f"row {row}", value) for row, value in values], pa.int64())
        column = texts
    try:
        ids = column.cast(pa.int64())
    except pa.ArrowException as error:
        raise refusal(part.path, f"`id` from row {part.first_row} on: {error}", "id") from error
    values_B: Int64Array = ids.to_numpy()
    check_not_negative(part.path, values_B, part.first_row)
    return ids


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _names(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _describe(path: Path) -> tuple[pa.Schema, int]:
    """Schema and rows, without reading the rows: Arrow files are mapped, and only their frames are looked at."""
    try:
        if path.suffix == PARQUET:
            with pq.ParquetFile(path) as file:
                return file.schema_arrow, file.metadata.num_rows
        with pa.memory_map(str(path)) as mapped:
            reader = _arrow_reader(mapped)
            if isinstance(reader, pa.ipc.RecordBatchStreamReader) and not _ends_with(path, END_OF_STREAM):
                raise refusal(path, "cannot be read as Arrow: the stream is cut short")
            return reader.schema, sum(len(batch) for batch in _each(reader))
    except (OSError, pa.ArrowException) as error:
        raise refusal(path, f"cannot be read as {path.suffix.removeprefix('.').capitalize()}: {error}") from error


def _batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    if path.suffix == PARQUET:
        with parquet_file(path) as file:
            yield from file.iter_batches(BATCH_ROWS, columns=list(columns))
        return
    with pa.memory_map(str(path)) as mapped:
        for batch in _each(_arrow_reader(mapped)):
            yield batch.select(list(columns))


def _arrow_reader(mapped: pa.MemoryMappedFile) -> pa.RecordBatchReader | pa.ipc.RecordBatchFileReader:
    magic = mapped.read(6)
    mapped.seek(0)
    return pa.ipc.open_file(mapped) if magic == b"ARROW1" else pa.ipc.open_stream(mapped)


def _ends_with(path: Path, wanted: bytes) -> bool:
    """A stream that is cut between two batches reads as a shorter one, but for its end."""
    with path.open("rb") as file:
        file.seek(-len(wanted), os.SEEK_END)
        return file.read() == wanted


def _each(reader: pa.RecordBatchReader | pa.ipc.RecordBatchFileReader) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from reader
