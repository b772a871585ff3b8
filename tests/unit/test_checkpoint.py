"""Checkpoints that load, and those that are refused with the reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BartConfig, RagModel

from generator_svc.checkpoint import load_checkpoint
from generator_svc.contexts import ContextForm
from generator_svc.engine import RagEngine
from generator_svc.fingerprint import encoder_fingerprint
from generator_svc.question_encoder import QuestionEncoder
from shared.errors import InvalidRequest, StartupError
from tests.published_form import publish_rag
from tests.tiny_checkpoint import BOTH_HEADS, SENTENCES, generator_tokenizer, save_tiny_checkpoint, tiny_model

TOKEN, SEQUENCE = BOTH_HEADS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_checkpoint(tmp_path / "tiny")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_load_as_they_were_saved_tied_ones_included(folder: Path) -> None:
    loaded, made = load_checkpoint(folder).model.state_dict(), tiny_model().state_dict()
    assert loaded.keys() == made.keys()
    assert all(torch.equal(loaded[name], made[name]) for name in made)


def test_half_precision_on_disk_keeps_the_encoders_fingerprint(tmp_path: Path) -> None:
    half = load_checkpoint(save_tiny_checkpoint(tmp_path / "half", dtype=torch.float16))
    assert half.model.generator.dtype == torch.float32
    expected = tiny_model().half().float()
    assert half.encoder == encoder_fingerprint(expected.question_encoder, half.question_tokenizer)


def test_the_question_encoder_stays_in_float32(folder: Path) -> None:
    checkpoint = load_checkpoint(folder, dtype=torch.bfloat16)
    assert checkpoint.model.generator.dtype == torch.bfloat16
    assert checkpoint.model.question_encoder.dtype == torch.float32
    assert checkpoint.encoder == load_checkpoint(folder).encoder


@pytest.mark.parametrize(
    ("architectures", "strategies"),
    [
        ([TOKEN], ("token",)),
        ([SEQUENCE], ("sequence",)),
        ([SEQUENCE, TOKEN], ("sequence", "token")),
        (["RagModel"], ("token", "sequence")),
        (None, ("token", "sequence")),
    ],
)
def test_architectures_say_which_heads_may_answer(
    tmp_path: Path, architectures: list[str] | None, strategies: tuple[str, ...]
) -> None:
    checkpoint = load_checkpoint(save_tiny_checkpoint(tmp_path, architectures=architectures))
    assert checkpoint.strategies == strategies
    assert checkpoint.strategy(None) == strategies[0]


def test_the_other_head_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, architectures=[SEQUENCE])
    with pytest.raises(InvalidRequest, match="trained for strategy 'sequence'") as refused:
        load_checkpoint(tmp_path).strategy("token")
    assert refused.value.param == "strategy"
    assert load_checkpoint(tmp_path, any_strategy=True).strategies == ("sequence", "token")


def test_a_bare_rag_model_loads(tmp_path: Path, folder: Path) -> None:
    bare = RagModel(tiny_model().config, tiny_model().question_encoder, tiny_model().generator)
    bare.save_pretrained(tmp_path / "bare")
    for tokenizer in ("question_encoder_tokenizer", "generator_tokenizer"):
        shutil.copytree(folder / tokenizer, tmp_path / "bare" / tokenizer)
    assert load_checkpoint(tmp_path / "bare").strategies == ("token", "sequence")


def test_weights_that_rag_never_reads_are_let_be(folder: Path) -> None:
    bert = "rag.question_encoder.question_encoder.bert_model"  # published checkpoints have these
    unused = {f"{bert}.pooler.dense.weight": torch.zeros(2, 2), f"{bert}.embeddings.position_ids": torch.arange(48)}
    edit_weights(folder, lambda weights: weights.update(unused))
    load_checkpoint(folder)


def test_missing_left_over_and_misshapen_weights_are_all_listed(folder: Path) -> None:
    layer = "rag.generator.model.decoder.layers.0"

    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights[f"{layer}.fc1.weight"]
        weights["rag.generator.model.decoder.layers.7.fc1.weight"] = torch.zeros(2)
        weights[f"{layer}.fc2.weight"] = torch.zeros(3, 3)

    edit_weights(folder, change)
    with pytest.raises(StartupError) as refused:
        load_checkpoint(folder)
    assert f"1 missing: {layer}.fc1.weight" in refused.value.message
    assert "1 left over: rag.generator.model.decoder.layers.7.fc1.weight" in refused.value.message
    assert f"1 of another shape: {layer}.fc2.weight (3, 3), not (32, 48)" in refused.value.message


@pytest.mark.parametrize("missing", ["question_encoder_tokenizer", "generator_tokenizer"])
def test_a_missing_tokenizer_is_named(folder: Path, missing: str) -> None:
    shutil.rmtree(folder / missing)
    with pytest.raises(StartupError, match=missing):
        load_checkpoint(folder)


def test_swapped_tokenizers_are_refused(folder: Path) -> None:
    (folder / "question_encoder_tokenizer").rename(folder / "other")
    (folder / "generator_tokenizer").rename(folder / "question_encoder_tokenizer")
    (folder / "other").rename(folder / "generator_tokenizer")
    with pytest.raises(StartupError, match="tokenizer"):
        load_checkpoint(folder)


def test_a_tokenizer_larger_than_the_embedding_table_is_refused(folder: Path) -> None:
    larger = generator_tokenizer().__class__.from_pretrained(folder / "generator_tokenizer")
    larger.add_tokens(["<one>", "<more>"])
    larger.save_pretrained(folder / "generator_tokenizer")
    with pytest.raises(StartupError, match=r"generator_tokenizer has \d+ tokens and the generator embeds \d+"):
        load_checkpoint(folder)


@pytest.mark.parametrize(("token", "reason"), [("<unk>", "pad_token_id 3 and .* 1"), (None, "no padding token")])
def test_a_tokenizer_with_other_special_tokens_is_refused(folder: Path, token: str | None, reason: str) -> None:
    other = generator_tokenizer().__class__.from_pretrained(folder / "generator_tokenizer")
    other.pad_token = token
    other.save_pretrained(folder / "generator_tokenizer")
    with pytest.raises(StartupError, match=reason):
        load_checkpoint(folder)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    BartConfig().save_pretrained(tmp_path)
    with pytest.raises(StartupError, match="'bart' model, not a RAG checkpoint"):
        load_checkpoint(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"there is no checkpoint folder .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("spoilt", ["config.json", "model.safetensors"])
def test_a_broken_file_is_a_start_up_error(folder: Path, spoilt: str) -> None:
    (folder / spoilt).write_bytes(b"\x00not what it says")
    with pytest.raises(StartupError, match="cannot read"):
        load_checkpoint(folder)


def test_without_a_decoder_start_token_no_answer_can_begin(folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        for part in (config, config.get("generator", {})):
            part["decoder_start_token_id"] = None
        (folder / name).write_text(json.dumps(config))
    with pytest.raises(StartupError, match="decoder_start_token_id"):
        load_checkpoint(folder)


def test_a_checkpoint_in_the_form_of_2020_is_what_it_is_in_todays(tmp_path: Path) -> None:
    today, published = (save_tiny_checkpoint(tmp_path / form) for form in ("today", "published"))
    publish_rag(published)
    loaded = [load_checkpoint(folder) for folder in (today, published)]
    assert loaded[0].encoder == loaded[1].encoder
    for tokenizer in ("question_tokenizer", "generator_tokenizer"):
        ids, of_2020 = (getattr(checkpoint, tokenizer)(list(SENTENCES))["input_ids"] for checkpoint in loaded)
        assert ids == of_2020
    texts = [checkpoint.generator_tokenizer.decode(ids[0], skip_special_tokens=True) for checkpoint in loaded]
    assert texts == [SENTENCES[0]] * 2
    vectors = [QuestionEncoder(checkpoint).encode(SENTENCES) for checkpoint in loaded]
    assert (vectors[0] == vectors[1]).all()
    assert ContextForm.of(loaded[1].config, 9).prefix == " "
    contexts = [torch.tensor(row) for row in ids[:6]]
    for strategy in ("token", "sequence"):
        answers, of_2020 = (
            RagEngine.from_pretrained(folder).generate(
                torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True, padding_value=1),
                torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in contexts], batch_first=True),
                torch.zeros(2, 3),
                strategy=strategy,
            )
            for folder in (today, published)
        )
        assert torch.equal(answers.sequences, of_2020.sequences)
        assert answers.log_probs == pytest.approx(of_2020.log_probs)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows what Linux tells of a process")
def test_an_engine_leaves_nothing_of_the_file_in_memory(folder: Path) -> None:
    """transformers maps the file; the weights are held in another order, and would be there twice."""
    engine = RagEngine.from_pretrained(folder)
    assert engine.checkpoint.dtype == torch.float32
    assert str(folder) not in Path("/proc/self/maps").read_text()
