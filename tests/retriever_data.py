"""Passages with random embeddings for the tests of the retriever, and the brute force that its answers are held to.

Shapes: N passages, B queries, D dimension.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retriever_svc.checkpoint import Checkpoint, Work
from retriever_svc.index import EMBEDDINGS, FLAT, INDEX, Recipe, build_index, recipe
from retriever_svc.index.vectors import VectorsFile
from retriever_svc.source import Source, from_stream

ENCODER = "sha256-0123456789abcdef"


def random_embeddings(n: int, dimension: int, *, dtype: str = "float32", seed: int = 0) -> npt.NDArray[np.floating]:
    return np.random.default_rng(seed).standard_normal((n, dimension)).astype(dtype)


def clustered(n: int, dimension: int, *, seed: int = 0) -> npt.NDArray[np.float32]:
    """Unit vectors around 1 centre in 40, as sentences about the same things are: what recall floors are stated for."""
    dice = np.random.default_rng(seed)
    centres = dice.standard_normal((max(1, n // 40), dimension))
    vectors = centres[dice.integers(0, len(centres), n)] + 0.5 * dice.standard_normal((n, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def tied_embeddings(n: int, dimension: int, *, dtype: str = "float32", seed: int = 0) -> npt.NDArray[np.floating]:
    """Embeddings of few distinct values, many rows equal: exact in every precision, and full of equal scores."""
    return np.random.default_rng(seed).integers(-1, 2, (n, dimension)).astype(dtype) / 2


def passage_table(
    embeddings_ND: npt.NDArray[np.floating], ids: Sequence[int] | None = None, encoder: str | None = ENCODER
) -> pa.Table:
    n, dimension = embeddings_ND.shape
    ids = range(n) if ids is None else ids
    table = pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "title": pa.array([title(i) for i in ids], pa.string()),
            "text": pa.array([text(i) for i in ids], pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embeddings_ND.ravel()), dimension),
        }
    )
    return table if encoder is None else table.replace_schema_metadata({"encoder": encoder, "attribution": "made up"})


def title(passage_id: int) -> str:
    return f"Title {passage_id}"


def text(passage_id: int) -> str:
    return f"Passage {passage_id} says “{passage_id * 7}”."


def source_of(table: pa.Table, batch_rows: int = 7) -> Source:
    """The table as a stream of small batches."""
    return from_stream(pa.RecordBatchReader.from_batches(table.schema, table.to_batches(max_chunksize=batch_rows)))


def write_index(
    folder: Path, embeddings_ND: npt.NDArray[np.floating], kind: str = "flat", dtype: str = "float32"
) -> Recipe:
    """The index of a generation in `folder`, with a file of the embeddings beside it unless it is flat."""
    count, dimension = embeddings_ND.shape
    settled = recipe(kind, dimension, count)
    embeddings_ND.astype(dtype).tofile(folder / EMBEDDINGS)
    (folder / "work").mkdir()
    work = Work(folder / "work", Checkpoint(), {})
    build_index(work, VectorsFile(folder / EMBEDDINGS, dimension, dtype), settled)
    (work.generation / INDEX).rename(folder / INDEX)
    work.remove()
    if kind == FLAT:
        (folder / EMBEDDINGS).unlink()
    return settled


def write_seed(path: Path, n: int = 50, dimension: int = 8, *, dtype: str = "float16", seed: int = 0) -> Path:
    pq.write_table(passage_table(random_embeddings(n, dimension, dtype=dtype, seed=seed)), path)
    return path


def brute_force(
    queries_BD: npt.NDArray[np.floating], embeddings_ND: npt.NDArray[np.floating], ids_N: npt.NDArray[np.int64], n: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Ids, scores and rows of the best ``n``: every inner product in float64, rounded once, equal ones by id."""
    queries, embeddings = queries_BD.astype(np.float64), embeddings_ND.astype(np.float64)
    scores_BN = np.array([[np.sum(q * d) for d in embeddings] for q in queries]).astype(np.float32)
    rows_BN = np.array(
        [sorted(range(len(ids_N)), key=lambda row: (-scores_N[row], ids_N[row]))[:n] for scores_N in scores_BN]
    )
    return ids_N[rows_BN], np.take_along_axis(scores_BN, rows_BN, axis=1), rows_BN
