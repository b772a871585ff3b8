"""The options of a generation call, named as in transformers, each honoured or refused, never ignored."""

import copy
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from shared.errors import InvalidRequest, StartupError
from shared.schemas import Strategy

_OF_SAMPLING = frozenset(
    {"temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
)
OF_BEAMS: dict[str, Any] = {"early_stopping": False, "length_penalty": 1.0}
"""Options without effect in a search that is not by beams, with the value that means nothing there."""

HONOURED = frozenset(
    {
        # search
        "do_sample", "early_stopping", "length_penalty", "num_beams", "num_return_sequences",
        # length
        "eos_token_id", "max_length", "max_new_tokens", "max_time", "min_length", "min_new_tokens",
        # processors
        "bad_words_ids", "begin_suppress_tokens", "exponential_decay_length_penalty", "forced_bos_token_id",
        "forced_eos_token_id", "no_repeat_ngram_size", "remove_invalid_values", "renormalize_logits",
        "repetition_penalty", "sequence_bias", "suppress_tokens",
    }
    | _OF_SAMPLING
)  # fmt: skip

_ENCODER_INPUT = "a question has several encoder inputs, one a document"
_OTHER_SEARCH = "search is greedy, by beams, or by sampling one row"
_SPECULATION = "nothing is drafted by a second model"

REFUSED: dict[str, str] = {
    "encoder_repetition_penalty": _ENCODER_INPUT,
    "encoder_no_repeat_ngram_size": _ENCODER_INPUT,
    "guidance_scale": "a question has no unconditional form",
    "stop_strings": "it needs a tokenizer; pass a StoppingCriteria in stopping_criteria",
    "token_healing": "there is no prompt whose end could be healed",
    "watermarking_config": "it would change p(y|x) without saying so",
    "constraints": _OTHER_SEARCH,
    "force_words_ids": _OTHER_SEARCH,
    "diversity_penalty": _OTHER_SEARCH,
    "num_beam_groups": _OTHER_SEARCH,
    "penalty_alpha": _OTHER_SEARCH,
    "dola_layers": _OTHER_SEARCH,
    "prompt_lookup_num_tokens": _SPECULATION,
    "assistant_early_exit": _SPECULATION,
    "is_assistant": _SPECULATION,
    "speculation_type": _SPECULATION,
    "use_mtp": _SPECULATION,
}
"""What changes an answer in transformers and cannot be honoured here, and why."""

_NEUTRAL: dict[str, Any] = {
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "num_beam_groups": 1,
}
"""Values of refused options that change nothing, besides None, 0 and False."""

INDIFFERENT = frozenset(
    {
        # the model's tokens; an answer's first one is the decoder start token of the checkpoint
        "bos_token_id", "decoder_start_token_id", "pad_token_id",
        # how transformers computes, and what else it returns: the tokens are the same
        "cache_config", "cache_implementation", "compile_config", "continuous_batching_config", "disable_compile",
        "low_memory", "max_cache_len", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
        "prefill_chunk_size", "return_dict_in_generate", "use_cache",
        # of assisted generation, which is refused
        "assistant_confidence_threshold", "assistant_ensemble_weight", "assistant_lookbehind",
        "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "target_lookbehind",
        # of the file
        "_from_model_config", "transformers_version",
        # kept beside the fields by transformers 5
        "_commit_hash", "_original_object_hash",
    }
)  # fmt: skip
"""What a checkpoint's ``generation_config.json`` may say without any effect on its answers. A call may not."""

_OF_CALLS = {"streamer": "the service streams with stream=true"}
_MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH}
_MAX_LENGTH: dict[Strategy, int] = {"token": 20, "sequence": 21}  # transformers' own, where nobody says anything


def check_defaults(name: str, defaults: GenerationConfig) -> None:
    """Refuse a checkpoint whose ``generation_config.json`` asks for what cannot be honoured.

    Raises:
        StartupError: names the option; its answers would be others than the checkpoint's authors meant.
    """
    for option, value in vars(defaults).items():
        if option in HONOURED | INDIFFERENT or not value or value == _NEUTRAL.get(option):
            continue
        reason = REFUSED.get(option, "it is not an option of this engine")
        raise StartupError(
            f"the generation settings of {name} ask for {option}={value!r}, which cannot be honoured: {reason}. "
            "Take it out of generation_config.json if its answers should do without"
        )
    _check_mode(defaults, StartupError)


def generation_config(defaults: GenerationConfig, strategy: Strategy, **options: Any) -> GenerationConfig:
    """`defaults`, the checkpoint's own, with `options` on top; None leaves the default.

    The bound on new tokens becomes ``max_length``, the decoder's start token included: transformers' RAG-Token ignores
    ``max_new_tokens``.

    Raises:
        InvalidRequest: an option that is unknown or that no head can honour, or a combination that means nothing.
    """
    config = copy.copy(defaults)  # what it holds is never changed, only replaced
    given = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in HONOURED:
            reason = {**REFUSED, **_OF_CALLS}.get(name, "it is not an option of this engine")
            raise InvalidRequest(f"{name} cannot be honoured: {reason}", param=name)
    for name, value in given.items():
        setattr(config, name, value)
    _set_length(config, given, _MAX_LENGTH[strategy])
    config.num_beams = config.num_beams or 1
    config.num_return_sequences = config.num_return_sequences or 1
    _check_mode(config, InvalidRequest)
    for name in sorted(given.keys() & _OF_SAMPLING):
        if not config.do_sample:
            raise InvalidRequest(f"{name} has an effect only with do_sample", param=name)
    for name in sorted(given.keys() & OF_BEAMS.keys()):
        if config.num_beams == 1 and given[name] != OF_BEAMS[name]:
            raise InvalidRequest(f"{name} has an effect only with num_beams above 1", param=name)
    # Sequences and nothing else: probabilities come from engine.likelihood, as the model gives them.
    config.return_dict_in_generate = False
    config.output_scores = config.output_logits = config.output_attentions = config.output_hidden_states = False
    # RAG-Token's beams are wrong with a static cache in transformers 5.23, whose classes run what is not BART.
    config.use_cache, config.cache_implementation = True, "dynamic"
    return config


def _set_length(config: GenerationConfig, given: dict[str, Any], default: int) -> None:
    if "max_length" in given and "max_new_tokens" in given:
        raise InvalidRequest("give max_length or max_new_tokens, not both", param="max_length")
    if "max_length" not in given and config.max_new_tokens is not None:
        config.max_length = config.max_new_tokens + 1
    config.max_new_tokens = None
    config.max_length = default if config.max_length is None else config.max_length
    if config.max_length < 2:
        raise InvalidRequest("max_length counts the decoder's start token: it must be at least 2", param="max_length")
    if "min_new_tokens" in given and "min_length" not in given:
        config.min_length = 0  # would bound the answer a second time; None would become the checkpoint's again


def _check_mode(config: GenerationConfig, error: type[InvalidRequest | StartupError]) -> None:
    mode = config.get_generation_mode()
    if mode not in _MODES:
        raise error(f"{mode.value} is not supported: {_OTHER_SEARCH}")
