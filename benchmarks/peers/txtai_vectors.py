"""Runs in txtai's own environment: fills an index where there is none, and gives texts their vectors.

txtai's API takes texts and asks an embedding model. Here the "model" looks the vector up, so that what is measured is
the search and the service: a passage begins with ``Title <row>``, a query is ``query <row>``.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

_FOLDER = Path(os.environ["BENCH_CORPUS"])
_VECTORS = np.load(_FOLDER / "vectors.npy", mmap_mode="r")
_QUERIES = np.load(_FOLDER / "queries.npy")


def transform(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    rows = [text.split(None, 2) for text in texts]
    return np.stack([(_VECTORS if kind == "Title" else _QUERIES)[int(row)] for kind, row, *_ in rows])


def passages(path: Path) -> Iterator[tuple[int, str]]:
    with path.open() as file:
        for line in file:
            row, title, text = json.loads(line)
            yield row, f"{title} {text}"


def main() -> None:
    from txtai import Embeddings  # noqa: PLC0415  not where the service imports `transform`

    embeddings = Embeddings(
        method="external",
        transform="txtai_vectors.transform",
        content=True,
        backend="faiss",
        faiss={"components": "IDMap,Flat"},
    )
    embeddings.index(passages(Path(sys.argv[1])))
    embeddings.save(sys.argv[2])


if __name__ == "__main__":
    main()
