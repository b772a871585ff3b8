"""Which space embeddings live in, and how large it is, before anything is embedded."""

from typing import Any

from shared.errors import StartupError


def question_space(checkpoint: str) -> str:
    """Fingerprint of a RAG checkpoint's question encoder: passages are embedded for it.

    Raises: StartupError: it cannot be loaded.
    """
    from generator_svc.checkpoint import load_checkpoint  # noqa: PLC0415  torch takes a moment

    return load_checkpoint(checkpoint).encoder


def dimension_of(encoder: str) -> int:
    """Of the embeddings that a passage encoder makes, from its configuration.

    Raises: StartupError: it cannot be loaded.
    """
    from transformers import AutoConfig  # noqa: PLC0415

    try:
        config: Any = AutoConfig.from_pretrained(encoder)
    except (OSError, ValueError) as error:
        raise StartupError(f"the passage encoder {encoder} cannot be loaded: {error}") from error
    return int(getattr(config, "projection_dim", 0) or config.hidden_size)
