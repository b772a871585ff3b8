"""Embeddings in a file: rows come as they were written, and halves as the float32 that they are."""

from pathlib import Path

import numpy as np
import pytest

from retriever_svc.index.vectors import MappedVectors, VectorsFile, widened

HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16)
FINITE = HALVES[np.isfinite(HALVES)]


def test_every_half_is_widened_as_numpy_does_it() -> None:
    np.testing.assert_array_equal(widened(FINITE).view(np.uint32), FINITE.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_are_those_that_were_written(tmp_path: Path, dtype: str) -> None:
    dimension = 8
    written = FINITE.astype(dtype).reshape(-1, dimension)
    path = tmp_path / "embeddings.bin"
    path.write_bytes(written.tobytes())
    mapped, read = MappedVectors(path, dimension, dtype), VectorsFile(path, dimension, dtype)
    rows = np.random.default_rng(0).integers(0, len(written), 500)
    for found, wanted in (
        (mapped[rows], written[rows]),
        (mapped[3:90], written[3:90]),
        (read.take(rows), written[rows]),
        (np.concatenate([*read.pieces(5, 700)]), written[5:]),
    ):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted.astype(np.float32))
        found[0] = 0  # it is a copy, which may be written to
    np.testing.assert_array_equal(mapped[rows], written[rows].astype(np.float32))
