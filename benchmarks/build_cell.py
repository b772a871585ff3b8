"""Measures a collection: a query's latency and recall in this process, then the memory of the service that serves it.

``python -m benchmarks.build_cell COLLECTION CORPUS_COUNT TRUTH`` prints JSON. TRUTH is a file of the best ids of each
query, which is written where it is missing and the collection is flat. The memory is what no file backs, after a few
searches over HTTP.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import httpx
import numpy as np

from benchmarks.build_data import Float32Array, queries
from retriever_svc.collection import Collection
from retriever_svc.index import use_threads
from tests.retriever_process import RetrieverProcess

N_DOCS = 5
QUERIES = 256
RECALL_QUERIES = 128
SECONDS = 10.0  # of searching, at most


def main() -> None:
    folder, count, truth_file = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    threads = use_threads(0)
    began = time.perf_counter()
    collection = Collection.open(folder, device="cpu")
    load_s = time.perf_counter() - began
    collection.warm_up()
    queries_BD = queries(count, collection.manifest.dimension, QUERIES)
    found, times = [], []
    until = time.perf_counter() + SECONDS
    for query_D in queries_BD:
        began = time.perf_counter()
        (ranked,) = collection.search(query_D[np.newaxis], [N_DOCS])
        collection.take(ranked.rows)
        times.append(time.perf_counter() - began)
        found.append(ranked.ids)
        if time.perf_counter() > until and len(times) >= RECALL_QUERIES:
            break
    if not truth_file.exists() and collection.manifest.kind == "flat":
        np.save(truth_file, np.array(found[:RECALL_QUERIES]))
    true = np.load(truth_file) if truth_file.exists() else np.empty((0, N_DOCS))
    hits = [len(set(row.tolist()) & set(ids.tolist())) / N_DOCS for row, ids in zip(true, found, strict=False)]
    times = times[8:]  # the first ones warm the caches
    generation = folder / "generations" / collection.generation
    del collection  # the service needs the memory
    said = {
        "ram_bytes": served_bytes(folder, queries_BD),
        "disk_bytes": sum(path.stat().st_size for path in generation.rglob("*") if path.is_file()),
        "p50_ms": 1e3 * statistics.median(times),
        "p99_ms": 1e3 * float(np.quantile(times, 0.99)),
        "queries": len(times),
        "recall": statistics.mean(hits) if hits else None,
        "load_s": load_s,
        "threads": threads,
    }
    sys.stdout.write(json.dumps(said) + "\n")


def served_bytes(folder: Path, queries_BD: Float32Array) -> int:
    """Bytes of `python -m retriever_svc` that no file backs, with this collection and no other."""
    process = RetrieverProcess(folder.parent.parent, faiss_threads=0).start()
    try:
        for query_D in queries_BD[:8]:
            body = {"vectors": [query_D.tolist()], "n_docs": N_DOCS, "collection": folder.name}
            httpx.post(f"{process.url}/v1/retrieve", json=body, timeout=60).raise_for_status()
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
    finally:
        process.stop()


if __name__ == "__main__":
    main()
