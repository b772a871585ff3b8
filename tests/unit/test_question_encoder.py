"""Question vectors against transformers' `DPRQuestionEncoder`."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BartConfig,
    BertConfig,
    PreTrainedModel,
    RagConfig,
    RagTokenForGeneration,
    RagTokenizer,
)

from generator_svc.checkpoint import Checkpoint, load_checkpoint
from generator_svc.engine.affine import ENCODERS, ONEDNN_DTYPES, OneDnnLinear, use_onednn
from generator_svc.question_encoder import QuestionEncoder
from shared.errors import StartupError
from tests.tiny_checkpoint import generator_tokenizer, question_tokenizer, save_tiny_checkpoint

QUESTIONS = ["How many people live in Paris?", "who", "Where is Reykjavík, and how high is Mount Everest?"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return load_checkpoint(save_tiny_checkpoint(tmp_path))


def test_vectors_are_dprs_pooler_output(checkpoint: Checkpoint) -> None:
    transformers = copy.deepcopy(checkpoint.model.question_encoder)
    encoder = QuestionEncoder(checkpoint)
    vectors = encoder.encode(QUESTIONS)
    assert vectors.shape == (3, encoder.dimension) == (3, 16)
    assert vectors.dtype == np.float32
    for question, vector in zip(QUESTIONS, vectors, strict=True):
        alone = checkpoint.question_tokenizer(question, return_tensors="pt")
        expected = transformers(**alone).pooler_output[0].detach().numpy()
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


SMALL = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "embedding_size": 8, "projection_dim": 4,
}  # fmt: skip


def small_encoder(kind: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModel.from_config(AutoConfig.for_model(kind, **SMALL))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_gives_the_same_with_onednn(kind: str, dtype: torch.dtype) -> None:
    encoder = small_encoder(kind).to(dtype)
    linear = sum(isinstance(module, nn.Linear) for module in encoder.modules())
    ids = torch.randint(5, 50, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(11) < torch.tensor([[11], [4], [7]])).long()
    with torch.inference_mode():
        expected = encoder(input_ids=ids, attention_mask=mask)[0]
        for _ in range(2):  # the second time changes nothing
            use_onednn(encoder)
            found = encoder(input_ids=ids, attention_mask=mask)[0]
            torch.testing.assert_close(found, expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=1e-4)
    replaced = sum(isinstance(module, OneDnnLinear) for module in encoder.modules())
    assert replaced == (linear if dtype in ONEDNN_DTYPES else 0)


def test_an_encoder_of_a_kind_that_is_not_tested_keeps_its_linear_maps() -> None:
    encoder = small_encoder("albert")
    before = [type(module) for module in encoder.modules()]
    use_onednn(encoder)
    assert [type(module) for module in encoder.modules()] == before
