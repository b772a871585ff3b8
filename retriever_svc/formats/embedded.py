"""Passages with their embeddings in tables of others: RagRetriever's own data sets, and wiki_dpr.

Both have the columns ``title``, ``text``, ``embeddings`` and perhaps ``id`` and metadata. None says which encoder made
the embeddings, so the caller does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from retriever_svc.formats.arrow_files import ShardedTable, open_shards, passage_columns, passages_of, shards_of
from retriever_svc.formats.faiss_file import FaissHeader, StoredVectors, check_index
from retriever_svc.formats.passages import Rereadable, UniqueIds, refusal
from retriever_svc.formats.saved_dataset import is_saved_dataset, open_saved_dataset
from retriever_svc.formats.vectors import (
    EMBEDDINGS,
    embeddings_of_part,
    embeddings_type,
    fixed_size,
    source_schema,
    with_embeddings,
)
from retriever_svc.generation import file_sha256
from retriever_svc.metadata import of_table
from retriever_svc.source import Source, files_identity


@dataclass(frozen=True)
class Imported:
    """A source, and the index of others over its rows where there is one: ``index.path`` can be served as it is."""

    source: Source
    index: FaissHeader | None = None

    @property
    def faiss_file(self) -> Path | None:
        return self.index.path if self.index else None


def read_embedded(
    path: Path, encoder: str, index_path: Path | None = None, metadata: pa.Schema | None = None
) -> Imported:
    """Passages and embeddings of transformers' ``index_name="custom"``, or of wiki_dpr.

    ``path`` is a folder that ``datasets`` saved (``passages_path``), one Parquet or Arrow file, or a folder of them.
    ``index_path`` is a faiss index over the same rows: what ``save_faiss_index`` wrote, or wiki_dpr's
    ``psgs_w100.nq.HNSW128_SQ8-IP-train.faiss`` (exact) or ``psgs_w100.nq.IVF4096_HNSW128_PQ128-IP-train.faiss``
    (compressed). A table without the column ``embeddings`` takes them from the index, where that keeps them whole.
    ``metadata`` are the columns that are kept beside; None: all that can be.

    Raises: InvalidRequest: a column is missing or of another type; the index is not of these rows, or does not compare
        by inner product; when reading, names file, row and column. Whether an id stands twice shows at the end.
    """
    table = _open(path)
    kept = of_table(pa.schema([field for field in table.schema if field.name != EMBEDDINGS]), metadata)
    if EMBEDDINGS in table.schema.names:
        kind, dimension = embeddings_type(table)
        index = check_index(index_path, count=table.count, dimension=dimension) if index_path else None
        batches = Rereadable(lambda: _embedded_batches(table, kind, dimension, kept))
    elif index_path is None:
        says = f"has no column `{EMBEDDINGS}` (it has {table.schema.names}), and no index is given to take them from"
        raise refusal(path, says, EMBEDDINGS)
    else:
        index = check_index(index_path, count=table.count, dimension=None)
        kind, dimension = pa.float32(), index.dimension
        stored = StoredVectors(index_path)
        batches = Rereadable(lambda: _reconstructed_batches(table, stored, kept))
    passage_columns(table)
    sha256 = file_sha256(path) if path.is_file() else None
    taken_from_index = [] if EMBEDDINGS in table.schema.names or index_path is None else [index_path]
    identity = files_identity(*table.paths, *taken_from_index)
    schema = source_schema(kind, dimension, kept)
    return Imported(Source(schema, batches, encoder, table.count, sha256, identity=identity), index)


def _open(path: Path) -> ShardedTable:
    if not path.exists():
        raise refusal(path, "there is no such file or folder")
    if not path.is_dir():
        return open_shards([path])
    if is_saved_dataset(path):
        return open_saved_dataset(path)
    if shards := shards_of(path):
        return open_shards(shards)
    raise refusal(path, "has no Parquet or Arrow files, and is no folder saved by `datasets`")


def _embedded_batches(
    table: ShardedTable, kind: pa.DataType, dimension: int, metadata: pa.Schema
) -> Iterator[pa.RecordBatch]:
    unique = UniqueIds(table.path)
    row = 0
    for part in table.parts([*passage_columns(table), *metadata.names, EMBEDDINGS]):
        passages = passages_of(part, row, metadata)
        unique.add(passages.column("id").to_numpy())
        row += len(passages)
        yield with_embeddings(passages, embeddings_of_part(part, kind, dimension))
    unique.check()


def _reconstructed_batches(table: ShardedTable, stored: StoredVectors, metadata: pa.Schema) -> Iterator[pa.RecordBatch]:
    unique = UniqueIds(table.path)
    row = 0
    for part in table.parts([*passage_columns(table), *metadata.names]):
        passages = passages_of(part, row, metadata)
        unique.add(passages.column("id").to_numpy())
        yield with_embeddings(passages, fixed_size(stored.take(row, len(passages))))
        row += len(passages)
    unique.check()
