"""A chat completion as a question, and its answer as a chat completion."""

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from generator_svc.checkpoint import Checkpoint
from generator_svc.limits import most_new_tokens
from generator_svc.openai.errors import Renamed
from generator_svc.openai.schemas import (
    AnswerMessage,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChoiceEvidence,
    ChoiceLogprobs,
    Citation,
    CompletionDetails,
    FinishReason,
    RagOptions,
    TokenLogprob,
    Usage,
)
from generator_svc.pipeline import Pipeline
from generator_svc.settings import GeneratorSettings
from generator_svc.streaming import Found, follow
from shared.deadline import Deadline
from shared.errors import RequestError
from shared.logs import current_request_id
from shared.schemas import Answer, AnswerRequest, AnswerResponse, AnswerToken, Document

I_DO_NOT_KNOW = "I do not know: no answer is probable enough."
_NOT_OF_ANSWERS = {"timeout_ms", "provenance", "num_beams", "top_k"}


@dataclass(frozen=True)
class Limits:
    """How an answer ends: at one of ``eos`` (names of tokens), or after ``most_tokens``, ``forced`` ones included."""

    eos: frozenset[str]
    most_tokens: int
    forced: int
    eos_is_forced: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint, settings: GeneratorSettings) -> "Limits":
        tokenizer = checkpoint.generator_tokenizer
        return cls(
            eos=frozenset(str(tokenizer.convert_ids_to_tokens(token)) for token in checkpoint.eos_token_ids),
            most_tokens=most_new_tokens(settings, checkpoint),
            forced=int(checkpoint.forced_bos_token_id is not None),
            eos_is_forced=checkpoint.generation_defaults.forced_eos_token_id is not None,
        )

    def finish_reason(self, tokens: Sequence[AnswerToken], most_tokens: int) -> FinishReason:
        """Where the checkpoint forces an end token at the limit, nobody knows whether the model wanted it there."""
        at_limit = len(tokens) + self.forced >= min(most_tokens, self.most_tokens)
        ended = bool(tokens) and tokens[-1].text in self.eos
        return "stop" if ended and not (at_limit and self.eos_is_forced) else "length"


