"""The generator service's HTTP front door."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from generator_svc.openai import openai_router
from generator_svc.page import PAGE_PATHS, mount_page
from generator_svc.service import GeneratorService
from generator_svc.settings import GeneratorSettings
from generator_svc.streaming import EVENT_STREAM, events_in_openapi, stream_answer
from shared.app import create_base_app, raises, request_deadline, requires
from shared.errors import DeadlineExceeded, NotFound, Overloaded, UpstreamError
from shared.schemas import (
    AnswerRequest,
    AnswerResponse,
    EncodeRequest,
    EncodeResponse,
    ScoreRequest,
    ScoreResponse,
    SearchRequest,
    SearchResponse,
)
from shared.vectors import ARROW_TYPE, response_form, vectors_to_wire

_ON_DEVICE = raises(Overloaded, DeadlineExceeded)
_WITH_RETRIEVER = {**_ON_DEVICE, **raises(NotFound, UpstreamError)}
_EVENTS = events_in_openapi("documents", "token", "answer", "error")
_VECTORS_IN_ARROW = {ARROW_TYPE: {"schema": {"type": "string", "format": "binary"}}}


def create_app(settings: GeneratorSettings) -> FastAPI:
    """The app; entering its lifespan loads the checkpoint."""
    service = GeneratorService(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start(app.state.registry, app.state.door)
        try:
            yield
        finally:
            await service.stop()

    app = create_base_app(
        settings,
        service="generator",
        lifespan=lifespan,
        readiness=service.problems,
        info=service.info,
        open_paths=PAGE_PATHS,
    )
    reads = [Depends(requires("read"))]

    @app.post(
        "/v1/answer",
        tags=["answers"],
        dependencies=reads,
        response_model=AnswerResponse,
        responses={**_WITH_RETRIEVER, 200: {"content": _EVENTS}},
    )
    async def answer(request: AnswerRequest) -> AnswerResponse | StreamingResponse:
        """Answer one question or many from retrieved passages, or from passages of your own."""
        deadline = request_deadline(request.timeout_ms, settings)
        if not request.stream:
            return await service.pipeline.answer(request, deadline)
        events = await stream_answer(service.pipeline, request, deadline)
        return StreamingResponse(events, media_type=EVENT_STREAM, headers={"Cache-Control": "no-store"})

    @app.post("/v1/score", tags=["answers"], dependencies=reads, responses=_WITH_RETRIEVER)
    async def score(request: ScoreRequest) -> ScoreResponse:
        """log p(y|x) of given answers, and what each says about the documents."""
        return await service.pipeline.score(request, request_deadline(request.timeout_ms, settings))

    @app.post("/v1/search", tags=["retrieval"], dependencies=reads, responses=_WITH_RETRIEVER)
    async def search(request: SearchRequest) -> SearchResponse:
        """Text in, ranked passages out; nothing is generated."""
        return await service.pipeline.search(request, request_deadline(request.timeout_ms, settings))

    @app.post(
        "/v1/encode",
        tags=["retrieval"],
        dependencies=reads,
        response_model=EncodeResponse,
        responses={**_ON_DEVICE, 200: {"content": _VECTORS_IN_ARROW}},
    )
    async def encode(request: EncodeRequest, http: Request) -> Response:
        """Question vectors: as JSON lists, as base64 (`Accept: application/json;vectors=base64`), or as Arrow."""
        form = response_form(http.headers.get("accept"))
        encoded = await service.pipeline.encode(request, request_deadline(request.timeout_ms, settings))
        model = service.stages.checkpoint
        metadata = {
            "model": model.name,
            "encoder": model.encoder,
            "dimension": encoded.vectors.shape[1],
            "timings_ms": encoded.timings_ms,
        }
        body, content_type = vectors_to_wire(encoded.vectors, metadata, form)
        return Response(body, media_type=content_type)

    app.include_router(openai_router(service, settings))
    mount_page(app)
    return app
