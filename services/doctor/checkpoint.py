"""The checkpoint's files: there, whole, and of a RAG model. They are not loaded."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.doctor.deployment import Deployment
from services.doctor.finding import Finding, Findings

_found = Findings("checkpoint")

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("question_encoder_tokenizer", "generator_tokenizer")
_LFS = b"version https://git-lfs"
_ANEW = "copy the checkpoint again (save_pretrained of model and RagTokenizer), or name another in GENERATOR_CHECKPOINT"


def check(deployment: Deployment) -> Iterator[Finding]:
    if "generator" not in deployment.services or deployment.generator is None:
        return
    name = deployment.generator.checkpoint
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith(("/", ".", "~")):
            mend = "name a folder that is there in GENERATOR_CHECKPOINT (`~` is not expanded by every shell)"
            yield _found("problem", f"there is no checkpoint folder {name}", mend)
        else:
            yield _found("note", f"{name} is no folder here: it is read from the Hugging Face hub, or its cache")
        return
    problems = list(_problems(folder))
    for what in problems:
        yield _found("problem", what, _ANEW if "Git LFS" not in what else f"git lfs pull, in {folder}")
    if not problems:
        yield _found("ok", f"{folder}: configuration, tokenizers and weights are there")


def _problems(folder: Path) -> Iterator[str]:
    config = _json(folder / "config.json")
    if config is None:
        yield f"{folder / 'config.json'} is missing or is no JSON"
    elif config.get("model_type") != "rag":
        yield f"{folder} holds a {config.get('model_type')!r} model, not a RAG checkpoint"
    for tokenizer in _TOKENIZERS:
        if not (folder / tokenizer).is_dir():
            yield f"{folder} lacks {tokenizer}/"
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        yield f"missing weights: {folder} holds none of {', '.join(_WEIGHTS)}"
    elif weights.suffix == ".json":
        index = _json(weights) or {}
        for shard in sorted(set(index.get("weight_map", {}).values())):
            yield from _file(folder / str(shard))
    else:
        yield from _file(weights)


def _file(path: Path) -> Iterator[str]:
    if not path.is_file():
        yield f"missing weights: {path} is not there"
        return
    with path.open("rb") as file:
        head = file.read(len(_LFS))
    if head == _LFS:
        yield f"missing weights: {path} is a Git LFS pointer"
    elif path.suffix == ".safetensors" and (expected := _safetensors_size(path)) != path.stat().st_size:
        yield f"damaged weights: {path} has {path.stat().st_size} bytes, its header says {expected}"


def _safetensors_size(path: Path) -> int:
    """As its header has it: 8 bytes with the header's length, the header, the tensors. -1: it has none."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(min(length, path.stat().st_size)))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        return 8 + int(length) + max(ends, default=0)
    except (struct.error, ValueError, KeyError, TypeError):
        return -1


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