@dataclass(frozen=True)
class Chat:
    """A request, read."""

    asked: ChatRequest
    question: AnswerRequest
    id: str = field(default_factory=lambda: f"chatcmpl-{current_request_id()}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def options(self) -> RagOptions:
        return self.asked.rag or RagOptions()

    @property
    def names(self) -> Renamed:
        """What the fields of the question are called in the chat request."""
        return _names(self.asked)

    def details(self, response: AnswerResponse) -> CompletionDetails:
        return CompletionDetails(
            strategy=response.strategy,
            index=response.index,
            messages_not_read=len(self.asked.messages) - 1,
            timings_ms=response.timings_ms,
        )


def read_chat(asked: ChatRequest) -> Chat:
    """Raises: RequestError: options that do not go together, or values that no question has."""
    options = asked.rag or RagOptions()
    n = asked.n or 1
    values: dict[str, Any] = options.model_dump(exclude_unset=True, exclude=_NOT_OF_ANSWERS)
    if options.passages is not None:
        values["passages"] = options.passages
    values |= {"question": next(m.text for m in reversed(asked.messages) if m.role == "user"), "provenance": "token"}
    values["num_return_sequences"] = n
    if (most := asked.max_completion_tokens or asked.max_tokens) is not None:
        values["max_new_tokens"] = most
    if _draws(asked, options):
        if (options.num_beams or 1) > 1:
            raise RequestError("rag.num_beams above 1 searches; it does not go with sampling", param="rag.num_beams")
        values |= {"do_sample": True, "top_k": options.top_k}
        drawn = {"temperature": asked.temperature, "top_p": asked.top_p}
        values |= {name: value for name, value in drawn.items() if value is not None}
        if asked.seed is not None:
            values["seed"] = asked.seed % 2**63
    else:
        if options.top_k:
            raise RequestError("rag.top_k has an effect only with a temperature above 0", param="rag.top_k")
        values["num_beams"] = max(options.num_beams or 1, n)
    with _names(asked):
        return Chat(asked, AnswerRequest.model_validate(values))


def _draws(asked: ChatRequest, options: RagOptions) -> bool:
    """Nothing is drawn unless it is asked for: an answer from passages is the most probable one."""
    if asked.temperature is not None:
        return asked.temperature > 0
    return asked.top_p not in (None, 1.0) or options.top_k > 0


def _names(asked: ChatRequest) -> Renamed:
    most = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    ours = {name: f"rag.{name}" for name in RagOptions.model_fields}
    if asked.rag is None or (asked.rag.num_beams or 0) < (asked.n or 1):
        ours["num_beams"] = "n"  # which they follow from
    return Renamed({**ours, "question": "messages", "num_return_sequences": "n", "max_new_tokens": most})


async def complete(pipeline: Pipeline, chat: Chat, limits: Limits, deadline: Deadline) -> ChatCompletion:
    """Raises: RagError."""
    with chat.names:
        async with aclosing(follow(pipeline, chat.question, deadline)) as steps:
            async for step in steps:
                if isinstance(step, Found):
                    context_tokens = step.context_tokens
                elif isinstance(step, AnswerResponse):
                    response = step
    return ChatCompletion(
        id=chat.id,
        created=chat.created,
        model=response.model,
        choices=choices_of(response, chat, limits),
        usage=usage_of(response, context_tokens),
        rag=chat.details(response),
    )


def choices_of(response: AnswerResponse, chat: Chat, limits: Limits) -> list[Choice]:
    """One an answer; where all were withheld, one that says so."""
    [result] = response.results
    if result.abstained:
        evidence = ChoiceEvidence(log_prob=None, probability=None, documents=_cited(result.documents, None))
        refusal = AnswerMessage(content=None, refusal=I_DO_NOT_KNOW)
        return [Choice(index=0, message=refusal, logprobs=None, finish_reason="stop", rag=evidence)]
    return [
        Choice(
            index=index,
            message=AnswerMessage(content=answer.text),
            logprobs=_logprobs(answer, limits) if chat.asked.logprobs else None,
            finish_reason=limits.finish_reason(answer.tokens or [], chat.question.max_new_tokens),
            rag=_evidence(answer, result.documents, chat.options),
        )
        for index, answer in enumerate(result.answers)
    ]


def usage_of(response: AnswerResponse, context_tokens: int) -> Usage:
    written = sum(len(answer.tokens or []) for answer in response.results[0].answers)
    return Usage(prompt_tokens=context_tokens, completion_tokens=written, total_tokens=context_tokens + written)


def _evidence(answer: Answer, documents: Sequence[Document], options: RagOptions) -> ChoiceEvidence:
    return ChoiceEvidence(
        log_prob=answer.log_prob,
        probability=answer.probability,
        documents=_cited(documents, None if options.provenance == "none" else answer.doc_posterior),
        tokens=answer.tokens if options.provenance == "token" else None,
    )


def _cited(documents: Sequence[Document], posterior: Sequence[float] | None) -> list[Citation]:
    shares = [None] * len(documents) if posterior is None else posterior
    return [
        Citation(**document.model_dump(), posterior=share) for document, share in zip(documents, shares, strict=True)
    ]


def _logprobs(answer: Answer, limits: Limits) -> ChoiceLogprobs:
    """Of the tokens of the text; the one that ends it has its share, too, which `rag.log_prob` holds."""
    return ChoiceLogprobs(
        content=[
            TokenLogprob(token=token.text, logprob=token.log_prob, bytes=_bytes(token.text))
            for token in answer.tokens or []
            if token.text not in limits.eos
        ]
    )


def _bytes(text: str) -> list[int] | None:
    return None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
