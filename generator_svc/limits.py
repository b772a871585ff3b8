"""What this deployment and this checkpoint refuse of a request, each with the field at fault.

An option is honoured or refused, never ignored: one that would have no effect with the others given is refused too.
"""

from generator_svc.checkpoint import Checkpoint
from generator_svc.engine import GenerationOptions
from generator_svc.settings import DEFAULT_COLLECTION, GeneratorSettings
from shared.errors import InvalidRequest
from shared.schemas import AnswerRequest, Asked, ScoreRequest, SearchRequest, Strategy


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
    if request.collection != DEFAULT_COLLECTION:
        raise InvalidRequest("collection has no effect where passages are given", param="collection")
    _at_most("passages", len(passages), settings.max_n_docs)
    return len(passages)


def most_new_tokens(settings: GeneratorSettings, checkpoint: Checkpoint) -> int:
    """The longest answer in tokens: the setting, or where the generator's positions end."""
    return min(settings.max_new_tokens, checkpoint.max_target_tokens)


def generation_options(
    request: AnswerRequest, strategy: Strategy, settings: GeneratorSettings, checkpoint: Checkpoint
) -> GenerationOptions:
    """The options of a request for the engine. A default that this service does not reach is lowered to its limit.

    Raises:
        InvalidRequest: above a limit, or without effect.
    """
    _at_most("num_beams", request.num_beams, settings.max_beams)
    _at_most("num_return_sequences", request.num_return_sequences, settings.max_answers)
    max_new_tokens, limit = request.max_new_tokens, most_new_tokens(settings, checkpoint)
    if "max_new_tokens" in request.model_fields_set:
        _at_most("max_new_tokens", max_new_tokens, limit)
    _at_most("min_new_tokens", request.min_new_tokens, limit)
    if request.length_penalty != 1.0 and request.num_beams == 1:
        raise InvalidRequest("length_penalty has an effect only with num_beams above 1", param="length_penalty")
    if not request.deduplicate and strategy != "sequence":
        raise InvalidRequest("deduplicate has an effect only with strategy 'sequence'", param="deduplicate")
    sampled = request.do_sample
    return GenerationOptions(
        num_beams=request.num_beams,
        num_return_sequences=request.num_return_sequences,
        max_new_tokens=min(max_new_tokens, limit),
        min_new_tokens=request.min_new_tokens,
        length_penalty=request.length_penalty,
        no_repeat_ngram_size=request.no_repeat_ngram_size,
        do_sample=request.do_sample,
        deduplicate=request.deduplicate,
        temperature=request.temperature if sampled else None,
        top_k=request.top_k if sampled else None,
        top_p=request.top_p if sampled else None,
        seed=request.seed,
    )


def check_answers(request: ScoreRequest, settings: GeneratorSettings) -> None:
    """Raises: InvalidRequest."""
    for answers in request.answers_by_question:
        _at_most("answers", len(answers), settings.max_answers)


def _at_most(param: str, value: int, limit: int) -> None:
    if value > limit:
        raise InvalidRequest(f"{param}: {value} is above this service's limit of {limit}", param=param)
