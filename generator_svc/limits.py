"""What this deployment and this checkpoint refuse of a request, each with the field at fault.

An option is honoured or refused, never ignored: one that would have no effect with the others given is refused too.
"""

from typing import Any

from generator_svc.checkpoint import Checkpoint
from generator_svc.engine.options import OF_BEAMS
from generator_svc.settings import DEFAULT_COLLECTION, GeneratorSettings
from shared.errors import InvalidRequest
from shared.schemas import AnswerRequest, Asked, ScoreRequest, SearchRequest, Strategy

_PENALTIES = ("repetition_penalty", "no_repeat_ngram_size")
_OF_SEARCH = frozenset(
    {
        "decoding", "deduplicate", "do_sample", "max_new_tokens", "min_new_tokens", "num_beams", "num_return_sequences",
        "seed", "temperature", "top_k", "top_p", *OF_BEAMS, *_PENALTIES,
    }
)  # fmt: skip


def check_questions(request: Asked, settings: GeneratorSettings) -> None:
    """Raises: InvalidRequest."""
    _at_most("question", len(request.questions), settings.max_questions)


def choose_n_docs(
    request: AnswerRequest | ScoreRequest | SearchRequest, default: int, settings: GeneratorSettings
) -> int:
    """How many documents each question gets.

    Raises:
        InvalidRequest: too many, or not as many as the passages that the caller brings.
    """
    passages = None if isinstance(request, SearchRequest) else request.passages
    if passages is None:
        n_docs = min(default, settings.max_n_docs) if request.n_docs is None else request.n_docs
        _at_most("n_docs", n_docs, settings.max_n_docs)
        return n_docs
    if request.n_docs not in (None, len(passages)):
        raise InvalidRequest(f"n_docs is {request.n_docs}, but {len(passages)} passages are given", param="n_docs")
    for name, neutral in (("collection", DEFAULT_COLLECTION), ("filter", None), ("search_params", None)):
        if getattr(request, name) != neutral:
            raise InvalidRequest(f"{name} has no effect where passages are given", param=name)
    _at_most("passages", len(passages), settings.max_n_docs)
    return len(passages)


def most_new_tokens(settings: GeneratorSettings, checkpoint: Checkpoint) -> int:
    """The longest answer in tokens: the setting, or where the generator's positions end."""
    return min(settings.max_new_tokens, checkpoint.max_target_tokens)


def generation_options(
    request: AnswerRequest, strategy: Strategy, settings: GeneratorSettings, checkpoint: Checkpoint
) -> dict[str, Any]:
    """The options of a request for the engine's `task`. A default above this service's limit is lowered to it.

    Raises:
        InvalidRequest: above a limit, or without effect.
    """
    _at_most("num_beams", request.num_beams, settings.max_beams)
    _at_most("num_return_sequences", request.num_return_sequences, settings.max_answers)
    max_new_tokens, limit = request.max_new_tokens, most_new_tokens(settings, checkpoint)
    if "max_new_tokens" in request.model_fields_set:
        _at_most("max_new_tokens", max_new_tokens, limit)
    _at_most("min_new_tokens", request.min_new_tokens, limit)
    for name, neutral in OF_BEAMS.items():
        if request.num_beams == 1 and getattr(request, name) not in (None, neutral):
            raise InvalidRequest(f"{name} has an effect only with num_beams above 1", param=name)
    if not request.deduplicate and strategy != "sequence":
        raise InvalidRequest("deduplicate has an effect only with strategy 'sequence'", param="deduplicate")
    if request.decoding == "fast" and strategy != "sequence":
        raise InvalidRequest("decoding has an effect only with strategy 'sequence'", param="decoding")
    options: dict[str, Any] = {
        "strategy": strategy,
        "max_new_tokens": min(max_new_tokens, limit),
        "decoding": request.decoding,
        "deduplicate": request.deduplicate,
        "seed": request.seed,
    }
    as_given = ("do_sample", "num_beams", "num_return_sequences", "min_new_tokens", *OF_BEAMS, *_PENALTIES)
    drawn = ("temperature", "top_k", "top_p") if request.do_sample else ()
    for name in (*as_given, *drawn):
        options[name] = getattr(request, name)
    return options


def check_choices(request: AnswerRequest, settings: GeneratorSettings) -> None:
    """Choices are scored, not searched for: an option of the search would have no effect.

    Raises:
        InvalidRequest.
    """
    if request.choices is None:
        return
    _at_most("choices", len(request.choices), settings.max_answers)
    for index, choice in enumerate(request.choices):
        if choice in request.choices[:index]:
            raise InvalidRequest(f"{choice!r} is given twice", param=f"choices.{index}")
    for name in sorted(request.model_fields_set & _OF_SEARCH):
        raise InvalidRequest(f"{name} has no effect where choices are given", param=name)


def check_answers(request: ScoreRequest, settings: GeneratorSettings) -> None:
    """Raises: InvalidRequest."""
    for answers in request.answers_by_question:
        _at_most("answers", len(answers), settings.max_answers)


def _at_most(param: str, value: int, limit: int) -> None:
    if value > limit:
        raise InvalidRequest(f"{param}: {value} is above this service's limit of {limit}", param=param)
