"""An answer while it is made: followed step by step, and as server-sent events.

    event: documents   {"documents": [...]}         what the question is answered from
    event: token       {"text": "..."}              the next piece of text, where it is certain as it is written
    event: answer      the whole AnswerResponse
    event: error       the error form of every response

The last event is ``answer`` or ``error``. What goes wrong before the first event is an ordinary error response.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

import structlog

from generator_svc.pipeline import Pipeline
from shared.deadline import Deadline
from shared.errors import InferenceError, RagError, error_to_wire
from shared.logs import current_request_id
from shared.schemas import AnswerRequest, AnswerResponse, Document

EVENT_STREAM = "text/event-stream"

log = structlog.get_logger(__name__)


def events_in_openapi(*names: str) -> dict[str, Any]:
    """The content of a response that is a stream: the schema is that of each event, as it is before OpenAPI 3.2.

    ``names``: of the events; none where they carry data alone.
    """
    data = {"data": {"type": "string", "description": "JSON, or the mark of the end"}}
    name = {"event": {"type": "string", "enum": [*names]}} if names else {}
    properties = {**name, **data}
    return {EVENT_STREAM: {"schema": {"type": "object", "properties": properties, "required": [*properties]}}}


@dataclass(frozen=True)
class Found:
    """The documents that an answer is made from; the generator reads them in ``context_tokens`` tokens."""

    documents: Sequence[Document]
    context_tokens: int


@dataclass(frozen=True)
class Piece:
    """The next piece of the answer's text."""

    text: str


Step = Found | Piece | AnswerResponse


class _Steps:
    """Collects steps on the event loop; the end is None."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Step | None] = asyncio.Queue()

    def documents(self, documents: Sequence[Document], context_tokens: int) -> None:
        self.queue.put_nowait(Found(documents, context_tokens))

    def text(self, piece: str) -> None:
        with suppress(RuntimeError):  # the loop is closed, and with it everyone who listened
            self._loop.call_soon_threadsafe(self.queue.put_nowait, Piece(piece))


async def follow(pipeline: Pipeline, request: AnswerRequest, deadline: Deadline) -> AsyncGenerator[Step]:
    """One answer in the making: `Found`, any number of `Piece`, the response. It is cancelled with its iterator.

    Raises:
        RagError: what the pipeline raises, after the steps that went well.
    """
    steps = _Steps()
    answer = asyncio.create_task(pipeline.answer(request, deadline, steps))
    answer.add_done_callback(lambda _: steps.queue.put_nowait(None))
    try:
        while (step := await steps.queue.get()) is not None:
            yield step
        yield await answer
    finally:
        answer.cancel()


async def begun(events: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """The same events, the first of them made already: what it raises, is raised before the response begins."""
    first = await anext(events)

    # `events` has begun, so that its `finally` runs even where nobody ever reads this one.
    async def all_events() -> AsyncGenerator[bytes]:
        async with aclosing(events):
            yield first
            async for event in events:
                yield event

    return all_events()


def failure_on_stream(error: Exception) -> dict[str, object]:
    """The error form, for a response whose head is out."""
    if not isinstance(error, RagError):
        log.error("stream_failed", exc_info=error)
        error = InferenceError("the computation failed; the log has the trace")
    return error_to_wire(error, current_request_id())


async def stream_answer(pipeline: Pipeline, request: AnswerRequest, deadline: Deadline) -> AsyncIterator[bytes]:
    """The events of one answer, the first of them made already. The answer is cancelled with its iterator.

    Raises:
        RagError: what went wrong before the first event.
    """
    return await begun(_events(pipeline, request, deadline))


async def _events(pipeline: Pipeline, request: AnswerRequest, deadline: Deadline) -> AsyncGenerator[bytes]:
    sent = False
    async with aclosing(follow(pipeline, request, deadline)) as steps:
        try:
            async for step in steps:
                yield _event(step)
                sent = True
        except Exception as error:
            if not sent:
                raise
            yield _encoded("error", json.dumps(failure_on_stream(error)))


def _event(step: Step) -> bytes:
    match step:
        case Found(documents=documents):
            return _encoded("documents", json.dumps({"documents": [document.model_dump() for document in documents]}))
        case Piece(text=text):
            return _encoded("token", json.dumps({"text": text}))
        case AnswerResponse():
            return _encoded("answer", step.model_dump_json())


def _encoded(event: str, data: str) -> bytes:
    return f"event: {event}\ndata: {data}\n\n".encode()
