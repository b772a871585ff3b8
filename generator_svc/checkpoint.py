"""Loading a RAG checkpoint in transformers' own format, and refusing one that would answer wrongly.

A checkpoint is a folder, or a model id on the Hugging Face hub, with ``config.json`` (`RagConfig`), weights,
``question_encoder_tokenizer/`` and ``generator_tokenizer/``, as `RagTokenForGeneration.save_pretrained` and
`RagTokenizer.save_pretrained` write it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
    RagConfig,
    RagTokenForGeneration,
    RagTokenizer,
)

from generator_svc.fingerprint import encoder_fingerprint
from shared.errors import InvalidRequest, StartupError
from shared.schemas import Strategy

HEADS: dict[str, Strategy] = {"RagTokenForGeneration": "token", "RagSequenceForGeneration": "sequence"}

# Weights that checkpoints carry and RAG never reads: BERT's pooler (DPR takes the CLS state itself) and the context
# encoder of end-to-end training.
_UNUSED_WEIGHTS = re.compile(r"\.bert_model\.pooler\.|(^|\.)ctx_encoder\.")
_LISTED = 8


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. One set of weights serves both heads; `strategies` says for which it was trained."""

    name: str
    model: RagTokenForGeneration
    question_tokenizer: PreTrainedTokenizerBase
    generator_tokenizer: PreTrainedTokenizerBase
    strategies: tuple[Strategy, ...]
    encoder: str  # fingerprint of the question encoder
    device: torch.device
    dtype: torch.dtype  # of the generator's weights; the question encoder stays in float32

    @property
    def config(self) -> RagConfig:
        return self.model.config

    @property
    def generation_defaults(self) -> GenerationConfig:
        """What ``generation_config.json`` says, or the generator's part of ``config.json`` where there is none."""
        return self.model.generation_config

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end an answer."""
        eos = self.generation_defaults.eos_token_id
        return list(eos) if isinstance(eos, list) else [int(eos)]

    @property
    def forced_bos_token_id(self) -> int | None:
        """The token that opens every answer, whatever the model says; None: the model decides."""
        forced: int | None = self.generation_defaults.forced_bos_token_id
        return forced

    @property
    def max_source_tokens(self) -> int:
        """Longest context, special tokens included."""
        positions = getattr(self.config.generator, "max_position_embeddings", self.config.max_combined_length)
        return int(min(self.config.max_combined_length, positions))

    @property
    def max_target_tokens(self) -> int:
        """Longest answer in tokens after the decoder's start token; the length of the position table bounds it."""
        return int(getattr(self.config.generator, "max_position_embeddings", 1025)) - 1

    def strategy(self, asked: Strategy | None) -> Strategy:
        """The head to answer with; None: the first one that the checkpoint was trained for.

        Raises:
            InvalidRequest: the checkpoint was trained for the other head.
        """
        if asked is None:
            return self.strategies[0]
        if asked not in self.strategies:
            raise InvalidRequest(
                f"the checkpoint {self.name} was trained for strategy {self.strategies[0]!r}; with {asked!r} its "
                "answers and their probabilities would change. any_strategy=true allows it",
                param="strategy",
            )
        return asked


