"""A DPR pair: question and context encoder, trained to find a passage among the others of its batch.

Source: Karpukhin et al., "Dense Passage Retrieval for Open-Domain Question Answering", arXiv 2004.04906, section 3.2.

B questions or passages, D dimension.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DPRConfig, DPRContextEncoder, DPRQuestionEncoder, PreTrainedTokenizerBase

from services.training.metrics import recall_at

MAX_TRAINING_TOKENS = 80
"""Passages are cut to this many tokens while training (half of them are longer), and not at all when indexed."""


class Pair(NamedTuple):
    """A question and the passage that answers it; the other passages of its batch must not."""

    question: str
    title: str
    text: str


def new_dpr_pair(vocab_size: int, *, seed: int = 0) -> tuple[DPRQuestionEncoder, DPRContextEncoder]:
    """Question and context encoder, of 2.1 M parameters that they share.

    Shared weights put a name at the same place on both sides, one never seen before too; that is most of what there
    is to learn. Saved separately, they are an ordinary DPR pair.
    """
    torch.manual_seed(seed)
    config = DPRConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=160,
        projection_dim=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.04,
        pad_token_id=0,
    )
    question_encoder, context_encoder = DPRQuestionEncoder(config), DPRContextEncoder(config)
    context_encoder.ctx_encoder = question_encoder.question_encoder
    return question_encoder, context_encoder


def encode(
    encoder: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    max_tokens: int,
) -> Tensor:
    """Embed questions (strings) or passages ((title, text) pairs).

    Returns: (B, D), in the dtype that the encoder computes in.
    """
    # Multiples of 8 keep the number of distinct shapes small: the allocator otherwise hoards a block for each.
    inputs = tokenizer(
        list(texts),
        padding=True,
        pad_to_multiple_of=8,
        truncation=True,
        max_length=max_tokens,
        return_tensors="pt",
    )
    embeddings: Tensor = encoder(**inputs).pooler_output
    return embeddings


@torch.no_grad()
def embed(
    encoder: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    *,
    batch_size: int = 128,
) -> Tensor:
    """Embed any number of texts, uncut up to the tokenizer's limit. Returns: (B, D) float32."""
    encoder.eval()
    return torch.cat(
        [
            encode(encoder, tokenizer, texts[i : i + batch_size], tokenizer.model_max_length).float()
            for i in range(0, len(texts), batch_size)
        ]
    )


@dataclass(frozen=True)
class RetrievalDev:
    """What recall is measured on: all passages of a corpus, and questions with the indices of their passages."""

    passages: Sequence[tuple[str, str]]
    questions: Sequence[str]
    gold: Sequence[Sequence[int]]


class RetrieverTask:
    """In-batch negatives: each question against every passage of the batch, distractors included."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        draw: Callable[[random.Random], Sequence[Pair]],
        dev: RetrievalDev,
        *,
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.draw, self.dev = tokenizer, draw, dev
        self.question_encoder, self.context_encoder = new_dpr_pair(len(tokenizer), seed=seed)
        self.model = nn.ModuleDict({"question": self.question_encoder, "context": self.context_encoder})
        for encoder in (self.question_encoder, self.context_encoder):
            encoder.set_attn_implementation("eager")  # SDPA's bf16 backward is slow on a CPU

    def loss(self, rng: random.Random, progress: float) -> Tensor:  # noqa: ARG002 no curriculum here
        """Cross-entropy of the right passage under ``softmax(q . d)`` over the batch."""
        pairs = self.draw(rng)
        with torch.autocast("cpu", torch.bfloat16):
            questions = encode(self.question_encoder, self.tokenizer, [p.question for p in pairs], MAX_TRAINING_TOKENS)
            passages = encode(
                self.context_encoder,
                self.tokenizer,
                [(p.title, p.text) for p in pairs],
                MAX_TRAINING_TOKENS,
            )
        scores_BB = questions.float() @ passages.float().T
        return functional.cross_entropy(scores_BB, torch.arange(len(pairs)))

    def evaluate(self) -> dict[str, float]:
        """Recall of dev questions over the whole corpus."""
        with torch.autocast("cpu", torch.bfloat16):
            passages = embed(self.context_encoder, self.tokenizer, self.dev.passages)
            questions = embed(self.question_encoder, self.tokenizer, self.dev.questions)
        ranked = (questions @ passages.T).topk(min(5, len(passages)), dim=1).indices.tolist()
        return {f"recall@{k}": recall_at(k, ranked, self.dev.gold) for k in (1, 5)}
