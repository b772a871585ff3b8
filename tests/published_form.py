"""Saved checkpoints turned into the form in which RAG's and DPR's were published in 2020, by transformers 3.

There is one pickle of weights, with what later versions no longer keep; configurations hold the settings of generation
and of Python beside the model's; tokenizers are lists of words and merges, whose kind follows from the configuration.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

_OF_ANY_MODEL: dict[str, Any] = {
    "bad_words_ids": None,
    "do_sample": False,
    "early_stopping": False,
    "finetuning_task": None,
    "gradient_checkpointing": False,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "prefix": None,
    "pruned_heads": {},
    "repetition_penalty": 1.0,
    "return_dict": False,
    "task_specific_params": None,
    "temperature": 1.0,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torchscript": False,
    "use_bfloat16": False,
    "xla_device": None,
}
_OF_BART: dict[str, Any] = {
    "_num_labels": 3,
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "classif_dropout": 0.0,
    "extra_pos_embeddings": 2,
    "force_bos_token_to_be_generated": False,
    "normalize_before": False,
    "normalize_embedding": True,
    "output_past": False,
    "prefix": " ",
    "static_position_embeddings": False,
    "task_specific_params": {"summarization": {"length_penalty": 2.0, "min_length": 56, "num_beams": 4}},
}


def publish_rag(folder: Path) -> None:
    """A RAG checkpoint of a DPR encoder and a BART, in place."""
    config = _of_2020(folder / "config.json")
    config["question_encoder"] |= _OF_ANY_MODEL
    config["generator"] |= _OF_ANY_MODEL | _OF_BART
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    _pickle_weights(folder, "rag.question_encoder.question_encoder.bert_model")
    _publish_word_piece(folder / "question_encoder_tokenizer")
    _publish_bpe(folder / "generator_tokenizer")


def publish_context_encoder(folder: Path) -> None:
    """A DPR context encoder, in place."""
    (folder / "config.json").write_text(json.dumps(_of_2020(folder / "config.json") | _OF_ANY_MODEL))
    _pickle_weights(folder, "ctx_encoder.bert_model")
    _publish_word_piece(folder)


def _of_2020(path: Path) -> Any:
    config = json.loads(path.read_text())
    for part in (config, config.get("question_encoder", {}), config.get("generator", {})):
        part.pop("dtype", None)
        part.pop("transformers_version", None)
    return config


def _pickle_weights(folder: Path, bert: str) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    positions, width = weights[f"{bert}.embeddings.position_embeddings.weight"].shape
    weights |= {
        f"{bert}.embeddings.position_ids": torch.arange(positions)[None],
        f"{bert}.pooler.dense.weight": torch.zeros(width, width),
        f"{bert}.pooler.dense.bias": torch.zeros(width),
    }
    torch.save(weights, folder / "pytorch_model.bin")


def _publish_word_piece(folder: Path) -> None:
    saved, settings = _taken(folder)
    vocabulary = saved["model"]["vocab"]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in sorted(vocabulary, key=vocabulary.get)))
    settings = {"do_lower_case": True, "model_max_length": settings["model_max_length"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    specials = {"cls": "[CLS]", "mask": "[MASK]", "pad": "[PAD]", "sep": "[SEP]", "unk": "[UNK]"}
    _write_specials(folder, specials)


def _publish_bpe(folder: Path) -> None:
    saved, _ = _taken(folder)
    vocabulary = saved["model"]["vocab"] | {token["content"]: token["id"] for token in saved["added_tokens"]}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "".join(f"{first} {second}\n" for first, second in saved["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024}))
    mask = {"content": "<mask>", "single_word": False, "lstrip": True, "rstrip": False, "normalized": True}
    specials = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>"}
    _write_specials(folder, specials | {"mask": mask})


def _taken(folder: Path) -> tuple[Any, Any]:
    """tokenizer.json, which is removed, and tokenizer_config.json."""
    saved = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    return saved, json.loads((folder / "tokenizer_config.json").read_text())


def _write_specials(folder: Path, specials: dict[str, Any]) -> None:
    named = {f"{kind}_token": token for kind, token in specials.items()}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
