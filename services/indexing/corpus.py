"""The passages to embed: a stream of record batches that can be opened again from its start."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from retriever_svc.formats.passages import PASSAGE_SCHEMA, with_metadata
from retriever_svc.metadata import NO_METADATA, clean_column
from retriever_svc.source import files_identity, first_repeated, parquet_file
from services.indexing.plan import Plan
from shared.errors import InvalidRequest

BATCH_ROWS = 4096


@dataclass(frozen=True)
class Corpus:
    """``open_batches`` gives the passages anew each time it is called, in the same order: id (any integer type, not
    negative, unique), title and text, none null, and the columns of ``metadata``; others are ignored. ``identity`` is
    another one wherever the passages are others, a digest of the files they come from, for example.
    """

    open_batches: Callable[[], Iterable[pa.RecordBatch]]
    identity: str
    metadata: pa.Schema = NO_METADATA

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The passages with the columns and types of :func:`~retriever_svc.formats.passages.with_metadata`.

        Raises:
            InvalidRequest: names the column at fault and the row.
        """
        row = 0
        for batch in self._readable():
            columns = [_column(batch, field, row) for field in PASSAGE_SCHEMA]
            columns += [clean_column(batch.column(one.name), one.type, one.name) for one in self.metadata]
            row += len(batch)
            yield pa.record_batch(columns, schema=with_metadata(self.metadata))

    def check(self) -> int:
        """Read everything once, so that a fault in the last row shows now and not after hours of embedding.

        Returns: the number of passages.
        Raises: InvalidRequest: no passage at all, an id twice or negative, or as :meth:`batches`.
        """
        ids = [batch.column("id").to_numpy() for batch in self.batches()]
        all_ids = np.concatenate(ids) if ids else np.empty(0, np.int64)
        if not len(all_ids):
            raise InvalidRequest("there are no passages to embed", param="corpus")
        if all_ids.min() < 0:
            row = int(np.argmax(all_ids < 0))
            raise InvalidRequest(f"`id` is {all_ids[row]} in row {row}; ids must not be negative", param="id")
        if repeated := first_repeated(all_ids):
            raise InvalidRequest("id {} is in row {} and again in row {}".format(*repeated), param="id")
        return len(all_ids)

    def _readable(self) -> Iterator[pa.RecordBatch]:
        try:
            yield from self.open_batches()
        except (OSError, pa.ArrowException) as error:
            raise InvalidRequest(f"the passages cannot be read to their end: {error}", param="corpus") from error


def parquet_corpus(*paths: Path) -> Corpus:
    """The passages of Parquet files, one after the other; identified by what the files hold, not by their names.

    Raises: InvalidRequest: a file cannot be read.
    """

    def batches() -> Iterator[pa.RecordBatch]:
        for path in paths:
            with parquet_file(path) as file:
                columns = [name for name in PASSAGE_SCHEMA.names if name in file.schema_arrow.names]
                yield from file.iter_batches(BATCH_ROWS, columns=columns)

    return Corpus(batches, files_identity(*paths))


def passages_of(corpus: Corpus, plan: Plan, shards: list[int]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The passages of the given shards (in ascending order), with the shard's number; all others are passed over.

    Raises: InvalidRequest: the corpus is not as long as it was when the plan was made.
    """
    wanted = iter(shards)
    shard = next(wanted, None)
    gathered: list[pa.RecordBatch] = []
    row = 0
    for batch in corpus.batches():
        end = row + len(batch)
        while shard is not None:
            rows = plan.rows_of(shard)
            first, last = max(rows.start, row), min(rows.stop, end)
            if first < last:
                gathered.append(batch.slice(first - row, last - first))
            if end < rows.stop:
                break
            yield shard, pa.concat_batches(gathered)
            gathered = []
            shard = next(wanted, None)
        row = end
        if shard is None and row < plan.count:
            return  # the rest is done
    if row != plan.count:
        raise InvalidRequest(f"the corpus has {row} passages now, and had {plan.count} before", param="corpus")


def _column(batch: pa.RecordBatch, field: pa.Field, first_row: int) -> pa.Array:
    positions = batch.schema.get_all_field_indices(field.name)
    if len(positions) != 1:
        raise InvalidRequest(
            f"the passages must have one column `{field.name}`; they have {batch.schema.names}", param=field.name
        )
    column = batch.column(positions[0])
    wanted_is_id = pa.types.is_integer(field.type)
    if pa.types.is_integer(column.type) != wanted_is_id:
        raise InvalidRequest(f"`{field.name}` must be {field.type}, it is {column.type}", param=field.name)
    if column.null_count:
        row = first_row + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise InvalidRequest(f"`{field.name}` is null in row {row}", param=field.name)
    try:
        return column.cast(field.type)
    except pa.ArrowException as error:
        raise InvalidRequest(f"`{field.name}` cannot be read as {field.type}: {error}", param=field.name) from error
