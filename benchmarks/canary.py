"""What the recall canary costs live searches: their latency with it off, as set by default, and comparing all the time.

    python -m benchmarks.canary [--passages 100000] [--dimension 256] [--requests 400] [--rounds 6]

One client asks one query at a time of a retriever over ivf-pq. Rounds of each setting alternate; the service of a
setting runs alone while it is measured. With the fraction at 1 the canary is never idle.
"""

import argparse
import json
import time
from pathlib import Path

import httpx
import numpy as np

from benchmarks.processor import processor
from benchmarks.retriever_data import WORK, corpus
from shared.retrieval import RetrieveQuery
from shared.vectors import ARROW_TYPE, query_to_wire
from tests.retriever_process import RetrieverProcess

KIND = "ivf-pq"
FRACTIONS = (0.0, 0.01, 1.0)
WARM_UP = 50
REST_S = 0.5
RESULTS = Path(__file__).parent / "results" / "canary.json"


def asked(service: RetrieverProcess, bodies: list[tuple[bytes, str]], n: int) -> list[float]:
    """Milliseconds of each request, after a warm-up."""
    taken = []
    with httpx.Client(base_url=service.url, timeout=60) as http:
        for i in range(WARM_UP + n):
            body, content_type = bodies[i % len(bodies)]
            began_s = time.perf_counter()
            response = http.post(
                "/v1/retrieve", content=body, headers={"Content-Type": content_type, "Accept": ARROW_TYPE}
            )
            taken.append((time.perf_counter() - began_s) * 1e3)
            response.raise_for_status()
    return taken[WARM_UP:]


def outcomes(service: RetrieverProcess) -> dict[str, float]:
    """Queries sampled so far, by what became of them; once the canary is at rest."""
    with httpx.Client(base_url=service.url, timeout=60) as http:
        before: dict[str, float] | None = None
        while (now := _outcomes(http)) != before:
            before = now
            time.sleep(REST_S)
    return now


def _outcomes(http: httpx.Client) -> dict[str, float]:
    lines = [
        line for line in http.get("/metrics").text.splitlines() if line.startswith("retriever_canary_queries_total{")
    ]
    return {line.partition('outcome="')[2].partition('"')[0]: float(line.split()[-1]) for line in lines}


def summary(taken_ms: list[float]) -> dict[str, float]:
    return {f"p{q}_ms": round(float(np.percentile(taken_ms, q)), 3) for q in (50, 95, 99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    made = corpus(WORK, options.passages, options.dimension, [KIND], print)
    bodies = [
        query_to_wire(RetrieveQuery(query[np.newaxis], n_docs=5, return_embeds=True), "arrow") for query in made.queries
    ]
    services = {
        fraction: RetrieverProcess(made.data_dir(KIND), canary_fraction=fraction, log_level="warning").start()
        for fraction in FRACTIONS
    }
    try:
        taken: dict[float, list[float]] = {fraction: [] for fraction in FRACTIONS}
        for _ in range(options.rounds):
            for fraction, service in services.items():
                taken[fraction] += asked(service, bodies, options.requests)
                outcomes(service)
        rows = {
            str(fraction): {
                **summary(taken[fraction]),
                "requests": len(taken[fraction]),
                **outcomes(services[fraction]),
            }
            for fraction in FRACTIONS
        }
        with httpx.Client(base_url=services[1.0].url) as http:
            recall = http.get("/v1/collections/default").json()["recall"]
    finally:
        for service in services.values():
            service.end()
    for named, row in rows.items():
        ratio = row["p99_ms"] / rows["0.0"]["p99_ms"]
        print(f"fraction {named}: p50 {row['p50_ms']} ms, p99 {row['p99_ms']} ms ({ratio:.2f} of none), {row}")
    about = {"processor": processor(), "kind": KIND, "passages": options.passages, "dimension": options.dimension}
    RESULTS.write_text(json.dumps({**about, "fractions": rows, "recall": recall}, indent=2) + "\n")


if __name__ == "__main__":
    main()
