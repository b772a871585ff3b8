"""A tiny BART that reads an answer off a passage.

B examples, T target tokens, V vocabulary.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig, PreTrainedTokenizerBase

from services.training.metrics import exact_match

MAX_ANSWER_TOKENS = 48
IGNORED = -100
BOS, PAD, EOS = 0, 1, 2  # BART's ids; its decoder starts with </s>


class Reading(NamedTuple):
    """A context (passage and question) with its answer; None when the passage does not tell."""

    context: str
    answer: str | None


def new_reader(vocab_size: int, *, seed: int = 0) -> BartForConditionalGeneration:
    """2 + 2 layers of width 192: 3.0 M parameters. Wider and deeper learned slower for the same CPU time."""
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=vocab_size,
        d_model=192,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=768,
        decoder_ffn_dim=768,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        max_position_embeddings=256,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        init_std=0.04,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        forced_eos_token_id=EOS,
    )
    reader = BartForConditionalGeneration(config)
    reader.generation_config = new_generation_config()
    return reader


def new_generation_config() -> GenerationConfig:
    """How the reader and the RAG model generate unless told otherwise: greedily, up to an answer's length."""
    return GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        forced_eos_token_id=EOS,
        max_length=MAX_ANSWER_TOKENS,
    )


@torch.no_grad()
def read(
    reader: Any,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[str],
    *,
    batch_size: int = 64,
) -> list[str]:
    """Greedy answers, one for each context."""
    reader.eval()
    answers: list[str] = []
    for i in range(0, len(contexts), batch_size):
        part = list(contexts[i : i + batch_size])
        inputs = tokenizer(part, padding=True, pad_to_multiple_of=8, truncation=True, return_tensors="pt")
        answers += tokenizer.batch_decode(reader.generate(**inputs), skip_special_tokens=True)
    return answers


class ReaderTask:
    """Cross-entropy of the answer; on a passage that does not tell, of saying nothing in particular.

    The second part is what lets a caller see a question that the corpus cannot answer: the first token's
    distribution is drawn towards the uniform one, so every answer becomes improbable, and under RAG's
    marginalisation a passage about something else leaves the choice to the others.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        draw: Callable[[random.Random, float], Sequence[Reading]],
        dev: Sequence[tuple[str, str]],
        *,
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.draw, self.dev = tokenizer, draw, dev
        self.model = new_reader(len(tokenizer), seed=seed)
        self.model.set_attn_implementation("eager")  # SDPA's bf16 backward is slow on a CPU

    def loss(self, rng: random.Random, progress: float) -> Tensor:
        """Mean over the batch's target tokens, a passage that does not tell counting as one token."""
        readings = self.draw(rng, progress)
        inputs = self._tokenize([r.context for r in readings])
        labels_BT = self._labels([r.answer or "" for r in readings])
        answerable_B = torch.tensor([r.answer is not None for r in readings])
        labels_BT[~answerable_B] = IGNORED
        decoder_input_BT = labels_BT.clamp(min=PAD).roll(1, dims=1)  # IGNORED becomes padding
        decoder_input_BT[:, 0] = EOS
        with torch.autocast("cpu", torch.bfloat16):
            hidden_BTD = self.model.model(
                **inputs, decoder_input_ids=decoder_input_BT, use_cache=False
            ).last_hidden_state
            # Only the positions that count are projected onto the vocabulary.
            told = self.model.lm_head(hidden_BTD[labels_BT != IGNORED]).float()
            untold = self.model.lm_head(hidden_BTD[~answerable_B, 0]).float()
        copying = functional.cross_entropy(told, labels_BT[labels_BT != IGNORED], reduction="sum")
        uniform = -math.log(untold.shape[-1])
        abstaining = (uniform - functional.log_softmax(untold, dim=-1).mean(dim=-1)).sum()  # KL(uniform || p)
        return (copying + abstaining) / (len(told) + len(untold))

    def evaluate(self) -> dict[str, float]:
        """Exact match on dev contexts that hold the answer."""
        with torch.autocast("cpu", torch.bfloat16):
            answers = read(self.model, self.tokenizer, [context for context, _ in self.dev])
        matches = [exact_match(a, gold) for a, (_, gold) in zip(answers, self.dev, strict=True)]
        return {"exact match": sum(matches) / len(matches)}

    def _tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        # Multiples of 8 keep the number of distinct shapes small: the allocator otherwise hoards a block for each.
        return dict(
            self.tokenizer(list(texts), padding=True, pad_to_multiple_of=8, truncation=True, return_tensors="pt")
        )

    def _labels(self, answers: Sequence[str]) -> Tensor:
        """Answer tokens and ``</s>``, without the ``<s>`` that the tokenizer puts first. (B, T)"""
        inputs = self._tokenize(answers)
        labels_BT = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
        return torch.cat([labels_BT[:, 1:], torch.full_like(labels_BT[:, :1], IGNORED)], dim=1)
