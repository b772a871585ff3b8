"""Random RAG checkpoints in transformers' format, small enough to be made anew in a test.

DPR question encoder (one layer, 16 dimensions) and BART (1 + 1 layers, width 32) with tokenizers made from the few
sentences below: uncased WordPiece as DPR has, byte-level BPE as BART has (a word's space belongs to its token, none is
added in front of the text). Weights are drawn wide, so that distributions are peaked and documents matter.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DPRConfig,
    DPRQuestionEncoder,
    PreTrainedTokenizerFast,
    RagConfig,
    RagTokenForGeneration,
    RagTokenizer,
)

BOTH_HEADS = ("RagTokenForGeneration", "RagSequenceForGeneration")
ENCODER_SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
GENERATOR_SPECIALS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
SENTENCES = (
    "How many people live in Paris?",
    "Paris is the capital of France. It has 2138551 inhabitants, and it lies on the Seine.",
    "What is the melting point of tungsten?",
    "Tungsten / W // a chemical element, melts at 3422 degrees; it's the highest of all metals.",
    "who discovered oxygen",
    "Oxygen was discovered by Carl Wilhelm Scheele in 1771 and, independently, by Joseph Priestley.",
    "Where is Reykjavík, and how high is Mount Everest?",
)


@cache
def question_tokenizer() -> PreTrainedTokenizerFast:
    # Whole words and single characters, in order: the trainer of WordPiece breaks ties differently each time.
    normalizer = normalizers.BertNormalizer(lowercase=True)
    text = normalizer.normalize_str(" ".join(SENTENCES))
    words, characters = sorted(set(re.findall(r"\w+", text))), sorted(set(text) - {" "})
    pieces = [*ENCODER_SPECIALS.values(), *characters, *(f"##{character}" for character in characters), *words]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=ENCODER_SPECIALS["unk_token"]))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **ENCODER_SPECIALS,
        model_max_length=48,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@cache
def generator_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=360,
            special_tokens=list(GENERATOR_SPECIALS.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **GENERATOR_SPECIALS,
        mask_token="<mask>",  # noqa: S106  the last id, as in BART
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_model(
    *,
    seed: int = 0,
    n_docs: int = 3,
    forced_bos: bool = False,
    forced_eos: bool = True,
    eos_bias: float = 4.0,
    mask_row: bool = True,
    **rag_config: Any,
) -> RagTokenForGeneration:
    """A random model for the tokenizers above, in evaluation mode. `eos_bias` makes answers end early;
    without `mask_row` the last token, <mask>, has no embedding, as in some published checkpoints.
    """
    torch.manual_seed(seed)
    # Drawn wider than is usual: 0.02 gives distributions so flat that no document changes the answer.
    encoder = DPRConfig(
        vocab_size=len(question_tokenizer()),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=48,
        projection_dim=16,
        initializer_range=0.2,
    )
    generator = BartConfig(
        vocab_size=len(generator_tokenizer()) - (not mask_row),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=160,
        init_std=0.3,
        forced_eos_token_id=2 if forced_eos else None,
    )
    settings: dict[str, Any] = {"n_docs": n_docs, "max_combined_length": 96, "retrieval_vector_size": 16, **rag_config}
    config = RagConfig.from_question_encoder_generator_configs(encoder, generator, **settings)
    model = RagTokenForGeneration(
        config=config, question_encoder=DPRQuestionEncoder(encoder), generator=BartForConditionalGeneration(generator)
    ).eval()
    model.generator.final_logits_bias[0, 2] = eos_bias
    model.generation_config.forced_bos_token_id = 0 if forced_bos else None
    return model


def save_tiny_checkpoint(
    folder: Path, *, architectures: Sequence[str] | None = BOTH_HEADS, dtype: torch.dtype = torch.float32, **model: Any
) -> Path:
    """Write a checkpoint as `RagTokenForGeneration.from_pretrained` and `RagTokenizer.from_pretrained` read it."""
    made = tiny_model(**model).to(dtype)
    made.save_pretrained(folder)
    made.config.architectures = None if architectures is None else list(architectures)
    made.config.save_pretrained(folder)
    RagTokenizer(question_tokenizer(), generator_tokenizer()).save_pretrained(folder)
    return folder
