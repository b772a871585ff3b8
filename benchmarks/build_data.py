"""The corpora of `make bench-build`: Parquet files with embeddings, made from a seed piece by piece.

Unit vectors around one centre in forty, as sentences about the same things are; passages of about a hundred words.
Every piece has dice of its own, so that a file is the same however it was made. Shapes: N passages, B queries,
D dimension.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retriever_svc.passages import passage_schema

Float32Array = npt.NDArray[np.float32]

ENCODER = "sha256-of-no-encoder"
CLUSTER = 40
NOISE = 0.5
WORDS = 100
VOCABULARY = 8192
PIECE_ROWS = 16_384


def write_corpus(path: Path, count: int, dimension: int) -> None:
    """A Parquet file of ``count`` passages that `rag index build` takes as it is; whole or not at all."""
    schema = passage_schema(dimension, "float16").with_metadata({"encoder": ENCODER})
    partial = path.with_suffix(".partial")
    with pq.ParquetWriter(partial, schema, compression="zstd", use_dictionary=False) as writer:
        for start, vectors_BD, titles, texts in _pieces(count, dimension):
            flat = pa.array(vectors_BD.astype(np.float16).reshape(-1))
            ids = pa.array(np.arange(start, start + len(titles)))
            embeddings = pa.FixedSizeListArray.from_arrays(flat, dimension)
            writer.write_batch(pa.record_batch([ids, pa.array(titles), pa.array(texts), embeddings], schema=schema))
    partial.rename(path)


def queries(count: int, dimension: int, n: int) -> Float32Array:
    """(B, D) vectors around the same centres."""
    return _around(_centres(count, dimension), n, np.random.default_rng([2, count]))


def text_bytes() -> int:
    """Of an average passage's title and text."""
    _, _, titles, texts = next(_pieces(PIECE_ROWS, 1))
    return round(sum(len(a) + len(b) for a, b in zip(titles, texts, strict=True)) / len(titles))


def _pieces(count: int, dimension: int) -> Iterator[tuple[int, Float32Array, list[str], list[str]]]:
    """``(first row, vectors, titles, texts)``."""
    centres, words = _centres(count, dimension), _words()
    for start in range(0, count, PIECE_ROWS):
        dice = np.random.default_rng([1, count, start])
        rows = min(PIECE_ROWS, count - start)
        chosen = words[dice.integers(0, VOCABULARY, (rows, WORDS))]
        texts = [" ".join(row) for row in chosen.tolist()]
        yield start, _around(centres, rows, dice), [f"Title {start + i}" for i in range(rows)], texts


def _words() -> npt.NDArray[np.str_]:
    dice = np.random.default_rng(3)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return np.array(["".join(dice.choice(letters, n)) for n in dice.integers(2, 9, VOCABULARY)])


def _centres(count: int, dimension: int) -> Float32Array:
    dice = np.random.default_rng([0, count])
    return dice.standard_normal((max(1, count // CLUSTER), dimension), dtype=np.float32)


def _around(centres: Float32Array, rows: int, dice: np.random.Generator) -> Float32Array:
    noise = dice.standard_normal((rows, centres.shape[1]), dtype=np.float32)
    vectors = centres[dice.integers(0, len(centres), rows)] + np.float32(NOISE) * noise
    unit: Float32Array = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
