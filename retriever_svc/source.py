"""Passages with their embeddings on the way into a collection: read as a stream, refused where they are not clean.

A source has the columns ``id`` (integer, unique, not negative), ``title``, ``text`` (string) and ``embedding``
(fixed_size_list<float16|float32>[D], finite), none of them null, and names the encoder that made the embeddings in
its schema metadata under ``encoder``. Its other columns, where they hold scalars, are the passages' metadata.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retriever_svc.generation import file_sha256
from retriever_svc.metadata import clean_column, metadata_schema, of_table
from retriever_svc.passages import EMBEDDING_TYPES, passage_schema
from shared.errors import InvalidRequest
from shared.retrieval import Float32Array, Int64Array


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_embedding(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) and kind.value_type in EMBEDDING_TYPES.values() and kind.list_size > 0


COLUMNS: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "id": (pa.types.is_integer, "an integer column"),
    "title": (_is_text, "a string column"),
    "text": (_is_text, "a string column"),
    "embedding": (_is_embedding, "fixed_size_list<float16 or float32>[at least 1]"),
}
BATCH_ROWS = 4096
READ_BYTES = 2**20


@dataclass(frozen=True)
class Source:
    """``count`` is the number of rows where it is known before reading; ``sha256`` that of the file, if it is one.

    ``identity`` is another one wherever the rows are others, and is known where they can be read anew: a build that
    was killed goes on only with a source of the same.
    """

    schema: pa.Schema
    batches: Iterable[pa.RecordBatch]
    encoder: str
    count: int | None = None
    sha256: str | None = None
    attribution: str | None = None
    identity: str | None = None

    @property
    def dimension(self) -> int:
        return int(self.schema.field("embedding").type.list_size)

    @property
    def dtype(self) -> str:
        return str(np.dtype(self.schema.field("embedding").type.value_type.to_pandas_dtype()))

    @cached_property
    def metadata(self) -> pa.Schema:
        """The metadata columns, as they are stored."""
        return metadata_schema(self.schema)

    def clean_batches(self, skip: int = 0) -> Iterator[pa.RecordBatch]:
        """The rows in the table's own schema, without the first ``skip``, which were looked at before.

        Raises: InvalidRequest: names the column at fault and the row.
        """
        schema = passage_schema(self.dimension, self.dtype, self.metadata)
        row = 0
        for read in _readable(self.batches):
            batch = read.slice(max(0, min(skip - row, len(read))))
            row += len(read) - len(batch)
            columns = [_clean_column(batch, name, schema.field(name).type, row) for name in COLUMNS]
            columns += [clean_column(batch.column(one.name), one.type, one.name) for one in self.metadata]
            clean = pa.record_batch(columns, schema=schema)
            _check_values(clean, row)
            row += len(clean)
            if len(clean):
                yield clean


def from_stream(
    reader: pa.RecordBatchReader,
    encoder: str | None = None,
    metadata: pa.Schema | None = None,
    *,
    all_there: bool = True,
) -> Source:
    """A source from an Arrow stream; ``encoder`` stands in where the schema metadata has none.

    ``metadata`` are the columns that are kept beside, those that it has where not ``all_there``; None: all that can be.

    Raises: InvalidRequest: a column is missing or of another type, or the encoder is not named.
    """
    schema = reader.schema
    for name in COLUMNS:
        if schema.get_all_field_indices(name) != [schema.get_field_index(name)]:
            raise InvalidRequest(f"the source must have one column `{name}`; it has {schema.names}", param=name)
    for name, (fits, wanted) in COLUMNS.items():
        if not fits(schema.field(name).type):
            raise InvalidRequest(f"`{name}` must be {wanted}, it is {schema.field(name).type}", param=name)
    kept = of_table(schema, metadata, all_there=all_there)
    says = schema.metadata or {}
    named = says[b"encoder"].decode() if b"encoder" in says else encoder
    if not named:
        raise InvalidRequest(
            "the source does not say which encoder made its embeddings: set `encoder` in its schema metadata",
            param="encoder",
        )
    attribution = says.get(b"attribution")
    schema = pa.schema([*(schema.field(name) for name in COLUMNS), *kept])
    return Source(schema, reader, named, attribution=attribution.decode() if attribution else None)


def from_parquet(
    path: Path, encoder: str | None = None, metadata: pa.Schema | None = None, *, all_there: bool = True
) -> Source:
    """A source from a Parquet file, read in batches.

    Raises: InvalidRequest: not a readable Parquet file, or as :func:`from_stream`.
    """
    try:
        file = parquet_file(path)
        count = file.metadata.num_rows
        reader = pa.RecordBatchReader.from_batches(file.schema_arrow, file.iter_batches(BATCH_ROWS))
    except (OSError, pa.ArrowException) as error:
        raise InvalidRequest(f"{path} cannot be read as Parquet: {error}", param="source") from error
    sha256 = file_sha256(path)
    return replace(
        from_stream(reader, encoder, metadata, all_there=all_there), count=count, sha256=sha256, identity=sha256
    )


def parquet_file(path: Path) -> pq.ParquetFile:
    """Open to be read piece by piece: a row group, which is read ahead otherwise, may be as large as the file."""
    return pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False)


def files_in(path: Path) -> list[Path]:
    """The file itself, or all files below the folder."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def files_identity(*paths: Path) -> str:
    """Digest of the files' contents, in this order: ``sha256-`` and 16 hex digits.

    Raises: InvalidRequest: a file cannot be read.
    """

    def described(path: Path) -> bytes:
        try:
            return f"{path.stat().st_size}:{file_sha256(path)}\n".encode()
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be read: {error.strerror}", param="corpus") from error

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="hash") as pool:
        digest = hashlib.sha256(b"".join(pool.map(described, paths)))
    return f"sha256-{digest.hexdigest()[:16]}"


