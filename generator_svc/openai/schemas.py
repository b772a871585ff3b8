"""What is taken and given in OpenAI's shapes (https://platform.openai.com/docs/api-reference), and in ``rag``."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from generator_svc.openai.fields import UNSUPPORTED, Only
from shared.schemas import (
    FILTER,
    AnswerToken,
    CollectionName,
    Document,
    EarlyStopping,
    Filter,
    IndexInfo,
    NonNegative,
    OwnPassage,
    Positive,
    Question,
    RepetitionPenalty,
    Request,
    SearchParams,
    Sent,
    Strategy,
    Wire,
)
from shared.validation import disagreement

_NO_TOOLS = "answers are made from passages, nothing is called"
_TEXT_ONLY = "text is read and written, nothing else"
_NO_PENALTIES = "the engine knows no such rule; `rag.repetition_penalty` and `rag.no_repeat_ngram_size` are honoured"
_NOTHING_KEPT = "nothing is kept of a request"
_NO_CACHE = "there is no prompt cache"
_NO_REASONING = "the model writes the answer and nothing before it"

Nothing = Annotated[Any, Only(because=_NO_TOOLS)]


def _no_tokens(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], (int, list)):
        raise PydanticCustomError(
            UNSUPPORTED,
            "arrays of token ids cannot be read: they belong to the tokenizers of OpenAI's models; send the text",
        )
    return value


# --- chat --------------------------------------------------------------------------------------------------


class TextPart(Sent):
    type: Literal["text"]
    text: str


class Message(Sent):
    """The last one by the user is the question. The others are taken and not read."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=256, fail_fast=True)] | None = None
    name: str | None = None
    refusal: str | None = Field(default=None, description="Of an answer that a client sends back.")
    annotations: Annotated[Any, Only([], because=_TEXT_ONLY)] = None
    audio: Annotated[Any, Only(because=_TEXT_ONLY)] = None
    tool_calls: Annotated[Any, Only([], because=_NO_TOOLS)] = None
    function_call: Annotated[Any, Only(because=_NO_TOOLS)] = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class RagOptions(Request):
    """Options of `POST /v1/answer` that OpenAI's request has no field for; they mean the same."""

    strategy: Strategy | None = None
    n_docs: Positive | None = None
    collection: CollectionName = "default"
    filter: Filter | None = Field(default=None, description=FILTER)
    search_params: SearchParams | None = None
    passages: list[OwnPassage] | None = Field(default=None, min_length=1, fail_fast=True)
    num_beams: Positive | None = Field(default=None, description="Default: `n`.")
    min_new_tokens: NonNegative = 0
    length_penalty: float = Field(default=1.0, ge=-10, le=10)
    early_stopping: EarlyStopping | None = None
    repetition_penalty: RepetitionPenalty | None = None
    no_repeat_ngram_size: NonNegative = 0
    top_k: NonNegative = 0
    deduplicate: bool = True
    decoding: Literal["thorough", "fast"] = "thorough"
    provenance: Literal["none", "answer", "token"] = "answer"
    min_probability: float = Field(
        default=0.0, ge=0, le=1, description="Less probable answers are withheld; if none is left, `refusal` says so."
    )


class StreamOptions(Sent):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Only(False, because="chunks are sent as they are")] = None


