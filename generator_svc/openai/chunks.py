"""A chat completion as it is written: ``chat.completion.chunk`` events, the last one ``[DONE]``.

1. ``delta.role``, and in ``rag.documents`` what the question is answered from
2. ``delta.content``, piece by piece where the text is certain as it is written (greedy search and sampling with
   RAG-Token), else all at once
3. for each choice ``finish_reason``, its ``logprobs`` where asked for, and in ``rag`` its evidence
4. with ``stream_options.include_usage``: no choice, but ``usage``
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from generator_svc.openai.chat import Chat, Limits, choices_of, usage_of
from generator_svc.pipeline import Pipeline
from generator_svc.streaming import Found, Piece, begun, failure_on_stream, follow
from shared.deadline import Deadline
from shared.schemas import AnswerResponse

_DONE = b"data: [DONE]\n\n"


async def stream_completion(
    pipeline: Pipeline, chat: Chat, limits: Limits, deadline: Deadline, model: str
) -> AsyncIterator[bytes]:
    """The events, the first of them made already.

    Raises:
        RagError: what went wrong before the first event.
    """
    return await begun(_events(pipeline, chat, limits, deadline, model))


async def _events(
    pipeline: Pipeline, chat: Chat, limits: Limits, deadline: Deadline, model: str
) -> AsyncGenerator[bytes]:
    chunks = _Chunks(chat, limits, model)
    sent = False
    try:
        with chat.names:
            async with aclosing(follow(pipeline, chat.question, deadline)) as steps:
                async for step in steps:
                    for chunk in chunks.of(step):
                        yield _encoded(chunk)
                        sent = True
    except Exception as error:
        if not sent:
            raise
        yield _encoded(failure_on_stream(error))
    yield _DONE


class _Chunks:
    def __init__(self, chat: Chat, limits: Limits, model: str) -> None:
        self._chat, self._limits = chat, limits
        with_usage = chat.asked.stream_options is not None and bool(chat.asked.stream_options.include_usage)
        self._with_usage = with_usage
        self._head = {
            "id": chat.id,
            "object": "chat.completion.chunk",
            "created": chat.created,
            "model": model,
            **({"usage": None} if with_usage else {}),
        }
        self._context_tokens = 0
        self._written = ""

    def of(self, step: Found | Piece | AnswerResponse) -> list[dict[str, Any]]:
        match step:
            case Found(documents=documents, context_tokens=tokens):
                self._context_tokens = tokens
                first = self._chunk(0, {"role": "assistant", "content": ""})
                return [{**first, "rag": {"documents": [document.model_dump() for document in documents]}}]
            case Piece(text=text):
                if self._chat.question.min_probability > 0:
                    return []  # it may have to be withheld
                self._written += text
                return [self._chunk(0, {"content": text})]
            case AnswerResponse():
                return self._end(step)

    def _end(self, response: AnswerResponse) -> list[dict[str, Any]]:
        chunks = []
        for choice in choices_of(response, self._chat, self._limits):
            index, message = choice.index, choice.message
            if index > 0:
                chunks.append(self._chunk(index, {"role": "assistant", "content": ""}))
            if message.refusal is not None:
                chunks.append(self._chunk(index, {"refusal": message.refusal}))
            rest = (message.content or "").removeprefix(self._written if index == 0 else "")
            if rest:
                chunks.append(self._chunk(index, {"content": rest}))
            logprobs = None if choice.logprobs is None else choice.logprobs.model_dump()
            last = self._chunk(index, {}, finish_reason=choice.finish_reason, logprobs=logprobs)
            last["choices"][0]["rag"] = choice.rag.model_dump()
            chunks.append(last)
        chunks[-1]["rag"] = self._chat.details(response).model_dump()
        if self._with_usage:
            usage = usage_of(response, self._context_tokens).model_dump()
            chunks.append({**self._head, "choices": [], "usage": usage})
        return chunks

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice]}


def _encoded(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
