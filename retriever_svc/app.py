"""The HTTP service: routes, and nothing that a route does not need."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi import Path as PathParameter
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.responses import Response

from retriever_svc.changes import Delete
from retriever_svc.retriever import Retriever
from retriever_svc.settings import RetrieverSettings
from retriever_svc.upserts import draft_from_wire
from retriever_svc.versions import library_versions
from shared.app import create_base_app, raises, request_deadline, requires
from shared.errors import (
    Conflict,
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
    Aliases,
    AliasRequest,
    BuildRequest,
    CollectionInfo,
    CollectionList,
    CollectionName,
    DeleteRequest,
    GenerationInfo,
    GenerationList,
    Job,
    NewCollection,
    Passage,
    RetrieveRequest,
    RetrieveResponse,
    RollbackRequest,
    ServiceInfo,
    UpsertRequest,
    Written,
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
    "retrieved_doc_embeds list<fixed_size_list<float32>[D]>, docs list<struct<id, title, text>> (where the collection "
    "has metadata: and metadata, a string of JSON); `index` and `timings_ms` as JSON in the schema metadata."
)

ARROW_UPSERT = (
    "Arrow IPC stream, one row a passage: text string, embedding fixed_size_list<float32 or float16>[D], and where "
    "wanted id int64, title string, and the collection's metadata columns."
)

PassageId = Annotated[int, PathParameter(ge=0, le=INT64_MAX)]

router = APIRouter(tags=["retrieval"])


class _PlainRoute(APIRoute):
    """Hands the request to the endpoint. What FastAPI does for each request instead (dependencies, exit stacks, a body
    to validate), an endpoint that reads the body itself has no use for; a search waits for it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


searching = APIRouter(tags=["retrieval"], route_class=_PlainRoute)


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

    def warnings() -> list[str]:
        return retriever.warnings()

    app = create_base_app(
        settings, service="retriever", lifespan=lifespan, readiness=readiness, info=info, warnings=warnings
    )
    retriever = Retriever(settings, app.state.registry)
    app.state.retriever = retriever
    app.include_router(searching)
    app.include_router(router)
    return app


async def _retriever(request: Request) -> Retriever:  # not async, it would run in a thread: a hop for each request
    retriever: Retriever = request.app.state.retriever
    return retriever


TheRetriever = Annotated[Retriever, Depends(_retriever)]


def _request_body(model: type[BaseModel], arrow: str) -> dict[str, Any]:
    """What FastAPI cannot see: the route reads the body itself, in the form that its Content-Type names."""
    schema = model.model_json_schema()
    schema = _inlined(schema, schema.pop("$defs", {}))
    return {"required": True, "content": {JSON_TYPE: {"schema": schema}, ARROW_TYPE: {"schema": _binary(arrow)}}}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inlined(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inlined(part, definitions) for name, part in schema.items()}


def _binary(description: str) -> dict[str, str]:
    return {"type": "string", "format": "binary", "description": description}


@searching.post(
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
    openapi_extra={"requestBody": _request_body(RetrieveRequest, ARROW_REQUEST)},
)
async def retrieve(request: Request) -> Response:
    """The documents nearest to each query vector, by inner product; equal scores in ascending id.

    With `Accept: application/json;vectors=base64` the embeddings come as base64; with Arrow's media type everything
    comes as an Arrow IPC stream.
    """
    retriever: Retriever = request.app.state.retriever
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
    return CollectionList(collections=[retriever.info(collection) for collection in retriever.collections.values()])


@router.get("/v1/collections/{collection}", responses=raises(NotFound, Unavailable))
async def get_collection(collection: CollectionName, retriever: TheRetriever) -> CollectionInfo:
    """What a collection holds, and which generation of it serves."""
    return retriever.info(retriever.collection(collection))


@router.get("/v1/collections/{collection}/passages/{passage_id:int}", responses=raises(NotFound, Unavailable))
async def get_passage(
    collection: CollectionName,
    passage_id: PassageId,
    retriever: TheRetriever,
) -> Passage:
    """One passage, by its id."""
    return await asyncio.to_thread(retriever.collection(collection).passage, passage_id)


WRITING = [Depends(requires("admin"))]
WRITE_ERRORS = raises(RequestError, NotFound, Conflict, UnsupportedMediaType, InvalidRequest, Unavailable)


@router.post("/v1/collections", status_code=201, dependencies=WRITING, responses=WRITE_ERRORS)
async def create_collection(request: NewCollection, retriever: TheRetriever) -> CollectionInfo:
    """Make a collection without passages, for an encoder and a kind of index. Answered once it is on the disk.

    Until the first generation is built, what is stored in it is searched exactly.
    """
    return retriever.info(await retriever.create(request))


@router.delete("/v1/collections/{collection}", status_code=204, dependencies=WRITING, responses=WRITE_ERRORS)
async def drop_collection(
    collection: CollectionName,
    retriever: TheRetriever,
    remove_aliases: Annotated[bool, Query(description="Remove the aliases that stand for it, too.")] = False,
) -> None:
    """Remove a collection with all its passages and generations, for good. Refused while an alias stands for it."""
    await retriever.drop(collection, remove_aliases=remove_aliases)


