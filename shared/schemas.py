"""Every request and response of both services, as JSON.

Shapes: B queries or questions, N documents, D dimension of the embedding space. Unknown fields are refused, so that
an option is either honoured or named in a 422, never ignored. Upper bounds that depend on the machine are settings
of the service; here stand only the bounds that hold everywhere.
"""

from collections.abc import Sized
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

from shared.validation import disagreement

INT64_MAX = 2**63 - 1


def _whole(value: object) -> object:
    """JSON has one kind of number: to a JSON schema ``5.0`` is an integer, and some clients write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# The bound stands before the validator: so it stays a bound of the integer, and shows in the JSON schema.
NonNegative = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Int63 = Annotated[int, Field(ge=0, le=INT64_MAX), BeforeValidator(_whole)]
Milliseconds = Annotated[int, Field(ge=1, le=600_000), BeforeValidator(_whole)]
Question = Annotated[str, StringConstraints(min_length=1, max_length=8192, pattern=r"\S")]
CollectionName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Strategy = Literal["token", "sequence"]
EarlyStopping = bool | Literal["never"]
RepetitionPenalty = Annotated[float, Field(gt=0, le=100)]
# The first bad number ends the check: a body of millions of them must not become a list of millions of errors.
Row = Annotated[list[float], Field(fail_fast=True)]
Rows = Annotated[list[Row], Field(fail_fast=True)]
MetadataType = Literal["string", "integer", "float", "boolean", "date", "timestamp"]
MetadataValue = str | int | float | bool | None
# What a client sends is checked against the collection's columns, value by value, and refused at the first bad one.
SentMetadata = Annotated[
    dict[str, Any],
    WithJsonSchema({"type": "object", "additionalProperties": {"type": ["string", "number", "boolean", "null"]}}),
]
LONGEST_FILTER = 4000
Filter = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_FILTER)]
FILTER = (
    "SQL condition on metadata columns, id, title and text that every document fulfils, such as "
    "`year >= 1990 AND lang IN ('en', 'de') AND published < date '2020-01-31'`. A name with a blank in it stands "
    "in `backticks`."
)


def _is_none(value: object) -> bool:
    return value is None


def _is_empty(value: Sized) -> bool:
    return not value


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Sent(Wire):
    """What a client sends: types are taken strictly, so that ``"5"`` is no number and ``1`` no boolean.

    pydantic collects every error before it reports one: 16 MB of unknown fields, or a list of 16 MB of wrong items,
    cost it gigabytes. So many unknown fields are one error, and lists end their check at the first (``fail_fast``).
    """

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _not_flooded(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > 2 * len(cls.model_fields) + 8:
            raise ValueError(f"{len(data)} fields, where {len(cls.model_fields)} are known")
        return data


class Request(Sent):
    timeout_ms: Milliseconds | None = Field(
        default=None, description="Deadline of the whole request, both services included."
    )


# --- retriever ---------------------------------------------------------------------------------------------


class EncodedArray(Sent):
    """An array as base64 of its little-endian bytes in C order."""

    data: str = Field(description="base64")
    dtype: Literal["float16", "float32", "float64"] = "float32"
    shape: list[NonNegative] = Field(min_length=1, max_length=3, fail_fast=True)


class Passage(Wire):
    id: int = Field(ge=0, le=INT64_MAX)
    title: str
    text: str
    metadata: dict[str, MetadataValue] | None = Field(
        default=None,
        exclude_if=_is_none,
        description="By column, where the collection has such; dates as `2026-01-31`, timestamps as "
        "`2026-01-31T12:00:00Z`.",
    )


class IndexInfo(Wire):
    """Which index answered."""

    collection: str
    generation: str = Field(description="Name of the generation: one build of index and passages.")
    encoder: str = Field(description="Fingerprint of the question encoder whose space the embeddings live in.")


class SearchParams(Sent):
    """How widely an index that does not compare every vector looks; ``null``: as the collection has it."""

    nprobe: Annotated[Positive, Field(le=65_536)] | None = Field(
        default=None, description="Inverted lists looked through (IVF kinds)."
    )
    ef_search: Annotated[Positive, Field(le=65_536)] | None = Field(
        default=None, description="Candidates that a walk through the graph keeps (HNSW kinds)."
    )
    over_fetch: Annotated[Positive, Field(le=1000)] | None = Field(
        default=None, description="Hits taken for each document asked for, to be ranked by their exact scores."
    )


class RetrieveOptions(Request):
    """Everything of a retrieve request but its vectors; with an Arrow body it travels beside them."""

    n_docs: Positive = Field(default=5, description="Documents per query; fewer come back where there are fewer.")
    collection: CollectionName = "default"
    return_embeds: bool = True
    return_passages: bool = True
    search_params: SearchParams | None = Field(default=None, description="Beyond what the collection is set to.")
    filter: Filter | None = Field(default=None, exclude_if=_is_none, description=FILTER)


class RetrieveRequest(RetrieveOptions):
    vectors: Rows | EncodedArray = Field(description="Query vectors, (B, D).")


class RetrieveResponse(Wire):
    """Documents of each query, best first. Lists are as long as ``n_found`` says, never padded."""

    doc_ids: list[list[int]]
    doc_scores: list[list[float]] = Field(description="Inner products of query and document embedding.")
    retrieved_doc_embeds: list[list[list[float]]] | list[EncodedArray] | None = Field(
        default=None,
        description="(B, N, D): nested lists; with `Accept: application/json;vectors=base64` one array a query.",
    )
    docs: list[list[Passage]] | None = None
    n_found: list[int]
    index: IndexInfo
    timings_ms: dict[str, float]


class Recall(Wire):
    """What a sample of live queries found of what an exact search finds."""

    at_k: int = Field(description="Documents of a query that count; of one that asks for fewer, those.")
    estimate: float = Field(description="Share of the true best documents that were found.")
    queries: int = Field(description="How many of the last queries it is the mean of.")
    low: bool = Field(description="It is below what the service is told to warn of.")


class CollectionInfo(Wire):
    name: str
    generation: str
    encoder: str
    kind: str = Field(description="Preset, or faiss factory string.")
    factory: str = Field(description="What faiss built.")
    search_params: SearchParams = Field(description="How widely a search looks unless it says otherwise.")
    metric: Literal["inner_product"]
    dimension: int
    count: int = Field(description="Passages that can be found.")
    version: int = Field(description="Number of the last change that searches see.")
    dtype: Literal["float16", "float32"] = Field(description="Storage of the embeddings.")
    device: str
    created_at: str
    metadata: dict[str, MetadataType] = Field(
        default_factory=dict, exclude_if=_is_empty, description="Columns beside id, title and text, for filters."
    )
    recall: Recall | None = Field(
        default=None, description="As measured; null where the index is exact, or no query was compared yet."
    )


class NewCollection(Sent):
    """A collection to make, without passages."""

    name: CollectionName
    dimension: Annotated[Positive, Field(le=16_384)] = Field(description="Of the embeddings.")
    encoder: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[!-~]+$")] = Field(
        description="Fingerprint of the question encoder whose space the embeddings will live in, as `/v1/encode` and "
        "`rag info` tell it."
    )
    kind: str = Field(
        default="flat",
        min_length=1,
        max_length=200,
        description="Preset or faiss factory string of the index that is built once there are passages.",
    )
    dtype: Literal["float16", "float32"] = Field(default="float16", description="Storage of the embeddings.")
    metadata: dict[str, MetadataType] = Field(default_factory=dict, description="Type of each metadata column.")
    search_params: SearchParams | None = Field(default=None, description="Its default, beyond the kind's own.")


class CollectionList(Wire):
    collections: list[CollectionInfo]


class NewPassage(Sent):
    """A passage to store. Without an ``id`` it gets the next free one; with one it replaces who has it."""

    id: Int63 | None = None
    title: str = ""
    text: str
    embedding: Row
    metadata: SentMetadata | None = Field(
        default=None, description="Values of the collection's metadata columns; those that are missing are null."
    )


class UpsertRequest(Sent):
    passages: Annotated[list[NewPassage], Field(min_length=1, fail_fast=True)]


class DeleteRequest(Sent):
    ids: Annotated[list[Int63], Field(min_length=1, fail_fast=True)]


class Written(Wire):
    """A change that is on the disk, and that every search begun from now on sees."""

    ids: list[int] = Field(description="Of the passages written, or asked to be deleted.")
    gone: int = Field(description="How many passages were replaced or deleted.")
    version: int = Field(description="Number of the change, counted in the collection.")


class GenerationInfo(Wire):
    """A build of the collection that is still on the disk."""

    generation: str
    current: bool
    kind: str
    count: int = Field(description="Passages in it, before the changes that came after.")
    encoder: str
    created_at: str


class GenerationList(Wire):
    generations: list[GenerationInfo]


class BuildRequest(Sent):
    """What the next generation is: the passages that can be found now, in an index of this kind."""

    kind: str | None = Field(
        default=None, min_length=1, max_length=200, description="Preset or faiss factory string; null: as it is."
    )
    search_params: SearchParams | None = Field(default=None, description="Its default, beyond the kind's own.")


class RollbackRequest(Sent):
    generation: str = Field(pattern=r"^[0-9A-Za-z-]{1,64}$")


class Job(Wire):
    """Work that goes on after its request was answered."""

    id: str
    collection: str
    status: Literal["running", "done", "failed"]
    generation: str | None = Field(default=None, description="What it built, once it serves.")
    error: str | None = None


class AliasRequest(Sent):
    collection: CollectionName


class Aliases(Wire):
    aliases: dict[str, str] = Field(description="The collection that each alias stands for.")


# --- generator ---------------------------------------------------------------------------------------------


class OwnPassage(Sent):
    """A passage that the caller brings; ``score`` stands for the inner product that retrieval would give."""

    id: Int63 | None = None
    title: str = ""
    text: str
    score: float = 0.0


class Asked(Request):
    question: Question | Annotated[list[Question], Field(min_length=1, fail_fast=True)]

    @property
    def questions(self) -> list[str]:
        return [self.question] if isinstance(self.question, str) else list(self.question)


class Retrieving(Asked):
    """Questions that documents are retrieved for."""

    n_docs: Positive | None = None
    collection: CollectionName = "default"
    filter: Filter | None = Field(default=None, description=FILTER)
    search_params: SearchParams | None = Field(default=None, description="Beyond what the collection is set to.")


class AnswerRequest(Retrieving):
    """Generation options are named as in transformers; ``null``: as the checkpoint has it."""

    strategy: Strategy | None = Field(default=None, description="Head that marginalises: RAG-Token or RAG-Sequence.")
    num_beams: Positive = 1
    num_return_sequences: Positive = 1
    max_new_tokens: Positive = 64
    min_new_tokens: NonNegative = 0
    length_penalty: float = Field(default=1.0, ge=-10, le=10)
    early_stopping: EarlyStopping | None = Field(
        default=None,
        description="With beams: a search ends once it has `num_beams` answers (`true`), once no better one is likely "
        "(`false`), or once none can come (`never`).",
    )
    repetition_penalty: RepetitionPenalty | None = Field(
        default=None, description="Above 1, tokens that the answer has are less probable to come again; below, more."
    )
    no_repeat_ngram_size: NonNegative = 0
    do_sample: bool = False
    temperature: float = Field(default=1.0, gt=0, le=100)
    top_k: NonNegative = Field(default=0, description="0: no limit.")
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: Int63 | None = Field(default=None, description="Makes sampling repeatable.")
    deduplicate: bool = Field(default=True, description="RAG-Sequence: score equal candidates once.")
    decoding: Literal["thorough", "fast"] = Field(
        default="thorough",
        description="RAG-Sequence: score every candidate under every document, or (`fast`) only under those whose own "
        "search found it; probabilities are lower bounds then.",
    )
    choices: list[str] | None = Field(
        default=None,
        min_length=1,
        fail_fast=True,
        description="Closed answers: score these and no others, and give their normalised probabilities.",
    )
    stream: bool = Field(
        default=False,
        description="Answer one question as server-sent events: `documents`, `token` as the text is written (greedy "
        "search and sampling with RAG-Token), `answer` with the whole response, or `error`.",
    )
    provenance: Literal["none", "answer", "token"] = Field(
        default="answer",
        description="`answer`: the posterior of every document given each answer. `token`: after every token too.",
    )
    passages: list[OwnPassage] | None = Field(
        default=None, min_length=1, fail_fast=True, description="Answer from these instead of retrieving."
    )
    min_probability: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Answers less probable than this are withheld: the service does not know.",
    )

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.stream and not isinstance(self.question, str):
            raise disagreement("stream", "stream=true answers one question, given as a string")
        if self.min_new_tokens > self.max_new_tokens:
            raise disagreement("min_new_tokens", "min_new_tokens is above max_new_tokens")
        if not self.do_sample:
            for name, neutral in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("seed", None)):
                if getattr(self, name) != neutral:
                    raise disagreement(name, f"{name} has an effect only with do_sample=true")
            if self.num_return_sequences > self.num_beams:
                reason = "num_return_sequences is above num_beams; raise num_beams or set do_sample=true"
                raise disagreement("num_return_sequences", reason)
        elif self.num_beams > 1:
            raise disagreement("num_beams", "num_beams must be 1 with do_sample=true")
        return self


class Document(Wire):
    """A passage as evidence. ``prior`` is p(z|x), the softmax of the scores over the question's documents."""

    id: int | None
    title: str
    text: str
    score: float
    prior: float
    truncated: bool = Field(default=False, description="The passage was cut so that the question fits.")


