"""The passage encoder: titles and texts to the vectors of the index.

A passage is tokenized and pooled exactly as transformers' RAG index script does (`use_own_knowledge_dataset.py`):
title and text as a pair, cut at the longest of the two first, input ids only, `pooler_output`. The script leaves the
token types out, so that they are zero, as in the training of DPR; the mask then follows from the padding token.

Shapes: B passages, S tokens, D dimension of the embedding space.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, DPRContextEncoder, PreTrainedTokenizerBase

from generator_svc.engine.affine import use_onednn
from generator_svc.fingerprint import encoder_fingerprint
from services.indexing.options import EncoderOptions, EncoderRecipe, Pooling, TypeIds
from shared.errors import InvalidRequest, StartupError
from shared.retrieval import Float32Array, Int64Array

TOKENIZED_AT_ONCE = 1024
"""Passages: a tokenizer's own lists take ten times the memory of the arrays that are kept."""
PAD_TO = 8
"""Few distinct shapes: the allocator otherwise hoards a block for each."""

_POOLINGS = ("cls", "mean", "pooler")
_TYPE_IDS = ("zeros", "segments")

Int32Array = npt.NDArray[np.int32]


class PassageEncoder:
    """A DPR context encoder, or any other of transformers' encoders with ``pooling`` named.

    Raises:
        StartupError: not found, weights missing or of another shape, no padding token, or pooling neither named in
            the options nor in its config.json.
    """

    def __init__(self, options: EncoderOptions) -> None:
        config = _read(options.name, "config.json", AutoConfig)
        config.return_dict = True  # those of 2020 may say false
        self._is_dpr = config.model_type == "dpr"
        pooling = _pooling(options, config)
        self._tokenizer = _load_tokenizer(options.name, config)
        self._batch_tokens = options.batch_tokens
        self._device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = _load_model(options.name, config, pooling)
        fingerprint = encoder_fingerprint(self._model, self._tokenizer)
        self._model.eval().to(self._device, getattr(torch, options.dtype))
        use_onednn(self._model)
        self._pooling = pooling
        self._type_ids = _type_ids(options, config, self._tokenizer)
        self._max_tokens = self._tokenizer.model_max_length
        probe = self._embed(self._tokenize([""], ["?"]))
        self.recipe = EncoderRecipe(
            fingerprint=fingerprint,
            dtype=options.dtype,
            type_ids=self._type_ids,
            pooling=pooling,
            max_tokens=self._max_tokens,
            dimension=probe.shape[-1],
        )

    def encode(self, titles: Sequence[str], texts: Sequence[str]) -> Float32Array:
        """Embeddings in the order given: (B, D) float32."""
        embeddings_BD = np.empty((len(titles), self.recipe.dimension), np.float32)
        for rows, vectors in self.batches(titles, texts):
            embeddings_BD[rows] = vectors
        return embeddings_BD

    def batches(self, titles: Sequence[str], texts: Sequence[str]) -> Iterator[tuple[Int64Array, Float32Array]]:
        """Embeddings batch by batch, with the rows they belong to; the longest passages come first, so that a batch
        that does not fit into the memory fails at the start.

        The batches follow from the passages given alone: the same passages give the same bytes.
        """
        passages = self._tokenize(titles, texts)
        lengths_B = np.array([ids.shape[1] for ids in passages], np.int64)
        order_B = np.argsort(-lengths_B, kind="stable")
        start = 0
        while start < len(order_B):
            size = max(1, self._batch_tokens // self._padded(int(lengths_B[order_B[start]])))
            rows = order_B[start : start + size]
            yield rows, self._embed([passages[row] for row in rows])
            start += size

    def _tokenize(self, titles: Sequence[str], texts: Sequence[str]) -> list[Int32Array]:
        """Of each passage its input ids and token types: (2, S)."""
        passages: list[Int32Array] = []
        for i in range(0, len(titles), TOKENIZED_AT_ONCE):
            part = slice(i, i + TOKENIZED_AT_ONCE)
            tokens = self._tokenizer(list(titles[part]), list(texts[part]), truncation=True, return_token_type_ids=True)
            pairs = zip(tokens["input_ids"], tokens["token_type_ids"], strict=True)
            passages += [np.array(pair, np.int32) for pair in pairs]
        return passages

    def _padded(self, length: int) -> int:
        return min(-(-length // PAD_TO) * PAD_TO, self._max_tokens)

    @torch.inference_mode()
    def _embed(self, passages: Sequence[Int32Array]) -> Float32Array:
        """(B, D) float32."""
        length = self._padded(max(passage.shape[1] for passage in passages))
        inputs_3BS = np.zeros((3, len(passages), length), np.int64)
        inputs_3BS[0] = self._tokenizer.pad_token_id
        for row, passage in enumerate(passages):
            inputs_3BS[:2, row, : passage.shape[1]] = passage
            inputs_3BS[2, row, : passage.shape[1]] = 1
        ids_BS, types_BS, mask_BS = torch.from_numpy(inputs_3BS).to(self._device)
        vectors: Float32Array = self._pooled(ids_BS, types_BS, mask_BS).float().cpu().numpy()
        return vectors

    def _pooled(self, ids_BS: Tensor, types_BS: Tensor, mask_BS: Tensor) -> Tensor:
        pooled_BD: Tensor
        inputs = {"input_ids": ids_BS}
        if self._type_ids == "segments":
            inputs["token_type_ids"] = types_BS
        if self._is_dpr:
            pooled_BD = self._model(**inputs).pooler_output
            return pooled_BD
        output = self._model(**inputs, attention_mask=mask_BS)
        if self._pooling == "pooler":
            pooled_BD = output.pooler_output
        elif self._pooling == "cls":
            pooled_BD = output.last_hidden_state[:, 0]
        else:
            weight_BS1 = mask_BS.unsqueeze(-1).to(output.last_hidden_state.dtype)
            pooled_BD = (output.last_hidden_state * weight_BS1).sum(1) / weight_BS1.sum(1)
        return pooled_BD


def _read(name: str, what: str, cls: Any, **options: Any) -> Any:
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise StartupError(f"there is no encoder folder {name}")
    try:
        return cls.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        hint = "" if Path(name).is_dir() else "There is no such folder, so the name was taken for a hub id. "
        raise StartupError(f"cannot read the {what} of the passage encoder {name}. {hint}{error}") from error


def _load_model(name: str, config: Any, pooling: Pooling) -> Any:
    """In float32, whatever it is stored in."""
    cls: Any = DPRContextEncoder if config.model_type == "dpr" else AutoModel
    model, report = _read(
        name,
        "weights",
        cls,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    # A pooler that is not read may be missing: many encoders are published without.
    missing = [key for key in report["missing_keys"] if pooling == "pooler" or not key.startswith("pooler.")]
    wrong = sorted(missing) + sorted(key for key, *_ in report["mismatched_keys"])
    if wrong:
        made_as = ", ".join(config.architectures or ["of an unnamed class"])
        raise StartupError(
            f"{name} ({made_as}) lacks {len(wrong)} of the weights of a {cls.__name__}, {wrong[0]} the first: its "
            "embeddings would be random. Passages need the context encoder, not the question encoder"
        )
    return model


def _load_tokenizer(name: str, config: Any) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = _read(name, "tokenizer", AutoTokenizer)
    if tokenizer.pad_token_id is None:
        raise StartupError(f"the tokenizer of {name} has no padding token")
    if config.model_type == "dpr" and tokenizer.pad_token_id != config.pad_token_id:
        raise StartupError(
            f"the tokenizer of {name} pads with {tokenizer.pad_token_id} and its config.json says "
            f"{config.pad_token_id}: a passage's embedding would depend on the passages beside it"
        )
    positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def _pooling(options: EncoderOptions, config: Any) -> Pooling:
    if config.model_type == "dpr":
        if options.pooling not in {None, "pooler"}:
            raise InvalidRequest("a DPR encoder pools by itself: leave pooling out", param="pooling")
        return "pooler"
    pooling: Any = options.pooling or getattr(config, "pooling", None)
    if pooling not in _POOLINGS:
        raise StartupError(
            f"{options.name} is a {config.model_type!r} model: name its pooling, one of {', '.join(_POOLINGS)}, as the "
            f"question encoder's; it is {pooling!r}"
        )
    named: Pooling = pooling
    return named


def _type_ids(options: EncoderOptions, config: Any, tokenizer: PreTrainedTokenizerBase) -> TypeIds:
    if config.model_type != "dpr":
        return "segments" if "token_type_ids" in tokenizer.model_input_names else "zeros"
    type_ids: Any = options.type_ids or getattr(config, "passage_type_ids", None) or "zeros"
    if type_ids not in _TYPE_IDS:
        raise StartupError(f"passage_type_ids of {options.name} is {type_ids!r}, not one of {', '.join(_TYPE_IDS)}")
    named: TypeIds = type_ids
    return named