@router.post(
    "/v1/collections/{collection}/passages",
    dependencies=WRITING,
    responses=WRITE_ERRORS,
    openapi_extra={"requestBody": _request_body(UpsertRequest, ARROW_UPSERT)},
)
async def upsert_passages(collection: CollectionName, request: Request, retriever: TheRetriever) -> Written:
    """Store passages, or replace those whose ids are there. Answered once they are on the disk and searches see them.

    All passages of a request are stored, or none.
    """
    writer = retriever.writer(collection)
    body = await request.body()
    content_type = request.headers.get("content-type", "")
    draft = await asyncio.to_thread(draft_from_wire, body, content_type, writer.collection)
    return await writer.write(draft)


@router.post("/v1/collections/{collection}/passages/delete", dependencies=WRITING, responses=WRITE_ERRORS)
async def delete_passages(collection: CollectionName, request: DeleteRequest, retriever: TheRetriever) -> Written:
    """Delete passages by id; ids that are not there are no error, `gone` counts those that were."""
    return await retriever.writer(collection).write(Delete(np.array(request.ids, np.int64)))


@router.delete("/v1/collections/{collection}/passages/{passage_id:int}", dependencies=WRITING, responses=WRITE_ERRORS)
async def delete_passage(collection: CollectionName, passage_id: PassageId, retriever: TheRetriever) -> Written:
    """Delete one passage."""
    written = await retriever.writer(collection).write(Delete(np.array([passage_id], np.int64)))
    if not written.gone:
        raise NotFound(f"collection `{collection}` has no passage {passage_id}", param="passage_id")
    return written


@router.get("/v1/collections/{collection}/generations", responses=raises(NotFound, Unavailable))
async def list_generations(collection: CollectionName, retriever: TheRetriever) -> GenerationList:
    """The builds that are on the disk, newest first."""
    writer = retriever.writer(collection)
    found = await asyncio.to_thread(writer.generations)
    return GenerationList(
        generations=[
            GenerationInfo(
                generation=name,
                current=name == writer.collection.generation,
                kind=manifest.kind,
                count=manifest.count,
                encoder=manifest.encoder,
                created_at=manifest.created_at,
            )
            for name, manifest in found
        ]
    )


@router.post("/v1/collections/{collection}/generations", status_code=202, dependencies=WRITING, responses=WRITE_ERRORS)
async def build_generation(collection: CollectionName, request: BuildRequest, retriever: TheRetriever) -> Job:
    """Build an index of what can be found now, of the same kind or another, and let it take over.

    Goes on in the background: `GET /v1/jobs/{id}` tells how far it is. Searches and writes go on meanwhile.
    """
    return retriever.build(collection, request)


@router.post("/v1/collections/{collection}/rollback", dependencies=WRITING, responses=WRITE_ERRORS)
async def roll_back(collection: CollectionName, request: RollbackRequest, retriever: TheRetriever) -> CollectionInfo:
    """Serve an earlier generation again, with every change that was made to it."""
    writer = retriever.writer(collection)
    await writer.rollback(request.generation)
    return retriever.info(writer.collection)


@router.post("/v1/collections/{collection}/reload", dependencies=WRITING, responses=WRITE_ERRORS)
async def reload_collection(collection: CollectionName, retriever: TheRetriever) -> CollectionInfo:
    """Serve what was built on the disk since the start: a collection that is new, or its newest generation."""
    return retriever.info(await retriever.reload(collection))


@router.get("/v1/jobs/{job_id}", responses=raises(NotFound, Unavailable))
async def get_job(job_id: str, retriever: TheRetriever) -> Job:
    """Work that goes on in the background, or what became of it."""
    return retriever.jobs.get(job_id)


@router.get("/v1/aliases", responses=raises(Unavailable))
async def list_aliases(retriever: TheRetriever) -> Aliases:
    """Other names that collections go by."""
    return Aliases(aliases=retriever.catalog.aliases)


@router.put("/v1/aliases/{alias}", dependencies=WRITING, responses=WRITE_ERRORS)
async def set_alias(alias: CollectionName, request: AliasRequest, retriever: TheRetriever) -> Aliases:
    """Let an alias stand for a collection: requests that begin from now on go there, others end where they began."""
    await retriever.catalog.set_alias(alias, request.collection)
    return Aliases(aliases=retriever.catalog.aliases)


@router.delete("/v1/aliases/{alias}", dependencies=WRITING, responses=WRITE_ERRORS)
async def remove_alias(alias: CollectionName, retriever: TheRetriever) -> Aliases:
    """Let an alias stand for nothing."""
    await retriever.catalog.set_alias(alias, None)
    return Aliases(aliases=retriever.catalog.aliases)


def _info(retriever: Retriever) -> ServiceInfo:
    settings = retriever.settings
    collections = [retriever.info(collection) for collection in retriever.collections.values()]
    return ServiceInfo(
        service="retriever",
        version=VERSION,
        versions=library_versions(),
        device=", ".join(sorted({collection.device for collection in collections})) or "none",
        limits={
            **settings.shared_limits,
            "max_batch_size": settings.max_batch_size,
            "max_batch_vectors": settings.max_batch_vectors,
            "max_n_docs": settings.max_n_docs,
            "max_documents": settings.max_documents,
            "keep_generations": settings.keep_generations,
            "rebuild_after": settings.rebuild_after,
            "canary_fraction": settings.canary_fraction,
            "canary_k": settings.canary_k,
            "canary_window": settings.canary_window,
            "canary_min_recall": settings.canary_min_recall,
        },
        collections=collections,
    )
