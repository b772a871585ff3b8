"""The HTTP service: routes, and nothing that a route does not need."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi import Path as PathParameter
from starlette.responses import Response

from retriever_svc.retriever import Retriever
from retriever_svc.settings import RetrieverSettings
from retriever_svc.versions import library_versions
from shared.app import create_base_app, raises, request_deadline
from shared.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestError,
    Unavailable,
    UnsupportedMediaType,
)
from shared.schemas import (
    INT64_MAX,
    CollectionInfo,
    CollectionList,
    CollectionName,
    Passage,
    RetrieveRequest,
    RetrieveResponse,
    ServiceInfo,
)
from shared.vectors import ARROW_TYPE, JSON_TYPE, query_from_wire, response_form, result_to_wire
from shared.version import VERSION

# Parsing or writing fewer numbers than this takes the event loop less time than the way to a thread and back.
INLINE_NUMBERS = 8192
BYTES_PER_NUMBER = 4

ARROW_REQUEST = (
    "Arrow IPC stream with the column `vector` (fixed_size_list<float32 or float16>[D], one row a query); "
    "the other fields of the JSON body as JSON in the schema metadata under `options`."
)
ARROW_RESPONSE = (
    "Arrow IPC stream, one row a query: doc_ids list<int64>, doc_scores list<float32>, "
    "retrieved_doc_embeds list<fixed_size_list<float32>[D]>, docs list<struct<id, title, text>>; "
    "`index` and `timings_ms` as JSON in the schema metadata."
)

router = APIRouter(tags=["retrieval"])


def create_app(settings: RetrieverSettings) -> FastAPI:
    """The service; its collections are loaded when its lifespan begins."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await retriever.start()
            yield
        finally:
            await retriever.stop()

    def readiness() -> list[str]:
        return retriever.problems()

    def info() -> ServiceInfo:
        return _info(retriever)

    app = create_base_app(settings, service="retriever", lifespan=lifespan, readiness=readiness, info=info)
    retriever = Retriever(settings, app.state.registry)
    app.state.retriever = retriever
    app.include_router(router)
    return app


def _retriever(request: Request) -> Retriever:
    retriever: Retriever = request.app.state.retriever
    return retriever


TheRetriever = Annotated[Retriever, Depends(_retriever)]


def _request_body() -> dict[str, Any]:
    """What FastAPI cannot see: the route reads the body itself, in the form that its Content-Type names."""
    schema = RetrieveRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    del schema["$defs"]  # the response has the same ones
    return {
        "required": True,
        "content": {JSON_TYPE: {"schema": schema}, ARROW_TYPE: {"schema": _binary(ARROW_REQUEST)}},
    }


def _binary(description: str) -> dict[str, str]:
    return {"type": "string", "format": "binary", "description": description}


@router.post(
    "/v1/retrieve",
    response_model=RetrieveResponse,
    responses={
        200: {
            "content": {ARROW_TYPE: {"schema": {"type": "string", "format": "binary", "description": ARROW_RESPONSE}}}
        },
        **raises(
            RequestError, NotFound, UnsupportedMediaType, InvalidRequest, Overloaded, Unavailable, DeadlineExceeded
        ),
    },
    openapi_extra={"requestBody": _request_body()},
)
async def retrieve(request: Request, retriever: TheRetriever) -> Response:
    """The documents nearest to each query vector, by inner product; equal scores in ascending id.

    With `Accept: application/json;vectors=base64` the embeddings come as base64; with Arrow's media type everything
    comes as an Arrow IPC stream.
    """
    form = response_form(request.headers.get("accept"))
    body = await request.body()
    content_type = request.headers.get("content-type", "")
    if len(body) > INLINE_NUMBERS * BYTES_PER_NUMBER:
        query = await asyncio.to_thread(query_from_wire, body, content_type)
    else:
        query = query_from_wire(body, content_type)
    result = await retriever.retrieve(query, request_deadline(query.timeout_ms, retriever.settings))
    numbers = sum(rows.size for rows in result.doc_embeds) if result.doc_embeds is not None else sum(result.n_found)
    if numbers > INLINE_NUMBERS:
        payload, media_type = await asyncio.to_thread(result_to_wire, result, form)
    else:
        payload, media_type = result_to_wire(result, form)
    return Response(payload, media_type=media_type)


@router.get("/v1/collections")
async def list_collections(retriever: TheRetriever) -> CollectionList:
    """Every collection that is served."""
    return CollectionList(collections=[collection.info for collection in retriever.collections.values()])


@router.get("/v1/collections/{collection}", responses=raises(NotFound, Unavailable))
async def get_collection(collection: CollectionName, retriever: TheRetriever) -> CollectionInfo:
    """What a collection holds, and which generation of it serves."""
    return retriever.collection(collection).info


@router.get("/v1/collections/{collection}/passages/{passage_id}", responses=raises(NotFound, Unavailable))
async def get_passage(
    collection: CollectionName,
    passage_id: Annotated[int, PathParameter(ge=0, le=INT64_MAX)],
    retriever: TheRetriever,
) -> Passage:
    """One passage, by its id."""
    return await asyncio.to_thread(retriever.collection(collection).passage, passage_id)


def _info(retriever: Retriever) -> ServiceInfo:
    settings = retriever.settings
    collections = [collection.info for collection in retriever.collections.values()]
    return ServiceInfo(
        service="retriever",
        version=VERSION,
        versions=library_versions(),
        device=", ".join(sorted({collection.device for collection in collections})) or "none",
        limits={
            "max_body_bytes": settings.max_body_bytes,
            "max_batch_size": settings.max_batch_size,
            "max_batch_vectors": settings.max_batch_vectors,
            "max_n_docs": settings.max_n_docs,
            "max_documents": settings.max_documents,
            "max_queue": settings.max_queue,
            "max_wait_ms": settings.max_wait_ms,
            "default_timeout_ms": settings.default_timeout_ms,
            "max_timeout_ms": settings.max_timeout_ms,
        },
        collections=collections,
    )
