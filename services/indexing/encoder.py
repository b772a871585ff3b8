"""The passage encoder: the other half of the pair whose question encoder a RAG checkpoint holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, DPRContextEncoder

from shared.errors import StartupError
from shared.retrieval import Float32Array


class PassageEncoder:
    """A DPR context encoder on a device."""

    def __init__(self, name: str, *, device: str = "auto", batch_size: int = 32) -> None:
        """``name``: a folder in transformers' format, or a name on its hub.

        Raises: StartupError: it cannot be loaded, or is no DPR context encoder.
        """
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._batch_size = batch_size
        model: Any = DPRContextEncoder
        try:
            kind = AutoConfig.from_pretrained(name).model_type
            self._tokenizer = AutoTokenizer.from_pretrained(name)
            self._model = model.from_pretrained(name, dtype=torch.float32).to(self._device).eval()
        except (OSError, ValueError) as error:
            raise StartupError(f"the passage encoder {name} cannot be loaded: {error}") from error
        if kind != "dpr":
            raise StartupError(f"{name} is a model of type {kind!r}; a DPR context encoder is expected")

    @torch.inference_mode()
    def encode(self, passages: Sequence[tuple[str, str]]) -> Float32Array:
        """Embeddings (n, D) of (title, text) pairs, as transformers' own index script makes them.

        Passages of like length share a batch, so that little is padded.
        Source: ``examples/rag/use_own_knowledge_dataset.py`` of transformers 4.
        """
        order = sorted(range(len(passages)), key=lambda i: len(passages[i][0]) + len(passages[i][1]))
        found: list[Float32Array] = []
        for start in range(0, len(order), self._batch_size):
            chosen = [passages[i] for i in order[start : start + self._batch_size]]
            titles, texts = [title for title, _ in chosen], [text for _, text in chosen]
            read = self._tokenizer(titles, texts, truncation=True, padding="longest", return_tensors="pt")
            embeddings = self._model(**read.to(self._device)).pooler_output
            found.append(embeddings.float().cpu().numpy())
        embeddings_ND = np.concatenate(found)
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return embeddings_ND[back]


def dimension_of(name: str) -> int:
    """Of the embeddings that an encoder makes, from its configuration.

    Raises: StartupError: it cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise StartupError(f"the passage encoder {name} cannot be loaded: {error}") from error
    return int(getattr(config, "projection_dim", 0) or config.hidden_size)


def fingerprint_of(checkpoint: Path | str) -> str:
    """Names the space of a RAG checkpoint's question encoder, which the passages' embeddings live in."""
    from generator_svc.checkpoint import load_checkpoint  # noqa: PLC0415  takes a moment

    return load_checkpoint(checkpoint).encoder
