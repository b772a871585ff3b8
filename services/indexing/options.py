"""How passages are embedded: what is asked for, and what decides the embeddings. Free of torch."""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

TypeIds = Literal["zeros", "segments"]
Pooling = Literal["cls", "mean", "pooler"]
ComputeDtype = Literal["float32", "float16", "bfloat16"]
EmbeddingDtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class EncoderOptions:
    """What :class:`services.indexing.encoder.PassageEncoder` loads and how it computes."""

    name: str
    """A local folder or an id on the Hugging Face hub."""

    device: str | None = None
    """None: CUDA where there is one, else the CPU. "cuda" gives the workers the GPUs in turn."""

    dtype: ComputeDtype = "float32"
    """What the encoder computes in."""

    batch_tokens: int = 8192
    """Tokens of a batch, padding included: it bounds the memory whatever the lengths of the passages."""

    type_ids: TypeIds | None = None
    """Token type ids of a DPR encoder: "zeros", as DPR and transformers' RAG were trained and indexed, or "segments",
    0 for the title and 1 for the text. None: ``passage_type_ids`` of its config.json, else "zeros". Any other encoder
    takes what its tokenizer gives."""

    pooling: Pooling | None = None
    """How the states of an encoder that is not DPR become one vector: "cls", "mean", or "pooler" (its pooled CLS).
    None: ``pooling`` of its config.json. It is asked for and not guessed: all run, and only one fits the questions."""


class EncoderRecipe(BaseModel):
    """Everything of an encoder that the embeddings depend on, but for rounding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    """Of its weights and its vocabulary, as :func:`generator_svc.fingerprint.encoder_fingerprint` computes it."""
    dtype: ComputeDtype
    type_ids: TypeIds
    pooling: Pooling
    max_tokens: int
    dimension: int