def embeddings_of(batch: pa.RecordBatch) -> Float32Array:
    """Embeddings of a clean batch: (rows, D)."""
    column = batch.column("embedding")
    flat: npt.NDArray[np.floating] = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(batch), column.type.list_size).astype(np.float32, copy=False)


def first_repeated(ids: Int64Array) -> tuple[int, int, int] | None:
    """``(id, row, row)`` of an id that stands in two rows."""
    order = np.argsort(ids, kind="stable")
    repeats = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
    if not len(repeats):
        return None
    first, second = order[repeats[0]], order[repeats[0] + 1]
    return int(ids[first]), int(first), int(second)


def _readable(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except (OSError, pa.ArrowException) as error:
        raise InvalidRequest(f"the source cannot be read to its end: {error}", param="source") from error


def _clean_column(batch: pa.RecordBatch, name: str, wanted: pa.DataType, first_row: int) -> pa.Array:
    column = batch.column(name)
    if column.null_count:
        row = first_row + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise InvalidRequest(f"`{name}` is null in row {row}", param=name)
    if name == "embedding" and column.flatten().null_count:
        raise InvalidRequest(f"`embedding` has nulls inside a vector, from row {first_row} on", param=name)
    try:
        return column.cast(wanted)
    except pa.ArrowException as error:
        raise InvalidRequest(f"`{name}` cannot be read as {wanted}: {error}", param=name) from error


def _check_values(batch: pa.RecordBatch, first_row: int) -> None:
    ids = batch.column("id").to_numpy()
    if len(ids) and ids.min() < 0:
        row = int(np.argmax(ids < 0))
        raise InvalidRequest(f"`id` is {ids[row]} in row {first_row + row}; ids must not be negative", param="id")
    finite_B = np.isfinite(embeddings_of(batch)).all(axis=1)
    if not finite_B.all():
        row = int(np.argmin(finite_B))
        raise InvalidRequest(
            f"`embedding` of row {first_row + row} (id {ids[row]}) holds NaN or infinity", param="embedding"
        )
