"""An answer as server-sent events, while it is made.

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

import structlog

from generator_svc.pipeline import Pipeline
from shared.deadline import Deadline
from shared.errors import InferenceError, RagError, error_to_wire
from shared.logs import current_request_id
from shared.schemas import AnswerRequest, AnswerResponse, Document

EVENT_STREAM = "text/event-stream"

log = structlog.get_logger(__name__)


class _Events:
    """Collects events on the event loop; the end is None."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue()

    def documents(self, documents: Sequence[Document]) -> None:
        self.put("documents", json.dumps({"documents": [document.model_dump() for document in documents]}))

    def text(self, piece: str) -> None:
        with suppress(RuntimeError):  # the loop is closed, and with it everyone who listened
            self._loop.call_soon_threadsafe(self.put, "token", json.dumps({"text": piece}))

    def put(self, event: str, data: str) -> None:
        self.queue.put_nowait(f"event: {event}\ndata: {data}\n\n".encode())


async def stream_answer(pipeline: Pipeline, request: AnswerRequest, deadline: Deadline) -> AsyncIterator[bytes]:
    """The events of one answer, the first of them made already. The answer is cancelled with its iterator.

    Raises:
        RagError: what went wrong before the first event.
    """
    events = _events(pipeline, request, deadline)
    first = await anext(events)

    # `events` has begun, so that its `finally` runs even where nobody ever reads this one.
    async def all_events() -> AsyncGenerator[bytes]:
        async with aclosing(events):
            yield first
            async for event in events:
                yield event

    return all_events()


async def _events(pipeline: Pipeline, request: AnswerRequest, deadline: Deadline) -> AsyncGenerator[bytes]:
    events = _Events()
    answer = asyncio.create_task(pipeline.answer(request, deadline, events))
    answer.add_done_callback(lambda _: events.queue.put_nowait(None))
    try:
        event = await events.queue.get()
        if event is None:
            await answer  # raises: no event was sent, so there is no answer
        while event is not None:
            yield event
            event = await events.queue.get()
        yield _last(answer)
    finally:
        answer.cancel()


def _last(answer: "asyncio.Task[AnswerResponse]") -> bytes:
    try:
        event, data = "answer", answer.result().model_dump_json()
    except RagError as error:
        event, data = "error", json.dumps(error_to_wire(error, current_request_id()))
    except Exception:
        log.exception("stream_failed")
        failure = InferenceError("the computation failed; the log has the trace")
        event, data = "error", json.dumps(error_to_wire(failure, current_request_id()))
    return f"event: {event}\ndata: {data}\n\n".encode()
