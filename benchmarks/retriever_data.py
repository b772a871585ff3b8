"""The corpus of `make bench-retriever`: made from a seed once, built with our own builder, kept in a work folder.

Unit vectors around one centre in forty, as sentences about the same things are; passages of about a hundred words.
Shapes: N passages, B queries, D dimension.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retriever_svc import generation as gen
from retriever_svc.build import Options, build_collection
from retriever_svc.passages import passage_schema
from retriever_svc.source import Source
from retriever_svc.text_file import TEXTS

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
Say = Callable[[str], None]

WORK = Path(__file__).parents[1] / "build" / "bench-retriever"
QUERIES = 2048
NOISE = 0.5
WORDS = 100
VOCABULARY = 8192
N_DOCS = 5
ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Corpus:
    """``folder`` holds ``vectors.npy`` (N, D), ``queries.npy`` (B, D) and, by kind, a data folder of the retriever."""

    folder: Path
    count: int
    dimension: int

    @property
    def vectors(self) -> Float32Array:
        vectors: Float32Array = np.load(self.folder / "vectors.npy", mmap_mode="r")
        return vectors

    @property
    def queries(self) -> Float32Array:
        queries: Float32Array = np.load(self.folder / "queries.npy")
        return queries

    def data_dir(self, kind: str) -> Path:
        return self.folder / kind

    def generation(self, kind: str) -> Path:
        """Where the index file of a kind lies."""
        return gen.current_generation(self.data_dir(kind) / "collections" / "default")

    def passages(self) -> Iterator[tuple[int, list[str], list[str]]]:
        """``(first row, titles, texts)``, in pieces."""
        dice = np.random.default_rng(3)
        lengths = dice.integers(3, 10, VOCABULARY)
        letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", "S1")
        words = np.array([b"".join(dice.choice(letters, n)).decode() for n in lengths])
        for start in range(0, self.count, ROWS_AT_ONCE):
            rows = min(ROWS_AT_ONCE, self.count - start)
            chosen = words[dice.integers(0, VOCABULARY, (rows, WORDS))]
            yield start, [f"Title {start + i}" for i in range(rows)], [" ".join(row) for row in chosen.tolist()]

    def source(self) -> Source:
        schema = passage_schema(self.dimension, "float32")
        vectors = self.vectors

        def batches() -> Iterator[pa.RecordBatch]:
            for start, titles, texts in self.passages():
                part = np.ascontiguousarray(vectors[start : start + len(texts)])
                embeddings = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), self.dimension)
                ids = pa.array(np.arange(start, start + len(texts)))
                yield pa.record_batch([ids, pa.array(titles), pa.array(texts), embeddings], schema=schema)

        return Source(schema, batches(), "sha256-of-none", count=self.count)


def corpus(work: Path, count: int, dimension: int, kinds: list[str], say: Say) -> Corpus:
    """That in the folder ``work``, made where it is not there yet."""
    made = Corpus(work / f"{count}x{dimension}", count, dimension)
    if not (made.folder / "queries.npy").exists():
        say(f"making {count} x {dimension} vectors")
        made.folder.mkdir(parents=True, exist_ok=True)
        _write_vectors(made)
    for kind in kinds:
        there = (made.data_dir(kind) / "collections" / "default" / gen.CURRENT).exists()
        if there and (made.generation(kind) / TEXTS).exists():  # else an earlier version built it
            continue
        say(f"building {kind} over {count} x {dimension}")
        shutil.rmtree(made.data_dir(kind), ignore_errors=True)
        build_collection(made.data_dir(kind) / "collections" / "default", made.source(), options=Options(kind=kind))
    return made


def _write_vectors(made: Corpus) -> None:
    dice = np.random.default_rng(1)
    centres = dice.standard_normal((max(1, made.count // 40), made.dimension), dtype=np.float32)
    shape = (made.count, made.dimension)
    vectors = np.lib.format.open_memmap(made.folder / "vectors.npy", mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, made.count, ROWS_AT_ONCE):
        vectors[start : start + ROWS_AT_ONCE] = _around(centres, min(ROWS_AT_ONCE, made.count - start), dice)
    vectors.flush()
    np.save(made.folder / "queries.npy", _around(centres, QUERIES, dice))


def _around(centres: Float32Array, rows: int, dice: np.random.Generator) -> Float32Array:
    noise = dice.standard_normal((rows, centres.shape[1]), dtype=np.float32)
    vectors = centres[dice.integers(0, len(centres), rows)] + np.float32(NOISE) * noise
    unit: Float32Array = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def true_ids(made: Corpus, queries_BD: Float32Array) -> Int64Array:
    """The best ``N_DOCS`` of each query by comparing all: (B, N_DOCS)."""
    flat = faiss.IndexFlatIP(made.dimension)
    flat.add(np.ascontiguousarray(made.vectors))
    ids: Int64Array = flat.search(queries_BD, N_DOCS)[1]
    return ids
