"""Putting a trained question encoder and reader together in transformers' RAG format."""

from pathlib import Path
from typing import Any

from transformers import (
    BartForConditionalGeneration,
    DPRContextEncoder,
    DPRQuestionEncoder,
    PreTrainedTokenizerBase,
    RagConfig,
    RagTokenForGeneration,
    RagTokenizer,
)

from services.training.reader import new_generation_config


def save_rag_checkpoint(
    folder: Path,
    question_encoder: DPRQuestionEncoder,
    reader: BartForConditionalGeneration,
    question_tokenizer: PreTrainedTokenizerBase,
    reader_tokenizer: PreTrainedTokenizerBase,
    *,
    n_docs: int = 5,
) -> None:
    """Write `folder` as `RagTokenForGeneration.from_pretrained` and `RagTokenizer.from_pretrained` read it.

    Weights are stored in half precision: the models given are converted in place. The weights serve both heads, and
    ``architectures`` says so.
    """
    config = RagConfig.from_question_encoder_generator_configs(
        question_encoder.config,
        reader.config,
        n_docs=n_docs,
        title_sep=" / ",
        doc_sep=" // ",
        max_combined_length=reader_tokenizer.model_max_length,
        retrieval_vector_size=question_encoder.config.projection_dim,
        index_name="custom",
        bos_token_id=reader.config.bos_token_id,
        pad_token_id=reader.config.pad_token_id,
        eos_token_id=reader.config.eos_token_id,
        decoder_start_token_id=reader.config.decoder_start_token_id,
    )
    # The reader was trained on answers without `<s>` (`ReaderTask._labels`): scoring must not expect it either.
    config.generator.answers_begin_with_bos = False
    model = RagTokenForGeneration(config=config, question_encoder=question_encoder, generator=reader)
    model.generation_config = new_generation_config()
    model.half().save_pretrained(folder)  # type: ignore[no-untyped-call]
    model.config.architectures = ["RagTokenForGeneration", "RagSequenceForGeneration"]
    model.config.save_pretrained(folder)
    tokenizers: Any = RagTokenizer
    tokenizers(question_tokenizer, reader_tokenizer).save_pretrained(folder)


def save_context_encoder(folder: Path, encoder: DPRContextEncoder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the DPR context encoder (converted to half precision in place) and its tokenizer.

    ``passage_type_ids`` says that it was trained with title and text told apart (`services.training.retriever`), where
    DPR's published encoders read both as one segment.
    """
    encoder.config.passage_type_ids = "segments"
    encoder.half().save_pretrained(folder)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
