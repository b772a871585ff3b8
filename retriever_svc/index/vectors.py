"""The true embeddings of a generation beside an index that does not keep them: one file, mapped into memory.

Row r is vector r of the index, in the storage type of the passage table, without a header: reading a few rows costs a
page fault each where they are cold, and nothing is loaded at start.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.errors import StartupError
from shared.retrieval import Float32Array, Int64Array


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
        if isinstance(rows, slice):
            return self._rows_ND[rows].astype(np.float32)
        found: Float32Array = self._rows_ND.take(rows, axis=0).astype(np.float32, copy=False)
        return found
