"""Embeddings in a ``.npy`` array (N, D) beside a file of N passages: row by row, the one belongs to the other."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retriever_svc.formats.passages import Passages, Rereadable, refusal
from retriever_svc.formats.texts import read_passages
from retriever_svc.formats.vectors import STORED_AS, check_vectors, fixed_size, source_schema, with_embeddings
from retriever_svc.source import Source, files_identity, files_in


def read_npy(vectors: Path, passages: Path, encoder: str, metadata: pa.Schema | None = None) -> Source:
    """A source from an array, mapped and not read into memory, and passages in any form of :func:`read_passages`, which
    takes ``metadata``.

    Raises: InvalidRequest: the array is no (N, D) of floats; the counts differ, which may show at the end only; as
        :func:`~retriever_svc.formats.texts.read_passages`.
    """
    try:
        vectors_ND = np.load(vectors, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise refusal(vectors, f"cannot be read as an array: {error}", "embedding") from error
    if not isinstance(vectors_ND, np.ndarray):
        vectors_ND.close()
        raise refusal(vectors, "holds several arrays (.npz); one (N, D) in a .npy is expected", "embedding")
    check_vectors(vectors, "the array", vectors_ND)
    texts = read_passages(passages, metadata)
    if texts.count is not None:
        _check_count(vectors, len(vectors_ND), passages, texts.count)
    schema = source_schema(STORED_AS[pa.from_numpy_dtype(vectors_ND.dtype)], vectors_ND.shape[1], texts.metadata)
    joined = Rereadable(lambda: _join(vectors, vectors_ND, passages, texts))
    identity = files_identity(vectors, *files_in(passages))
    return Source(schema, joined, encoder, len(vectors_ND), identity=identity)


def _join(
    vectors: Path, vectors_ND: npt.NDArray[np.floating], passages: Path, texts: Passages
) -> Iterator[pa.RecordBatch]:
    row = 0
    for batch in texts.batches:
        if row + len(batch) > len(vectors_ND):
            raise refusal(vectors, f"has {len(vectors_ND)} rows, {passages.name} has more passages", "embedding")
        yield with_embeddings(batch, fixed_size(vectors_ND[row : row + len(batch)]))
        row += len(batch)
    _check_count(vectors, len(vectors_ND), passages, row)


def _check_count(vectors: Path, n_vectors: int, passages: Path, n_passages: int) -> None:
    if n_vectors != n_passages:
        raise refusal(vectors, f"has {n_vectors} rows, {passages.name} has {n_passages} passages", "embedding")
