"""A retriever service of a few lines: exact search by numpy over passages in memory, with faults on demand."""

from collections.abc import Awaitable, Callable

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from shared.errors import NotFound, RagError, error_to_wire
from shared.retrieval import Float32Array, RetrieveQuery, RetrieveResult
from shared.schemas import CollectionInfo, IndexInfo, Passage, SearchParams
from shared.vectors import query_from_wire, response_form, result_to_wire

Fault = Callable[[RetrieveQuery], Awaitable[Response | None]]


class SmallRetriever:
    """`fault`, where set, is asked first and may answer in the retriever's place; `requests` records what came in."""

    def __init__(self, embeddings: Float32Array, encoder: str, collection: str = "default") -> None:
        self.embeddings = embeddings
        self.passages = [Passage(id=10 + i, title=f"T{i}", text=f"passage {i}") for i in range(len(embeddings))]
        self.index = IndexInfo(collection=collection, generation="g1", encoder=encoder)
        self.fault: Fault | None = None
        self.not_ready: list[str] = []
        self.requests: list[tuple[Request, RetrieveQuery]] = []
        self.n_found: list[int] | None = None  # shorter lists than asked for, one number a query
        self.app = Starlette(
            routes=[
                Route("/readyz", self._readyz),
                Route("/v1/collections/{name}", self._collection),
                Route("/v1/retrieve", self._retrieve, methods=["POST"]),
            ]
        )

    def search(self, query: RetrieveQuery) -> RetrieveResult:
        scores_BN = query.vectors @ self.embeddings.T
        best = [np.argsort(-scores)[: query.n_docs] for scores in scores_BN]
        if self.n_found is not None:
            best = [rows[:n] for rows, n in zip(best, self.n_found, strict=True)]
        return RetrieveResult(
            doc_ids=[np.array([self.passages[i].id for i in rows], dtype=np.int64) for rows in best],
            doc_scores=[scores[rows] for scores, rows in zip(scores_BN, best, strict=True)],
            doc_embeds=[self.embeddings[rows] for rows in best],
            docs=[[self.passages[i] for i in rows] for rows in best],
            index=self.index,
            timings_ms={"search": 1.0},
        )

    async def _retrieve(self, request: Request) -> Response:
        query = query_from_wire(await request.body(), request.headers.get("content-type"))
        self.requests.append((request, query))
        if self.fault is not None and (answer := await self.fault(query)) is not None:
            return answer
        if query.collection != self.index.collection:
            return error(NotFound(f"there is no collection `{query.collection}`", param="collection"))
        body, content_type = result_to_wire(self.search(query), response_form(request.headers.get("accept")))
        return Response(body, media_type=content_type)

    async def _readyz(self, request: Request) -> Response:
        return JSONResponse({"status": "", "reasons": self.not_ready}, 503 if self.not_ready else 200)

    async def _collection(self, request: Request) -> Response:
        if request.path_params["name"] != self.index.collection:
            return error(NotFound("no such collection", param="collection"))
        info = CollectionInfo(
            name=self.index.collection,
            generation=self.index.generation,
            encoder=self.index.encoder,
            kind="flat",
            factory="Flat",
            search_params=SearchParams(),
            version=0,
            metric="inner_product",
            dimension=self.embeddings.shape[1],
            count=len(self.embeddings),
            dtype="float32",
            device="cpu",
            created_at="2026-01-01T00:00:00Z",
        )
        return JSONResponse(info.model_dump())


def error(raised: RagError) -> Response:
    return JSONResponse(error_to_wire(raised), raised.status)
