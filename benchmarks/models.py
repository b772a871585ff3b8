"""RAG models of published shapes with random weights, and inputs for them: the same in every process.

No weights are needed to compare times: random ones, drawn wide, make nearly every candidate of RAG-Sequence different,
which is its slowest case, and answers are kept at one length.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DPRConfig,
    DPRQuestionEncoder,
    RagConfig,
    RagTokenForGeneration,
    RagTokenizer,
)

from generator_svc.settings import DEMO_CHECKPOINT

PADDED_TO = 300  # `RagConfig.max_combined_length`, to which RagRetriever pads every context
SHORTEST = 124  # lengths are drawn evenly from here to 300: 212 on average
SPECIAL_TOKENS = 5


@dataclass(frozen=True)
class Shape:
    """``layers`` of the encoder, and as many of the decoder."""

    name: str
    layers: int
    width: int
    heads: int
    ffn: int
    vocabulary: int = 50_265
    positions: int = 1024


SHAPES = {
    "base": Shape("base", layers=6, width=768, heads=12, ffn=3072),
    "large": Shape("large", layers=12, width=1024, heads=16, ffn=4096),
    # For trying the benchmark itself, in seconds.
    "tiny": Shape("tiny", layers=2, width=64, heads=4, ffn=128, vocabulary=1000),
}


@dataclass(frozen=True)
class Inputs:
    """``input_ids`` and ``mask`` (B·N, 300) int64, padded at the right; ``doc_scores`` (B, N) float32."""

    input_ids: Tensor
    mask: Tensor
    doc_scores: Tensor

    @property
    def contexts(self) -> list[Tensor]:
        return [ids[kept.bool()] for ids, kept in zip(self.input_ids, self.mask, strict=True)]


def bart_config(shape: Shape) -> BartConfig:
    return BartConfig(
        vocab_size=shape.vocabulary,
        d_model=shape.width,
        encoder_layers=shape.layers,
        decoder_layers=shape.layers,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=shape.ffn,
        decoder_ffn_dim=shape.ffn,
        max_position_embeddings=shape.positions,
        forced_eos_token_id=None,  # every token is searched for
        init_std=0.06,  # with BART's 0.02 no document changes the answer, and the candidates are all the same
    )


def random_rag(shape: Shape, dtype: torch.dtype, device: str) -> RagTokenForGeneration:
    """A BART generator of this shape behind a question encoder that is as small as can be: it is not run here."""
    torch.manual_seed(0)
    generator = bart_config(shape)
    encoder = DPRConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model: Any = RagTokenForGeneration(
        config=RagConfig.from_question_encoder_generator_configs(encoder, generator),
        question_encoder=DPRQuestionEncoder(encoder),
        generator=BartForConditionalGeneration(generator),
    )
    made: RagTokenForGeneration = model.eval().to(device=device, dtype=dtype)
    return made


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """The demo's question encoder and index fingerprint, with a random BART of this shape as the generator.

    It reads the demo's texts with the demo's tokens; every other id of its vocabulary is a word of its own.
    """
    torch.manual_seed(0)
    model: Any = RagTokenForGeneration.from_pretrained(DEMO_CHECKPOINT, dtype=torch.float32)
    model.config.generator = bart_config(shape)
    model.rag.generator = BartForConditionalGeneration(model.config.generator)
    model.generation_config.forced_eos_token_id = None
    both_heads = model.config.architectures
    model.save_pretrained(folder)
    model.config.architectures = both_heads
    model.config.save_pretrained(folder)
    rag_tokenizer: Any = RagTokenizer
    rag_tokenizer.from_pretrained(DEMO_CHECKPOINT).save_pretrained(folder)
    written = folder / "generator_tokenizer" / "tokenizer.json"
    tokenizer = json.loads(written.read_text())
    words = tokenizer["model"]["vocab"]
    words |= {f"Ġ{number}": number for number in range(len(words), shape.vocabulary)}
    written.write_text(json.dumps(tokenizer))


def random_inputs(shape: Shape, questions: int, n_docs: int, device: str) -> Inputs:
    torch.manual_seed(1)
    rows = questions * n_docs
    lengths = torch.randint(SHORTEST, PADDED_TO + 1, (rows,))
    mask = (torch.arange(PADDED_TO)[None] < lengths[:, None]).long()
    input_ids = torch.randint(SPECIAL_TOKENS, shape.vocabulary, (rows, PADDED_TO))
    input_ids[mask == 0] = 1  # BART's padding
    return Inputs(input_ids.to(device), mask.to(device), torch.randn(questions, n_docs).to(device))
