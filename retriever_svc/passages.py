"""The passages of one generation as a Lance table: id, title, text, embedding, metadata; one row each, in index order.

Lance is read by row number, so that row r here is vector r of the index. A generation holds the texts once more, in a
form that costs less to read (:mod:`retriever_svc.text_file`); one that was built before there was such a file is read
by one sorted ``take``: on 15 000 rows, 0.6 ms for 5 passages and 2.2 ms for 320.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retriever_svc.metadata import NO_METADATA, metadata_schema, to_wire
from retriever_svc.text_file import MappedTexts
from shared.documents import metadata_column, passage_columns
from shared.retrieval import Float32Array, Int64Array

BoolArray = npt.NDArray[np.bool_]

READ_COLUMNS = ["title", "text"]  # the ids are in memory
VERSION_HINT = "_versions/latest_version_hint.json"
FILTERABLE = ["id", *READ_COLUMNS]
EMBEDDING_TYPES = {"float16": pa.float16(), "float32": pa.float32()}


def passage_schema(dimension: int, dtype: str, metadata: pa.Schema = NO_METADATA) -> pa.Schema:
    """The columns of a passage table; ``dtype`` is ``float16`` or ``float32``."""
    return pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("title", pa.string(), nullable=False),
            pa.field("text", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(EMBEDDING_TYPES[dtype], dimension), nullable=False),
            *metadata,
        ]
    )


class PassageTable:
    """One version of a Lance data set, open for reading. Safe to use from several threads."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.metadata = metadata_schema(dataset.schema)
        self.ids = _read_ids(dataset)
        # For reading by id: positions of the ids in ascending order, looked up by bisection (16 bytes a row,
        # where a dict takes about 100).
        self._rows_by_id = np.argsort(self.ids, kind="stable")
        self._texts: MappedTexts | None = None

    @classmethod
    def open(cls, path: Path, version: int) -> "PassageTable":
        """Open exactly ``version``, so that a later commit to the same folder changes nothing here.

        Raises: StartupError: the mapped texts beside it are of other passages.
        """
        table = cls(lance.dataset(path, version=version))
        table._texts = MappedTexts.open(path.parent, len(table), metadata=bool(table.metadata.names))
        return table

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dimension(self) -> int:
        return int(self._dataset.schema.field("embedding").type.list_size)

    @property
    def dtype(self) -> str:
        value_type = self._dataset.schema.field("embedding").type.value_type
        return next(name for name, arrow_type in EMBEDDING_TYPES.items() if arrow_type == value_type)

    def row_of(self, passage_id: int) -> int | None:
        """Row of the passage with that id."""
        at = int(np.searchsorted(self.ids, passage_id, sorter=self._rows_by_id))
        if at == len(self.ids):
            return None
        row = int(self._rows_by_id[at])
        return row if self.ids[row] == passage_id else None

    @property
    def filterable(self) -> pa.Schema:
        """The columns that a filter may name."""
        return pa.schema([*(self._dataset.schema.field(name) for name in FILTERABLE), *self.metadata])

    def matching(self, expression: str) -> BoolArray:
        """Which rows fulfil a condition. Raises: ValueError: it has no value for one of them."""
        return matching_rows(self._dataset, expression, len(self))

    def batches(self, rows: int) -> Iterator[pa.RecordBatch]:
        """All columns, in row order, at most ``rows`` at a time."""
        yield from self._dataset.to_batches(batch_size=rows, scan_in_order=True)

    def take(self, rows_K: Int64Array) -> pa.StructArray:
        """The passages of ``rows_K`` (at least one, any order, repeats allowed), in that order, by one read."""
        if self._texts is not None:
            return self._texts.take(rows_K, self.ids[rows_K])
        distinct, at_K = np.unique(rows_K, return_inverse=True)
        read = self._dataset.take(distinct.tolist(), columns=[*READ_COLUMNS, *self.metadata.names])
        titles, texts = (read[name].combine_chunks() for name in READ_COLUMNS)
        names = self.metadata.names
        metadata = metadata_column(to_wire(read.select(names), len(distinct))) if names else None
        return passage_columns(pa.array(self.ids[distinct]), titles, texts, metadata).take(pa.array(at_K))


def matching_rows(dataset: Any, expression: str, rows: int) -> BoolArray:
    """(rows,) Which rows of a Lance data set fulfil a condition. Raises: ValueError: it is none."""
    matching = np.zeros(rows, np.bool_)
    for batch in dataset.scanner(columns=["_rowoffset"], filter=expression).to_batches():
        matching[batch.column(0).to_numpy()] = True
    return matching


def append_table(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Add rows to a table, made where it is missing, in one commit. Returns the version to open it by."""
    reader = pa.RecordBatchReader.from_batches(schema, iter(batches))
    mode = "append" if (path / "_versions").exists() else "create"
    version = int(lance.write_dataset(reader, path, mode=mode).version)
    (path / VERSION_HINT).unlink(missing_ok=True)  # saves listing the versions, but is the one file that changes
    return version


def read_ids(path: Path) -> Int64Array:
    """(N,) The ids of a table's last version, in row order."""
    return _read_ids(lance.dataset(path))


class TableVectors:
    """The embeddings of a table, read from its beginning to its end."""

    def __init__(self, path: Path, version: int) -> None:
        self._dataset = lance.dataset(path, version=version)
        self.dimension = int(self._dataset.schema.field("embedding").type.list_size)
        self._count = int(self._dataset.count_rows())

    def __len__(self) -> int:
        return self._count

    def pieces(self, start: int, rows: int) -> Iterator[Float32Array]:
        """Rows from ``start`` on, ``rows`` at a time, the last piece aside: (rows, D)."""
        for first in range(start, self._count, rows):
            read = self._dataset.to_table(columns=["embedding"], offset=first, limit=rows, scan_in_order=True)
            yield self._vectors(read)

    def take(self, rows_K: Int64Array) -> Float32Array:
        """(K, D) Chosen rows."""
        return self._vectors(self._dataset.take(rows_K.tolist(), columns=["embedding"]))

    def _vectors(self, table: pa.Table) -> Float32Array:
        flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        found: Float32Array = flat.astype(np.float32, copy=False).reshape(len(table), self.dimension)
        return found


def _read_ids(dataset: Any) -> Int64Array:
    ids: Int64Array = dataset.to_table(columns=["id"])["id"].to_numpy()
    return ids
