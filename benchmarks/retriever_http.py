"""Retrievers behind HTTP: each client is an httpx client with one connection that it keeps.

What a client does is in the latency: it writes its vectors in the form asked for, and reads the answer back into
arrays and texts, with what a plain client would use (`json`'s fast cousin in pydantic, pyarrow).
"""

import asyncio
import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc
from pydantic_core import from_json, to_json

from benchmarks.retriever_cells import Cell, Turn
from benchmarks.retriever_data import N_DOCS, Float32Array
from shared.forms import ARROW_TYPE, JSON_TYPE
from shared.retrieval import RetrieveQuery
from shared.vectors import query_to_wire

ACCEPT = {"json": JSON_TYPE, "base64": f"{JSON_TYPE};vectors=base64", "arrow": ARROW_TYPE}
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Dialect:
    """How a service is spoken to: ``write`` gives body and headers for the queries ``rows``, ``read`` the ids."""

    path: str
    write: Callable[[slice, Cell], tuple[bytes, dict[str, str]]]
    read: Callable[[bytes, Cell], list[list[int]]]


class HttpSystem:
    def __init__(self, name: str, url: str, pids: Sequence[int], dialect: Dialect, n_queries: int) -> None:
        self.name = name
        self.pids = pids
        self._dialect = dialect
        self._n_queries = n_queries
        self._url = url
        self._runner = asyncio.Runner()
        self._clients: list[httpx.AsyncClient] = []

    def turn(self, cell: Cell, seconds: float) -> Turn:
        return self._runner.run(self._turn(cell, seconds))

    def ids(self, n_queries: int) -> list[list[int]]:
        cell = Cell("", n_queries, 1, "json")
        return self._runner.run(self._asked(self._client(0), 0, cell))

    def close(self) -> None:
        async def close() -> None:
            for client in self._clients:
                await client.aclose()

        self._runner.run(close())
        self._runner.close()

    def _client(self, number: int) -> httpx.AsyncClient:
        while len(self._clients) <= number:
            self._clients.append(httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT_S, trust_env=False))
        return self._clients[number]

    async def _asked(self, client: httpx.AsyncClient, request: int, cell: Cell) -> list[list[int]]:
        start = request * cell.batch % (self._n_queries - cell.batch + 1)
        body, headers = self._dialect.write(slice(start, start + cell.batch), cell)
        response = await client.post(self._dialect.path, content=body, headers=headers)
        if not response.is_success:
            raise RuntimeError(f"{self.name} answered {response.status_code}: {response.text[:300]}")
        return self._dialect.read(response.content, cell)

    async def _turn(self, cell: Cell, seconds: float) -> Turn:
        latencies_s: list[float] = []
        began_s = time.perf_counter()

        async def ask(number: int) -> None:
            client, request = self._client(number), number
            while True:
                sent_s = time.perf_counter()
                await self._asked(client, request, cell)
                latencies_s.append(time.perf_counter() - sent_s)
                request += cell.clients
                if time.perf_counter() - began_s >= seconds:
                    return

        await asyncio.gather(*(ask(number) for number in range(cell.clients)))
        return Turn(time.perf_counter() - began_s, latencies_s)


def our_dialect(queries_BD: Float32Array) -> Dialect:
    def write(rows: slice, cell: Cell) -> tuple[bytes, dict[str, str]]:
        query = RetrieveQuery(
            queries_BD[rows],
            n_docs=N_DOCS,
            return_embeds=cell.content != "ids",
            return_passages=cell.content == "full",
        )
        body, content_type = query_to_wire(query, cell.form)
        return body, {"content-type": content_type, "accept": ACCEPT[cell.form]}

    def read(body: bytes, cell: Cell) -> list[list[int]]:
        if cell.form == "arrow":
            with pa.ipc.open_stream(body) as reader:
                found: list[list[int]] = reader.read_all()["doc_ids"].to_pylist()
            return found
        answer = from_json(body)
        if answer["retrieved_doc_embeds"] is not None:
            for rows in answer["retrieved_doc_embeds"]:
                _array(rows)
        ids: list[list[int]] = answer["doc_ids"]
        return ids

    return Dialect("/v1/retrieve", write, read)


def _array(rows: Any) -> npt.NDArray[np.float32]:
    if isinstance(rows, dict):
        return np.frombuffer(base64.b64decode(rows["data"]), np.float32).reshape(rows["shape"])
    return np.array(rows, np.float32)


def chroma_dialect(queries_BD: Float32Array, collection: str) -> Dialect:
    def write(rows: slice, cell: Cell) -> tuple[bytes, dict[str, str]]:
        include = {"full": ["embeddings", "documents", "metadatas"], "embeddings": ["embeddings"], "ids": []}
        body = {
            "query_embeddings": queries_BD[rows].tolist(),
            "n_results": N_DOCS,
            "include": ["distances", *include[cell.content]],
        }
        return to_json(body), {"content-type": JSON_TYPE}

    def read(body: bytes, _: Cell) -> list[list[int]]:
        answer = from_json(body)
        for rows in answer.get("embeddings") or ():
            _array(rows)
        return [list(map(int, ids)) for ids in answer["ids"]]

    path = f"/api/v2/tenants/default_tenant/databases/default_database/collections/{collection}/query"
    return Dialect(path, write, read)


def txtai_dialect() -> Dialect:
    """Queries go by number: its API takes texts, and the transformation in ``peers/txtai_vectors.py`` looks them up."""

    def write(rows: slice, _: Cell) -> tuple[bytes, dict[str, str]]:
        numbers = [f"query {row}" for row in range(rows.start, rows.stop)]
        return to_json({"queries": numbers, "limit": N_DOCS}), {"content-type": JSON_TYPE}

    def read(body: bytes, _: Cell) -> list[list[int]]:
        return [[int(hit["id"]) for hit in hits] for hits in from_json(body)]

    return Dialect("/batchsearch", write, read)
