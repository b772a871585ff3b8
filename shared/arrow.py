"""Arrow IPC streams that come from outside: read without trusting a length they state.

A record batch is used only where it lies, uncompressed and without dictionaries, in the bytes that were sent, and after
Arrow's own full validation. So what a body can make us hold is bounded by its size: a compressed buffer states its
inflated size itself, and a few bytes may claim gigabytes.

Layout: https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format and Message.fbs there.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc

from shared.arrays import decode_vectors
from shared.errors import InvalidRequest, RequestError
from shared.retrieval import Float32Array

# Slots of the flatbuffer tables in Message.fbs.
_MESSAGE_HEADER, _RECORD_BATCH_COMPRESSION = 2, 3

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

_JSON = json.JSONEncoder(allow_nan=False)


def write_stream(columns: Mapping[str, pa.Array], metadata: Mapping[str, Any]) -> bytes:
    """One record batch; each metadata value as JSON under its key in the schema."""
    encoded = {key: _JSON.encode(value) for key, value in metadata.items()}
    batch = pa.RecordBatch.from_arrays([*columns.values()], [*columns], metadata=encoded)
    # The bytes that pa.ipc.new_stream writes, in less than its time.
    return b"".join((batch.schema.serialize(), batch.serialize(), _END_OF_STREAM))


def read_stream(body: bytes) -> pa.Table:
    """The table of a stream.

    Raises: RequestError: no complete, valid, plain Arrow stream.
    """
    try:
        _refuse_inflation(body)
        # Read again, and whole: Arrow trusts a single message, and one that is damaged would end the process.
        with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except RequestError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise RequestError(f"the body is not a valid Arrow IPC stream: {error}") from None
    return table


def json_metadata(table: pa.Table, key: str) -> Any:
    """The JSON under ``key`` of the schema's metadata; None where there is none."""
    raw = (table.schema.metadata or {}).get(key.encode())
    if raw is None:
        return None
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise RequestError(f"the schema metadata {key!r} is not valid JSON", param=key) from None


def vector_array(vectors: npt.NDArray[np.floating]) -> pa.FixedSizeListArray:
    """(B, D) as one fixed_size_list<float32|float16>[D] a row."""
    flat = np.ascontiguousarray(vectors).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), vectors.shape[1])


def vector_column(table: pa.Table, name: str = "vector") -> Float32Array:
    """The only column as (B, D) float32, finite.

    Raises: InvalidRequest: another column, another type, nulls, or a number that is not finite.
    """
    if table.schema.names != [name]:
        raise InvalidRequest(f"expected the single column {name!r}, got {table.num_columns}", param=name)
    kind = table.schema.types[0]
    if not pa.types.is_fixed_size_list(kind) or kind.value_type not in (pa.float32(), pa.float16()):
        raise InvalidRequest(f"{name}: expected fixed_size_list of float32 or float16", param=name)
    if kind.list_size < 1 or table.num_rows < 1:
        raise InvalidRequest(f"{name}: expected at least one vector of at least one number", param=name)
    parts = []
    for chunk in table.column(0).chunks:
        values = chunk.flatten()
        # flatten() leaves null rows out, so their count comes first.
        if chunk.null_count or values.null_count:
            raise InvalidRequest(f"{name}: nulls are not vectors", param=name)
        parts.append(values.to_numpy(zero_copy_only=False).reshape(len(chunk), kind.list_size))
    return decode_vectors(np.concatenate(parts), param=name)


def _refuse_inflation(body: bytes) -> None:
    """Raises: RequestError: a batch is compressed, or a dictionary stands beside the batches."""
    reader = pa.ipc.MessageReader.open_stream(pa.py_buffer(body))
    while True:
        try:
            message = reader.read_next_message()
        except StopIteration:
            return
        if message.type == "dictionary":
            raise RequestError("dictionary-encoded Arrow columns are not taken")
        if message.type == "record batch" and _is_compressed(message.metadata.to_pybytes()):
            raise RequestError("compressed Arrow buffers are not taken; write the stream without compression")


def _is_compressed(metadata: bytes) -> bool:
    """Whether the RecordBatch of a Message names a compression. ``metadata`` has passed Arrow's flatbuffer check."""
    root = _u32(metadata, 0)
    header_at = _slot(metadata, root, _MESSAGE_HEADER)
    if header_at is None:
        return False
    record_batch = header_at + _u32(metadata, header_at)
    return _slot(metadata, record_batch, _RECORD_BATCH_COMPRESSION) is not None


def _slot(data: bytes, table: int, slot: int) -> int | None:
    """Where field ``slot`` of a flatbuffer table lies, or None where it is absent."""
    vtable = table - int.from_bytes(data[table : table + 4], "little", signed=True)
    vtable_size = int.from_bytes(data[vtable : vtable + 2], "little")
    at = 4 + 2 * slot
    if at + 2 > vtable_size:
        return None
    offset = int.from_bytes(data[vtable + at : vtable + at + 2], "little")
    return table + offset if offset else None


def _u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")