class AnswerToken(Wire):
    """One token of an answer, the end-of-sequence token included."""

    text: str
    log_prob: float = Field(description="Its share of log p(y|x): the shares sum to it.")
    doc_posterior: list[float] = Field(description="p(z|x,y_≤i): the document posterior after this token.")


class Answer(Wire):
    text: str
    log_prob: float = Field(description="log p(y|x), marginalised over the documents as the head defines it.")
    probability: float
    doc_posterior: list[float] | None = Field(
        default=None, description="p(z|x,y) of each document, in the order of `documents`; sums to 1."
    )
    tokens: list[AnswerToken] | None = Field(default=None, description="With `provenance: token`.")
    choice_probability: float | None = Field(
        default=None, description="Of a choice among the `choices`, which sum to 1; `min_probability` is held to it."
    )


class QuestionResult(Wire):
    question: str
    answers: list[Answer]
    abstained: bool = Field(description="Every answer was less probable than `min_probability`: I do not know.")
    documents: list[Document]


class AnswerResponse(Wire):
    model: str
    strategy: Strategy
    results: list[QuestionResult]
    index: IndexInfo | None = Field(description="None where the caller brought the passages.")
    timings_ms: dict[str, float]


class ScoreRequest(Retrieving):
    """One question with its answers, or as many lists of answers as questions."""

    answers: (
        Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[
            list[Annotated[list[str], Field(min_length=1, fail_fast=True)]], Field(min_length=1, fail_fast=True)
        ]
    )
    strategy: Strategy | None = None
    passages: list[OwnPassage] | None = Field(default=None, min_length=1, fail_fast=True)

    @model_validator(mode="after")
    def _one_list_a_question(self) -> Self:
        if isinstance(self.question, str):
            if not all(isinstance(a, str) for a in self.answers):
                raise disagreement("answers", "answers of a single question must be a list of strings")
        elif len(self.answers) != len(self.question) or any(isinstance(a, str) for a in self.answers):
            raise disagreement("answers", "answers must hold one list of strings for each question")
        return self

    @property
    def answers_by_question(self) -> list[list[str]]:
        given: list[Any] = self.answers
        return [given] if isinstance(self.question, str) else given


