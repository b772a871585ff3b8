"""Moves an alias between two collections under load: no error, and no answer that mixes the two.

``python -m tests.swap 10000`` sends so many searches without a swap, so many while the alias moves 50 times, and so
many while generations are built and take over under writes. tests/e2e/test_swap.py sends fewer.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from retriever_svc.build import build_collection
from retriever_svc.collection import Collection
from shared.retrieval import RetrieveQuery
from shared.vectors import ARROW_TYPE, query_to_wire, result_from_wire
from tests.retriever_data import passage_table, random_embeddings, source_of, text, title
from tests.retriever_process import RetrieverProcess

D, N, N_DOCS, CLIENTS, SWAPS = 16, 400, 5, 8, 50
FIRST_ID = {"one": 0, "other": 10_000}
QUERIES = random_embeddings(32, D, seed=9)
BLOCK = list(range(50_000, 50_010))  # passages of `one` that a writer replaces together


@dataclass
class Phase:
    """What a load saw. ``faults``: answers that were wrong, or none."""

    latencies_ms: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    done: int = 0  # swaps, or builds

    def __str__(self) -> str:
        p50, p99 = np.percentile(self.latencies_ms, [50, 99])
        return f"{len(self.latencies_ms)} requests, {len(self.faults)} faults, p50 {p50:.1f} ms, p99 {p99:.1f} ms"


class Swaps:
    def __init__(self, folder: Path) -> None:
        self.expected: dict[str, list[list[int]]] = {}
        self.embeddings: dict[str, np.ndarray] = {}
        for seed, (name, first) in enumerate(FIRST_ID.items()):
            self.embeddings[name] = random_embeddings(N, D, seed=seed)
            path = folder / "data" / "collections" / name
            build_collection(path, source_of(passage_table(self.embeddings[name], range(first, first + N)), 100))
            found = Collection.open(path, device="cpu").search(QUERIES, [N_DOCS] * len(QUERIES))
            self.expected[name] = [one.ids.tolist() for one in found]
        self.service = RetrieverProcess(folder / "data", log_level="warning").start()
        self.edition = 0  # of the block, acknowledged

    async def load(self, n: int, beside: Callable[[httpx.AsyncClient, Phase], Awaitable[None]] | None = None) -> Phase:
        """``n`` searches through the alias, by several clients at once; more while what goes on beside is not done."""
        phase = Phase()
        async with httpx.AsyncClient(base_url=self.service.url, timeout=60) as http:
            await self._point(http, "one")
            other = asyncio.create_task(beside(http, phase)) if beside else None
            clients = [asyncio.create_task(self._client(http, phase, n, other, i)) for i in range(CLIENTS)]
            await asyncio.gather(*clients, *([other] if other else []))
        return phase

    async def _client(
        self, http: httpx.AsyncClient, phase: Phase, n: int, other: "asyncio.Task[None] | None", first: int
    ) -> None:
        q = first
        while len(phase.latencies_ms) < n or (other is not None and not other.done()):
            q = (q + 1) % len(QUERIES)
            query = RetrieveQuery(QUERIES[q : q + 1], n_docs=N_DOCS, collection="x")
            body, content_type = query_to_wire(query, "arrow")
            began = time.perf_counter()
            response = await http.post(
                "/v1/retrieve", content=body, headers={"Content-Type": content_type, "Accept": ARROW_TYPE}
            )
            phase.latencies_ms.append((time.perf_counter() - began) * 1e3)
            if fault := self._fault(response, q, phase):
                phase.faults.append(fault)

    def _fault(self, response: httpx.Response, q: int, phase: Phase) -> str:
        if not response.is_success:
            return response.text
        found = result_from_wire(response.content, response.headers["content-type"])
        name, ids = found.index.collection, found.doc_ids[0].tolist()
        phase.seen.add(name)
        assert found.docs is not None
        assert found.doc_embeds is not None
        rows = np.array(ids) - FIRST_ID[name]
        told = [(passage.id, passage.title, passage.text) for passage in found.docs[0]]
        if ids != self.expected[name][q] or told != [(i, title(i), text(i)) for i in ids]:
            return f"query {q} in {name}: {told}"
        return "" if np.array_equal(found.doc_embeds[0], self.embeddings[name][rows]) else f"embeddings of {ids}"

    async def _point(self, http: httpx.AsyncClient, name: str) -> None:
        (await http.put("/v1/aliases/x", json={"collection": name})).raise_for_status()

    async def swap(self, http: httpx.AsyncClient, phase: Phase) -> None:
        """Move the alias there and back."""
        for i in range(SWAPS):
            await asyncio.sleep(0.01)
            await self._point(http, ("other", "one")[i % 2])
            phase.done += 1

    async def build(self, http: httpx.AsyncClient, phase: Phase) -> None:
        """Build twice and let the build take over, while a writer replaces passages that no query comes near."""
        writer = asyncio.create_task(self._write(http, phase))
        try:
            for _ in range(2):
                job = (await http.post("/v1/collections/one/generations", json={})).raise_for_status().json()
                while job["status"] == "running":
                    await asyncio.sleep(0.05)
                    job = (await http.get(f"/v1/jobs/{job['id']}")).json()
                if job["status"] != "done":
                    phase.faults.append(str(job))
                phase.done += 1
        finally:
            writer.cancel()
            with suppress(asyncio.CancelledError):
                await writer

    async def _write(self, http: httpx.AsyncClient, phase: Phase) -> None:
        """Replace a block of passages again and again; what was acknowledged is what is read next, and all of it."""
        while True:
            self.edition += 1
            passages = [
                {"id": i, "title": str(self.edition), "text": "", "embedding": [1e-6 * (i - BLOCK[0])] * D}
                for i in BLOCK
            ]
            (await http.post("/v1/collections/one/passages", json={"passages": passages})).raise_for_status()
            for i in (BLOCK[0], BLOCK[-1]):
                passage = (await http.get(f"/v1/collections/one/passages/{i}")).json()
                if passage.get("title") != str(self.edition):
                    phase.faults.append(f"{passage} after edition {self.edition} was acknowledged")


def run(folder: Path, n: int) -> dict[str, Phase]:
    """The three loads, by name."""
    swaps = Swaps(folder)
    try:
        return {
            "quiet": asyncio.run(swaps.load(n)),
            "while the alias moves": asyncio.run(swaps.load(n, swaps.swap)),
            "while generations take over": asyncio.run(swaps.load(n, swaps.build)),
        }
    finally:
        swaps.service.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("requests", type=int)
    with tempfile.TemporaryDirectory() as folder:
        phases = run(Path(folder), parser.parse_args().requests)
    for name, phase in phases.items():
        sys.stdout.write(f"{name}: {phase}; {phase.done} swaps\n")
        sys.stdout.writelines(f"  {fault[:300]}\n" for fault in phase.faults[:5])
    return any(phase.faults for phase in phases.values())


if __name__ == "__main__":
    sys.exit(main())
