"""Files of other programs' layouts, made small by the libraries that write them, for the tests of the readers.

Shapes: N passages, D dimension.
"""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retriever_svc.formats.passages import PASSAGE_SCHEMA
from retriever_svc.source import Source
from tests.retriever_data import text, title

Vectors = npt.NDArray[np.floating]


def columns(embeddings_ND: Vectors, *, id_type: pa.DataType | None = None, first: int = 1) -> dict[str, pa.Array]:
    """wiki_dpr's columns; its ids are strings from "1" on. ``id_type`` None leaves them out."""
    ids = range(first, first + len(embeddings_ND))
    given = {} if id_type is None else {"id": pa.array(ids, pa.int64()).cast(id_type)}
    lists = pa.array(list(embeddings_ND), pa.list_(pa.from_numpy_dtype(embeddings_ND.dtype)))
    texts = pa.array([text(i) for i in ids], pa.string())
    return given | {"text": texts, "title": pa.array([title(i) for i in ids], pa.string()), "embeddings": lists}


def write_shards(folder: Path, table: pa.Table, shards: int, *, arrow: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = -(-len(table) // shards)
    for shard in range(shards):
        part = table.slice(shard * rows, rows)
        if arrow:
            with pa.ipc.new_stream(folder / f"wiki_dpr-train-{shard}-of-{shards}.arrow", part.schema) as writer:
                writer.write_table(part, max_chunksize=3)
        else:
            pq.write_table(part, folder / f"train-{shard}-of-{shards}.parquet", row_group_size=4)
    return folder


def faiss_index(kind: str, embeddings_ND: Vectors, metric: int = faiss.METRIC_INNER_PRODUCT) -> Any:
    """An index by faiss's factory string, trained on the embeddings."""
    index = faiss.index_factory(embeddings_ND.shape[1], kind, metric)
    index.train(embeddings_ND)
    index.add(embeddings_ND)
    return index


def write_index(path: Path, index: Any) -> Path:
    faiss.write_index(index, str(path))
    return path


def read_all(source: Source) -> tuple[list[tuple[int, str, str]], Vectors]:
    """Rows and embeddings (N, D) of a source, by way of its own checks; read twice, as it must be possible."""
    batches = list(source.clean_batches())
    table = pa.Table.from_batches(batches)
    assert pa.Table.from_batches(source.clean_batches()).equals(table)
    assert source.count in (None, len(table))
    assert all(batch.schema.field("embedding").type == source.schema.field("embedding").type for batch in batches)
    flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    rows = [tuple(row.values()) for row in table.select(PASSAGE_SCHEMA.names).to_pylist()]
    return rows, flat.reshape(len(table), source.dimension)


def expected_rows(n: int, first: int = 1) -> list[tuple[int, str, str]]:
    return [(i, title(i), text(i)) for i in range(first, first + n)]
