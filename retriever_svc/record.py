"""Stores the rows of a source: the passage table, the texts to answer from, and the embeddings in a file of their own
where the index will not keep them.

In pieces: each is a commit of the table, flushed, and counts once the checkpoint says so.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import chain

import numpy as np
import pyarrow as pa

from retriever_svc import generation as gen
from retriever_svc.checkpoint import GENERATION, GrowingFile, Progress, Work
from retriever_svc.index import EMBEDDINGS
from retriever_svc.passages import append_table, passage_schema, read_ids
from retriever_svc.source import Source, embeddings_of, first_repeated
from retriever_svc.text_file import TextWriter
from shared.errors import InvalidRequest

PIECE_ROWS = 2**18
STORING = "storing"


class Record:
    """Brings the record of ``source`` to its end, from where an earlier run left it."""

    def __init__(self, work: Work, source: Source, *, keeps_embeddings: bool, progress: Progress | None = None) -> None:
        self._work, self._source, self._progress = work, source, progress
        self._schema = passage_schema(source.dimension, source.dtype, source.metadata)
        self._texts: TextWriter
        self._embeddings: GrowingFile | None = None
        self._keeps_embeddings = keeps_embeddings
        self._rows = work.state.rows
        self._max_norm = work.state.max_norm
        self._failure: BaseException | None = None

    def finish(self, *, may_be_empty: bool = False) -> None:
        """Raises: InvalidRequest: the source is empty, repeats an id, or has values that cannot be served."""
        if self._work.state.recorded:
            return
        folder, grow = self._work.generation, self._work.grow
        with ExitStack() as files:
            self._texts = files.enter_context(TextWriter(folder, self._source.metadata.names, grow))
            if self._keeps_embeddings:
                self._embeddings = files.enter_context(closing(grow(folder / EMBEDDINGS)))
            self._report()
            batches = self._source.clean_batches(skip=self._rows)
            for first in batches:
                self._store(chain([first], _at_most(PIECE_ROWS - len(first), batches)))
            if not self._rows and may_be_empty:
                self._store(iter(()))
        if not self._rows and not may_be_empty:
            raise InvalidRequest("the source has no passages", param="source")
        if repeated := first_repeated(read_ids(self._work.generation / gen.PASSAGES)):
            raise InvalidRequest("id {} stands in rows {} and {}; ids must be unique".format(*repeated), param="id")
        self._work.save({}, recorded=True)

    def _store(self, piece: Iterator[pa.RecordBatch]) -> None:
        table = self._work.generation / gen.PASSAGES
        try:
            version = append_table(table, self._schema, self._passed(piece))
        except OSError:
            # Lance reads the batches from Rust, which turns what our generator raised into an OSError with its text.
            if self._failure is None:
                raise
            raise self._failure  # noqa: B904  with its own cause
        written = gen.describe_files(self._work.path, self._work.unlisted(table))
        grown = self._texts.records()
        if self._embeddings is not None:
            grown[EMBEDDINGS] = self._embeddings.record()
        written |= {f"{GENERATION}/{name}": record for name, record in grown.items()}
        self._work.save(written, rows=self._rows, max_norm=self._max_norm, table_version=version)

    def _passed(self, piece: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The batches on their way into the table, and what else is kept of them."""
        try:
            for batch in piece:
                embeddings_BD = embeddings_of(batch)
                self._texts.add(batch)
                if self._embeddings is not None:
                    self._embeddings.append(np.ascontiguousarray(embeddings_BD, dtype=self._source.dtype))
                norms_B = np.linalg.norm(embeddings_BD.astype(np.float64), axis=1)
                self._max_norm = max(self._max_norm, float(norms_B.max()))
                self._rows += len(batch)
                self._report()
                yield batch
        except BaseException as error:
            self._failure = error
            raise

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(STORING, self._rows, self._source.count)


def _at_most(rows: int, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    while rows > 0 and (batch := next(batches, None)) is not None:
        rows -= len(batch)
        yield batch
