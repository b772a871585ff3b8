"""The true embeddings of a generation beside an index that does not keep them: one file, mapped into memory.

Row r is vector r of the index, in the storage type of the passage table, without a header: reading a few rows costs a
page fault each where they are cold, and nothing is loaded at start.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shared.errors import StartupError
from shared.retrieval import Float32Array, Int64Array

_SIGN_AND_HALF = np.array(0x8FFFE000, np.uint32).view(np.int32)
_EXPONENTS_APART = np.float32(2.0 ** (127 - 15))


class VectorSource(Protocol):
    """(N, D) embeddings that an index is built from, without holding all of them."""

    dimension: int

    def __len__(self) -> int: ...

    def pieces(self, start: int, rows: int) -> Iterator[Float32Array]:
        """Rows from ``start`` on, ``rows`` at a time, the last piece aside: (rows, D)."""

    def take(self, rows_K: Int64Array) -> Float32Array:
        """(K, D) Chosen rows."""


class VectorsFile:
    """(N, D) embeddings in a file that is read and not mapped: mapped pages would count as this process's memory."""

    def __init__(self, path: Path, dimension: int, dtype: str) -> None:
        self._path, self.dimension, self._dtype = path, dimension, np.dtype(dtype)
        self._row_bytes = dimension * self._dtype.itemsize
        self._count = path.stat().st_size // self._row_bytes

    def __len__(self) -> int:
        return self._count

    def pieces(self, start: int, rows: int) -> Iterator[Float32Array]:
        """Rows from ``start`` on, ``rows`` at a time, the last piece aside: (rows, D)."""
        for first in range(start, self._count, rows):
            wanted = min(rows, self._count - first) * self.dimension
            flat = np.fromfile(self._path, self._dtype, wanted, offset=first * self._row_bytes)
            yield widened(flat).reshape(-1, self.dimension)

    def take(self, rows_K: Int64Array) -> Float32Array:
        """(K, D) Chosen rows."""
        found_KD = np.empty((len(rows_K), self.dimension), np.float32)
        row_D = np.empty(self.dimension, self._dtype)
        with self._path.open("rb", buffering=0) as file:
            for i, row in enumerate(rows_K.tolist()):
                file.seek(row * self._row_bytes)
                file.readinto(row_D.data)
                found_KD[i] = row_D
        return found_KD


class MappedVectors:
    """(N, D) embeddings in a file."""

    def __init__(self, path: Path, dimension: int, dtype: str) -> None:
        size = path.stat().st_size
        row = dimension * np.dtype(dtype).itemsize
        if size % row:
            raise StartupError(f"{path} has {size} bytes, no multiple of a row's {row}; rebuild the collection")
        self.count = size // row
        self.dimension = dimension
        self._rows_ND: npt.NDArray[np.floating] = (
            # As a plain array: numpy's own class for a mapped file costs microseconds at every index.
            np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(self.count, dimension)))
            if size
            else np.empty((0, dimension), dtype)
        )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Int64Array | slice) -> Float32Array:
        """(K, D) float32, a copy."""
        return widened(self._rows_ND[rows].copy() if isinstance(rows, slice) else self._rows_ND.take(rows, axis=0))


def widened(numbers: npt.NDArray[np.floating]) -> Float32Array:
    """Finite float16 numbers as the float32 that they are; float32 as it is.

    numpy takes halves one by one. Here sign, exponent and fraction go to where float32 has them, many at once; then the
    exponent, which counts from -15 there and from -127 here, is mended by a product that is exact, for subnormals too.
    """
    if numbers.dtype != np.float16:
        return numbers.astype(np.float32, copy=False)
    bits: npt.NDArray[np.int32] = numbers.view(np.int16).astype(np.int32)
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _SIGN_AND_HALF, out=bits)  # the shift left copies of the sign behind
    found = bits.view(np.float32)
    return np.multiply(found, _EXPONENTS_APART, out=found)
