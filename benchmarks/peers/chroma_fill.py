"""Runs in Chroma's own environment: fills a collection on the disk, which its server then serves."""

import json
import sys
from pathlib import Path

import chromadb
import numpy as np

ROWS_AT_ONCE = 2000


def main() -> None:
    lines, vectors, folder = Path(sys.argv[1]), np.load(sys.argv[2], mmap_mode="r"), sys.argv[3]
    client = chromadb.PersistentClient(folder, settings=chromadb.Settings(anonymized_telemetry=False))
    collection = client.create_collection(
        "bench",
        embedding_function=None,
        configuration={"hnsw": {"space": "ip", "max_neighbors": 32, "ef_construction": 200, "ef_search": 128}},
    )
    with lines.open() as file:
        passages = [json.loads(line) for line in file]
    for start in range(0, len(passages), ROWS_AT_ONCE):
        part = passages[start : start + ROWS_AT_ONCE]
        collection.add(
            ids=[str(row) for row, _, _ in part],
            embeddings=np.ascontiguousarray(vectors[start : start + len(part)]),
            documents=[text for _, _, text in part],
            metadatas=[{"title": title} for _, title, _ in part],
        )
    print(collection.id)


if __name__ == "__main__":
    main()
