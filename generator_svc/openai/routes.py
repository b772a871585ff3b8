"""The routes of OpenAI's API that this service answers."""

import time

from fastapi import APIRouter, Depends
from fastapi.responses import StreamingResponse

from generator_svc.openai.chat import Limits, complete, read_chat
from generator_svc.openai.chunks import stream_completion
from generator_svc.openai.embeddings import embed
from generator_svc.openai.errors import OpenAIRoute
from generator_svc.openai.schemas import (
    ChatCompletion,
    ChatRequest,
    EmbeddingList,
    EmbeddingRequest,
    EncoderDetails,
    Model,
    ModelDetails,
    ModelList,
)
from generator_svc.service import GeneratorService
from generator_svc.settings import GeneratorSettings
from generator_svc.streaming import EVENT_STREAM, events_in_openapi
from shared.app import raises, request_deadline, requires
from shared.errors import DeadlineExceeded, ModelNotFound, Overloaded, RequestError, UpstreamError

_ON_DEVICE = raises(RequestError, ModelNotFound, Overloaded, DeadlineExceeded)
_EVENTS = events_in_openapi()


def openai_router(service: GeneratorService, settings: GeneratorSettings) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=OpenAIRoute, dependencies=[Depends(requires("read"))])
    created = int(time.time())

    def served(model: str) -> Model:
        """Raises: ModelNotFound."""
        checkpoint = service.stages.checkpoint
        if model != checkpoint.name:
            raise ModelNotFound(f"the model {model!r} is not served here; {checkpoint.name!r} is", param="model")
        details = ModelDetails(
            encoder=checkpoint.encoder,
            dimension=service.stages.encoder.dimension,
            strategies=list(checkpoint.strategies),
            n_docs=checkpoint.config.n_docs,
        )
        return Model(id=model, created=created, rag=details)

    @router.post(
        "/chat/completions",
        response_model=ChatCompletion,
        responses={**_ON_DEVICE, **raises(UpstreamError), 200: {"content": _EVENTS}},
    )
    async def chat_completions(request: ChatRequest) -> ChatCompletion | StreamingResponse:
        """The last user message is the question. Citations, with their shares, stand in each choice's `rag`."""
        model = served(request.model)
        chat = read_chat(request)
        with chat.names:
            deadline = request_deadline(chat.options.timeout_ms, settings)
        limits = Limits.of(service.stages.checkpoint, settings)
        if not request.stream:
            return await complete(service.pipeline, chat, limits, deadline)
        events = await stream_completion(service.pipeline, chat, limits, deadline, model.id)
        return StreamingResponse(events, media_type=EVENT_STREAM, headers={"Cache-Control": "no-store"})

    @router.post("/embeddings", responses=_ON_DEVICE)
    async def embeddings(request: EmbeddingRequest) -> EmbeddingList:
        """Vectors of questions, in the space that the index is searched in."""
        model = served(request.model)
        details = EncoderDetails(encoder=model.rag.encoder, dimension=model.rag.dimension)
        return await embed(service.pipeline, request, details, request_deadline(None, settings))

    @router.get("/models")
    async def models() -> ModelList:
        """What is served: one model, for chat and for embeddings."""
        return ModelList(data=[served(service.stages.checkpoint.name)])

    @router.get("/models/{model:path}", responses=raises(ModelNotFound))
    async def model(model: str) -> Model:
        """The model, if it is the one that is served."""
        return served(model)

    return router