def load_checkpoint(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    any_strategy: bool = False,
) -> Checkpoint:
    """Load `path`, a local folder or a hub id, onto `device`, the generator in `dtype`.

    The question encoder is kept in float32 whatever `dtype` is: its share of the time is small, and its vectors meet
    an index that was built from float32. Weights that are to be int8 are loaded in float32: the engine rounds them, and
    decides what the rest is computed in. `any_strategy` allows both heads whatever the checkpoint was trained for.

    Raises:
        StartupError: not found, not RAG, weights missing, left over or of another shape, tokenizers missing or of
            another vocabulary.
    """
    name = str(path)
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise StartupError(f"there is no checkpoint folder {name}")
    config = _read(name, "config.json", AutoConfig)
    if not isinstance(config, RagConfig):
        raise StartupError(
            f"{name} holds a {config.model_type!r} model, not a RAG checkpoint. One is put together from a question "
            "encoder and a generator by transformers' RagTokenForGeneration.from_pretrained_question_encoder_generator"
        )
    parts: tuple[Any, ...] = (config, config.question_encoder, config.generator)
    for part in parts:
        part.return_dict = True  # those of 2020 may say false
    for folder in ("question_encoder_tokenizer", "generator_tokenizer"):
        # transformers makes an empty tokenizer, or fails far away, where a local folder lacks one.
        if Path(name).is_dir() and not (Path(name) / folder).is_dir():
            raise StartupError(
                f"{name} lacks {folder}/: write both tokenizers with transformers' RagTokenizer.save_pretrained"
            )
    tokenizers = _read(name, "tokenizers", RagTokenizer)
    question_tokenizer, generator_tokenizer = tokenizers.question_encoder, tokenizers.generator
    _check_tokenizer(name, "question_encoder", question_tokenizer, config.question_encoder)
    _check_tokenizer(name, "generator", generator_tokenizer, config.generator)
    _fit_length(question_tokenizer, config.question_encoder)

    # A wrong shape would raise at the first one; ignored here, _check_weights lists all.
    model, report = _read(
        name,
        "weights",
        RagTokenForGeneration,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    _check_weights(name, report)
    for token, need in (("decoder_start_token_id", "begin"), ("eos_token_id", "end")):
        if getattr(model.generation_config, token) is None:
            raise StartupError(f"{name}: config.generator names no {token}, so that no answer can {need}")
    fingerprint = encoder_fingerprint(model.question_encoder, question_tokenizer)
    model.eval().to(device)
    model.generator.to(torch.float32 if dtype == torch.int8 else dtype)
    for module in model.question_encoder.modules():
        own(module)
    return Checkpoint(
        name=Path(name).name if Path(name).is_dir() else name,
        model=model,
        question_tokenizer=question_tokenizer,
        generator_tokenizer=generator_tokenizer,
        strategies=_strategies(config, any_strategy=any_strategy),
        encoder=fingerprint,
        device=torch.device(device),
        dtype=dtype,
    )


def own(module: nn.Module) -> None:
    """Copies the module's own weights, which transformers leaves in the mapped file: one keeps all of it mapped."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.clone()
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, buffer.clone())  # with new data it would still remember what it was a view of


def _read(name: str, what: str, cls: Any, **options: Any) -> Any:
    try:
        return cls.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        hint = "" if Path(name).is_dir() else "There is no such folder, so the name was taken for a hub id. "
        raise StartupError(f"cannot read the {what} of {name}. {hint}{error}") from error


def _strategies(config: RagConfig, *, any_strategy: bool) -> tuple[Strategy, ...]:
    """The heads that ``architectures`` names, in that order; a bare `RagModel`, or none named, was trained for both."""
    named = [HEADS[a] for a in config.architectures or [] if a in HEADS]
    others: list[Strategy] = [s for s in HEADS.values() if s not in named]
    return tuple(named + others if any_strategy or not named else named)


def _check_weights(name: str, report: dict[str, Any]) -> None:
    unexpected = sorted(key for key in report["unexpected_keys"] if not _UNUSED_WEIGHTS.search(key))
    mismatched = sorted(
        f"{key} {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in report["mismatched_keys"]
    )
    wrong = {
        "missing": sorted(report["missing_keys"]),
        "left over": unexpected,
        "of another shape": mismatched,
        "unreadable": sorted(report["error_msgs"]),
    }
    lines = [f"{len(keys)} {kind}: {_shortened(keys)}" for kind, keys in wrong.items() if keys]
    if lines:
        raise StartupError(
            f"the weights of {name} do not fit its config.json, and answers would be random. {'; '.join(lines)}. "
            "Save model and configuration together with save_pretrained"
        )


def _shortened(keys: list[str]) -> str:
    return ", ".join(keys[:_LISTED]) + (f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else "")


def _check_tokenizer(name: str, part: str, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """A tokenizer of another model gives ids that mean something else, or that the embedding table does not have."""
    mend = f"put the tokenizer that {part} was trained with into {name}/{part}_tokenizer/"
    beyond = {token for token, index in tokenizer.get_vocab().items() if index >= config.vocab_size}
    # bart-large-cnn was published without a row for <mask>, which text hardly ever holds; see Stages.
    if beyond - {tokenizer.mask_token} or (beyond and tokenizer.unk_token_id is None):
        raise StartupError(
            f"{part}_tokenizer has {len(tokenizer)} tokens and the {part} embeds {config.vocab_size}: {mend}"
        )
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ours, theirs = getattr(tokenizer, token), getattr(config, token, None)
        if None not in (ours, theirs) and ours not in (theirs if isinstance(theirs, list) else [theirs]):
            raise StartupError(f"{part}_tokenizer has {token} {ours} and the {part}'s configuration {theirs}: {mend}")
    if tokenizer.pad_token_id is None:
        raise StartupError(f"{part}_tokenizer has no padding token: {mend}")


def _fit_length(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Questions are cut at the encoder's position table; some tokenizers are saved without a length."""
    positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