class ScoreResponse(Wire):
    """As :class:`AnswerResponse`, the answers in the order they were given."""

    model: str
    strategy: Strategy
    results: list[QuestionResult]
    index: IndexInfo | None
    timings_ms: dict[str, float]


class EncodeRequest(Asked):
    pass


class EncodeResponse(Wire):
    model: str
    encoder: str = Field(description="Fingerprint; an index made for another encoder is refused.")
    dimension: int
    vectors: list[list[float]] | EncodedArray = Field(description="(B, D)")
    timings_ms: dict[str, float]


class SearchRequest(Retrieving):
    pass


class SearchResult(Wire):
    question: str
    documents: list[Document]


class SearchResponse(Wire):
    results: list[SearchResult]
    index: IndexInfo
    timings_ms: dict[str, float]


# --- both --------------------------------------------------------------------------------------------------


class Health(Wire):
    status: Literal["ok", "unavailable"]
    reasons: list[str] = Field(default_factory=list, description="Why not, one line a cause.")
    warnings: list[str] = Field(
        default_factory=list, exclude_if=_is_empty, description="What is wrong without stopping the service."
    )


class ServiceInfo(Wire):
    service: Literal["retriever", "generator"]
    version: str
    versions: dict[str, str] = Field(description="Of the libraries that decide results.")
    device: str
    limits: dict[str, int | float]
    model: dict[str, Any] | None = None
    collections: list[CollectionInfo] | None = None
