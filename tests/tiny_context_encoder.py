"""A random DPR context encoder and a corpus to embed with it, both small enough to be made anew in a test."""

from pathlib import Path

import pyarrow as pa
import torch
from tokenizers import Tokenizer, processors
from transformers import DPRConfig, DPRContextEncoder, PreTrainedTokenizerFast

from services.indexing.corpus import Corpus
from tests.tiny_checkpoint import ENCODER_SPECIALS, SENTENCES, question_tokenizer

DIMENSION = 16
MAX_TOKENS = 44  # no multiple of 8, and shorter than some passages


def context_tokenizer() -> PreTrainedTokenizerFast:
    """The question tokenizer, with DPR's template for a title and a text."""
    tokenizer = Tokenizer.from_str(question_tokenizer().backend_tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **ENCODER_SPECIALS,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def context_config(**changes: int) -> DPRConfig:
    options = {
        "vocab_size": len(question_tokenizer()),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": DIMENSION,
        "initializer_range": 0.2,
        **changes,
    }
    return DPRConfig(**options)


def save_context_encoder(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    DPRContextEncoder(context_config()).save_pretrained(folder)
    context_tokenizer().save_pretrained(folder)
    return folder


def passages(count: int) -> pa.Table:
    """From an empty text to one that has to be cut, in no order of length; a text may spell a special token."""
    texts = []
    for i in range(count):
        words = " ".join(SENTENCES).split() * 2
        texts.append(" ".join(words[i % 7 : i % 7 + (i * 37) % 61]) + (" [PAD] Paris" if i % 5 == 3 else ""))
    titles = [SENTENCES[i % len(SENTENCES)][: (i * 11) % 20] for i in range(count)]
    return pa.table({"id": pa.array([i * 3 + 1 for i in range(count)], pa.int64()), "title": titles, "text": texts})


def corpus_of(table: pa.Table, *, batch_rows: int = 5, identity: str = "sha256-0") -> Corpus:
    return Corpus(lambda: table.to_batches(max_chunksize=batch_rows), identity)