class ChatRequest(Sent):
    """`POST /v1/chat/completions`."""

    model: str = Field(description="As `GET /v1/models` names it.")
    messages: list[Message] = Field(min_length=1, max_length=2048, fail_fast=True)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Positive | None = Field(default=None, description="Answers. Without sampling they are the best that beams find.")
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="Above 0: answers are drawn. Default: the most probable one is searched."
    )
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_completion_tokens: Positive | None = None
    max_tokens: Positive | None = Field(default=None, description="The older name of `max_completion_tokens`.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    logprobs: bool | None = Field(default=None, description="Of each token: its share of log p(y|x).")
    user: str | None = Field(default=None, description="Taken; nothing depends on it.")
    safety_identifier: str | None = Field(default=None, description="Taken; nothing depends on it.")
    rag: RagOptions | None = None

    top_logprobs: Annotated[Any, Only(0, because="the engine keeps no alternatives to the tokens it chose")] = None
    stop: Annotated[Any, Only([], because="an answer ends where the model ends it, or at max_tokens")] = None
    frequency_penalty: Annotated[Any, Only(0, because=_NO_PENALTIES)] = None
    presence_penalty: Annotated[Any, Only(0, because=_NO_PENALTIES)] = None
    logit_bias: Annotated[Any, Only({}, because=_NO_PENALTIES)] = None
    tools: Annotated[Any, Only([], because=_NO_TOOLS)] = None
    tool_choice: Annotated[Any, Only("none", "auto", because=_NO_TOOLS)] = None
    parallel_tool_calls: Annotated[Any, Only(True, False, because=_NO_TOOLS)] = None
    functions: Annotated[Any, Only([], because=_NO_TOOLS)] = None
    function_call: Annotated[Any, Only("none", "auto", because=_NO_TOOLS)] = None
    web_search_options: Annotated[Any, Only(because="passages come from the collections of the retriever")] = None
    response_format: Annotated[Any, Only({"type": "text"}, because="answers are plain text")] = None
    modalities: Annotated[Any, Only(["text"], because=_TEXT_ONLY)] = None
    audio: Annotated[Any, Only(because=_TEXT_ONLY)] = None
    prediction: Annotated[Any, Only(because="nothing is drafted; `/v1/score` gives the probability of your text")] = (
        None
    )
    reasoning_effort: Annotated[Any, Only("none", because=_NO_REASONING)] = None
    verbosity: Annotated[Any, Only(because=_NO_REASONING)] = None
    moderation: Annotated[Any, Only(because="there is no moderation")] = None
    store: Annotated[Any, Only(False, because=_NOTHING_KEPT)] = None
    metadata: Annotated[Any, Only({}, because=_NOTHING_KEPT)] = None
    service_tier: Annotated[Any, Only("auto", "default", because="there is one tier")] = None
    prompt_cache_key: Annotated[Any, Only(because=_NO_CACHE)] = None
    prompt_cache_options: Annotated[Any, Only(because=_NO_CACHE)] = None
    prompt_cache_retention: Annotated[Any, Only(because=_NO_CACHE)] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if not any(message.role == "user" for message in self.messages):
            raise disagreement("messages", "messages hold none by the user: the last one by the user is the question")
        if self.stream_options is not None and not self.stream:
            raise disagreement("stream_options", "stream_options go with stream=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise disagreement("max_tokens", "max_tokens and max_completion_tokens differ; give one of them")
        return self


class TokenLogprob(Wire):
    token: str
    logprob: float
    bytes: list[int] | None = Field(description="UTF-8; null for a part of a character.")
    top_logprobs: list[Any] = Field(default_factory=list)


class ChoiceLogprobs(Wire):
    content: list[TokenLogprob]
    refusal: None = None


class Citation(Document):
    posterior: float | None = Field(description="p(z|x,y): this document's share of the answer's probability.")


class ChoiceEvidence(Wire):
    """What the answer rests on. The documents in the order of their scores."""

    log_prob: float | None = Field(description="log p(y|x); null where the answer was withheld.")
    probability: float | None
    documents: list[Citation]
    tokens: list[AnswerToken] | None = None


class AnswerMessage(Wire):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = Field(default=None, description="Where every answer was less probable than asked for.")


FinishReason = Literal["stop", "length"]


class Choice(Wire):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    rag: ChoiceEvidence


class Usage(Wire):
    prompt_tokens: int = Field(description="What the generator read: the question beside every document.")
    completion_tokens: int = Field(description="What it wrote into the choices, the token that ends each included.")
    total_tokens: int


class CompletionDetails(Wire):
    strategy: Strategy
    index: IndexInfo | None
    messages_not_read: int = Field(description="Messages besides the question.")
    timings_ms: dict[str, float]


class ChatCompletion(Wire):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    rag: CompletionDetails


# --- embeddings and models ---------------------------------------------------------------------------------


class EmbeddingRequest(Sent):
    """`POST /v1/embeddings`: vectors of questions, as the index is searched with. Passages have another encoder."""

    model: str = Field(description="As `GET /v1/models` names it.")
    input: Annotated[
        Question | Annotated[list[Question], Field(min_length=1, fail_fast=True)], BeforeValidator(_no_tokens)
    ]
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="base64: of little-endian float32."
    )
    dimensions: Positive | None = Field(default=None, description="Refused unless it is the encoder's own.")
    user: str | None = Field(default=None, description="Taken; nothing depends on it.")


class Embedding(Wire):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Wire):
    prompt_tokens: int
    total_tokens: int


class EncoderDetails(Wire):
    encoder: str = Field(description="Fingerprint of the question encoder.")
    dimension: int


class EmbeddingList(Wire):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    rag: EncoderDetails


class ModelDetails(EncoderDetails):
    strategies: list[Strategy]
    n_docs: int = Field(description="Documents a question, unless `rag.n_docs` says otherwise.")


class Model(Wire):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When this service loaded it.")
    owned_by: str = "rag-services"
    rag: ModelDetails


class ModelList(Wire):
    object: Literal["list"] = "list"
    data: list[Model]
