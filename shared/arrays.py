"""Arrays in JSON: base64 of the bytes with dtype and shape, or nested lists. Every value survives to the bit.

Shapes: B vectors, D dimension.
"""

import base64
import binascii
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.errors import InvalidRequest
from shared.retrieval import Float32Array
from shared.schemas import EncodedArray

_DTYPES: dict[str, np.dtype[np.floating]] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
}


def encode_array(array: npt.NDArray[np.floating]) -> EncodedArray:
    """A float16, float32 or float64 array of one to three dimensions, as it is."""
    name = array.dtype.name
    data = np.ascontiguousarray(array, dtype=_DTYPES[name]).tobytes()
    return EncodedArray.model_validate(
        {"data": base64.b64encode(data).decode("ascii"), "dtype": name, "shape": list(array.shape)}
    )


def decode_array(encoded: EncodedArray, param: str = "data") -> Float32Array:
    """The array as float32, own memory.

    Raises: InvalidRequest: not base64, or not as many bytes as dtype and shape say.
    """
    dtype = _DTYPES[encoded.dtype]
    # Python's integers do not overflow: a shape of (2**40, 2**40) cannot pass for a small one.
    n_bytes = math.prod(encoded.shape) * dtype.itemsize
    stated = f"shape {encoded.shape} of {encoded.dtype} is {n_bytes} bytes"
    if len(encoded.data) != 4 * math.ceil(n_bytes / 3):
        raise InvalidRequest(
            f"{param}: {stated}, which base64 does not write as {len(encoded.data)} characters", param=param
        )
    try:
        data = base64.b64decode(encoded.data, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(
            f"{param}.data: not base64 (the standard alphabet, padded)", param=f"{param}.data"
        ) from None
    if len(data) != n_bytes:
        raise InvalidRequest(f"{param}: {stated}, but data holds {len(data)}", param=param)
    return as_float32(np.frombuffer(data, dtype=dtype).reshape(encoded.shape))


def as_float32(array: npt.NDArray[np.floating]) -> Float32Array:
    """A contiguous copy in float32. A float64 beyond its range becomes infinite, which callers refuse by name."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array(array, dtype=np.float32, order="C")


def decode_vectors(
    vectors: Sequence[Sequence[float]] | EncodedArray | npt.NDArray[np.floating], param: str = "vectors"
) -> Float32Array:
    """(B, D) float32, finite, B and D at least 1.

    Raises: InvalidRequest: naming ``param``, or the row or number at fault.
    """
    if isinstance(vectors, EncodedArray):
        array = decode_array(vectors, param)
    elif isinstance(vectors, np.ndarray):
        array = as_float32(vectors)
    else:
        array = _from_rows(vectors, param)
    if array.ndim != 2:
        raise InvalidRequest(f"{param}: expected two dimensions, (B, D), got shape {list(array.shape)}", param=param)
    if array.shape[0] == 0 or array.shape[1] == 0:
        raise InvalidRequest(f"{param}: expected at least one vector of at least one number", param=param)
    finite = np.isfinite(array)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        where = f"{param}.{row}.{column}"
        raise InvalidRequest(f"{where}: not a finite float32", param=where)
    return array


def _from_rows(rows: Sequence[Sequence[float]], param: str) -> Float32Array:
    dimension = len(rows[0]) if rows else 0
    for b, row in enumerate(rows):
        if len(row) != dimension:
            where = f"{param}.{b}"
            raise InvalidRequest(f"{where}: {len(row)} numbers, but the first vector has {dimension}", param=where)
    try:
        return as_float32(np.array(rows, dtype=np.float64).reshape(len(rows), dimension))
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequest(f"{param}: expected lists of numbers", param=param) from None
