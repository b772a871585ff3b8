"""Question vectors against transformers' `DPRQuestionEncoder`."""

from pathlib import Path

import numpy as np
import pytest
from transformers import BartConfig, BertConfig, RagConfig, RagTokenForGeneration, RagTokenizer

from generator_svc.checkpoint import Checkpoint, load_checkpoint
from generator_svc.question_encoder import QuestionEncoder
from shared.errors import StartupError
from tests.tiny_checkpoint import generator_tokenizer, question_tokenizer, save_tiny_checkpoint

QUESTIONS = ["How many people live in Paris?", "who", "Where is Reykjavík, and how high is Mount Everest?"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


def test_vectors_are_dprs_pooler_output(checkpoint: Checkpoint) -> None:
    encoder = QuestionEncoder(checkpoint)
    vectors = encoder.encode(QUESTIONS)
    assert vectors.shape == (3, encoder.dimension) == (3, 16)
    assert vectors.dtype == np.float32
    for question, vector in zip(QUESTIONS, vectors, strict=True):
        alone = checkpoint.question_tokenizer(question, return_tensors="pt")
        expected = checkpoint.model.question_encoder(**alone).pooler_output[0].detach().numpy()
        assert vector == pytest.approx(expected, abs=1e-5)


def test_a_question_beyond_the_position_table_is_cut_at_the_right(checkpoint: Checkpoint) -> None:
    encoder = QuestionEncoder(checkpoint)
    long = "how many " * 200
    [vector, beginning] = encoder.encode([long, "how many " * 23])
    assert vector == pytest.approx(beginning, abs=1e-5)


def test_an_encoder_that_does_not_pool_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertConfig(vocab_size=len(question_tokenizer()), **sizes)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartConfig(vocab_size=len(generator_tokenizer()), d_model=16, **layers, **heads)
    RagTokenForGeneration(RagConfig.from_question_encoder_generator_configs(bert, bart)).save_pretrained(tmp_path)
    RagTokenizer(question_tokenizer(), generator_tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(StartupError, match="not one vector a question"):
        QuestionEncoder(load_checkpoint(tmp_path))
