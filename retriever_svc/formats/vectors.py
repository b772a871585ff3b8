"""Embeddings in the forms that others write, as the ``fixed_size_list`` of a :class:`~retriever_svc.source.Source`.

Shapes: B rows of a batch, D dimension. float16 and float32 stay what they are, float64 becomes float32.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retriever_svc.formats.arrow_files import Part, ShardedTable, check_no_nulls
from retriever_svc.formats.passages import refusal, with_metadata
from retriever_svc.metadata import NO_METADATA

EMBEDDINGS = "embeddings"
STORED_AS = {
    pa.float16(): pa.float16(),
    pa.float32(): pa.float32(),
    pa.float64(): pa.float32(),
}


def source_schema(kind: pa.DataType, dimension: int, metadata: pa.Schema = NO_METADATA) -> pa.Schema:
    """The passages' schema with the column ``embedding``: fixed_size_list<kind>[dimension]."""
    return with_metadata(metadata).append(pa.field("embedding", pa.list_(kind, dimension), nullable=False))


def with_embeddings(passages: pa.RecordBatch, embeddings: pa.Array) -> pa.RecordBatch:
    """Both side by side, as a batch of a source."""
    schema = passages.schema.append(pa.field("embedding", embeddings.type, nullable=False))
    return pa.record_batch([*passages.columns, embeddings], schema=schema)


def fixed_size(vectors_BD: npt.NDArray[np.floating]) -> pa.Array:
    """(B, D) float16, float32 or float64 as fixed_size_list<float16 or float32>[D]."""
    kind = STORED_AS[pa.from_numpy_dtype(vectors_BD.dtype)]
    flat = np.ascontiguousarray(vectors_BD, kind.to_pandas_dtype()).ravel()
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind), vectors_BD.shape[1])


def embeddings_type(table: ShardedTable) -> tuple[pa.DataType, int]:
    """Storage type and D of the column ``embeddings``, D of a list without a fixed size being that of its first row.

    Raises: InvalidRequest: the column stands there twice, is no list of floats, has no rows, or its first is empty.
    """
    path = table.paths[0]
    if table.schema.names.count(EMBEDDINGS) != 1:
        raise refusal(path, f"must have one column `{EMBEDDINGS}`; it has {table.schema.names}", EMBEDDINGS)
    kind = table.schema.field(EMBEDDINGS).type
    fixed = pa.types.is_fixed_size_list(kind)
    if not (fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind)) or kind.value_type not in STORED_AS:
        raise refusal(path, f"`{EMBEDDINGS}` must be lists of float16, float32 or float64, it is {kind}", EMBEDDINGS)
    dimension = kind.list_size if fixed else _first_length(table)
    if not dimension:
        raise refusal(path, f"`{EMBEDDINGS}` has no numbers in its first row", EMBEDDINGS)
    return STORED_AS[kind.value_type], int(dimension)


def embeddings_of_part(part: Part, kind: pa.DataType, dimension: int) -> pa.Array:
    """The column ``embeddings`` of a part as fixed_size_list<kind>[dimension].

    Raises: InvalidRequest: names the row whose embedding is null, has nulls, or has another length.
    """
    check_no_nulls(part, EMBEDDINGS)
    column = part.batch.column(EMBEDDINGS)
    lengths_B = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    if (lengths_B != dimension).any():
        row = int(np.argmax(lengths_B != dimension))
        says = f"`{EMBEDDINGS}` has {lengths_B[row]} numbers in row {part.first_row + row}, {dimension} in the first"
        raise refusal(part.path, says, EMBEDDINGS)
    flat = column.flatten()
    if flat.null_count:
        row = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]) // dimension
        raise refusal(
            part.path, f"`{EMBEDDINGS}` has nulls inside the vector of row {part.first_row + row}", EMBEDDINGS
        )
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, which a source refuses by row
        values = flat.to_numpy(zero_copy_only=False).astype(kind.to_pandas_dtype(), copy=False)
    return pa.FixedSizeListArray.from_arrays(pa.array(values, kind), dimension)


def check_vectors(path: Path, where: str, vectors: npt.NDArray[np.generic], dimension: int | None = None) -> None:
    """Raises: InvalidRequest: the array is no (N, D) of float16, float32 or float64, or D is another."""
    floats = vectors.dtype in (np.float16, np.float32, np.float64)
    if not floats or vectors.ndim != 2 or not vectors.shape[1]:
        says = f"{where} is {vectors.dtype}{list(vectors.shape)}; expected is [N, D] of float16, float32 or float64"
        raise refusal(path, says, "embedding")
    if dimension is not None and vectors.shape[1] != dimension:
        raise refusal(path, f"{where} has dimension {vectors.shape[1]}, the ones before it {dimension}", "embedding")


def _first_length(table: ShardedTable) -> int:
    for part in table.parts([EMBEDDINGS]):
        check_no_nulls(part, EMBEDDINGS)
        return len(part.batch.column(EMBEDDINGS)[0])
    return 0
