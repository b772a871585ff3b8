"""The keyword options of each call, for editors and type checkers.

They are the fields of the request in :mod:`shared.schemas` less the ones that a call takes by position; a test keeps
the two equal. What is left out is not sent, so that the service's own default holds.
"""

from typing import Literal, TypedDict

from shared.schemas import MetadataType, OwnPassage, SearchParams, Strategy


class EncodeOptions(TypedDict, total=False):
    timeout_ms: int | None


class SearchOptions(EncodeOptions, total=False):
    n_docs: int | None
    collection: str
    filter: str | None
    search_params: SearchParams | None


class ScoreOptions(SearchOptions, total=False):
    strategy: Strategy | None
    passages: list[OwnPassage] | None


class AnswerOptions(ScoreOptions, total=False):
    num_beams: int
    num_return_sequences: int
    max_new_tokens: int
    min_new_tokens: int
    length_penalty: float
    early_stopping: bool | Literal["never"] | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    deduplicate: bool
    decoding: Literal["thorough", "fast"]
    choices: list[str] | None
    provenance: Literal["none", "answer", "token"]
    min_probability: float


class CollectionOptions(TypedDict, total=False):
    kind: str
    dtype: Literal["float16", "float32"]
    metadata: dict[str, MetadataType]
    search_params: SearchParams | None


class RetrieveOptions(EncodeOptions, total=False):
    n_docs: int
    collection: str
    return_embeds: bool
    return_passages: bool
    search_params: SearchParams | None
    filter: str | None
