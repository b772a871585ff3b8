"""Answers as text and as tokens."""

from pathlib import Path

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer, RagConfig

from generator_svc.answers import AnswerCodec
from generator_svc.checkpoint import load_checkpoint
from shared.errors import InvalidRequest
from tests.tiny_checkpoint import generator_tokenizer, save_tiny_checkpoint

START, BOS, EOS = 2, 0, 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["2138551", "Carl Wilhelm Scheele", "Reykjavík / W // it's"])
def test_text_and_tokens_lead_to_each_other(folder: Path, text: str) -> None:
    codec = AnswerCodec(load_checkpoint(folder))
    sequence = codec.encode(text).sequence
    assert sequence[:2] == [START, BOS]
    assert sequence[-1] == EOS
    assert codec.text([*sequence, 1, 1]) == text


def test_the_first_word_is_the_token_that_it_is_within_a_passage(folder: Path) -> None:
    first = AnswerCodec(load_checkpoint(folder)).encode("Paris").sequence[2]
    within = generator_tokenizer()("in Paris", add_special_tokens=False)["input_ids"]
    assert first in within


def test_no_second_space_is_put_where_the_tokenizer_puts_one(folder: Path) -> None:
    # As the demo's tokenizer does: its own space in front of every text.
    tokenizer = AutoTokenizer.from_pretrained(folder / "generator_tokenizer")
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.save_pretrained(folder / "generator_tokenizer")
    codec = AnswerCodec(load_checkpoint(folder))
    assert codec.encode("Paris").sequence[1:] == tokenizer("Paris")["input_ids"]


def test_a_forced_beginning_and_the_end_are_added_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, forced_bos=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "generator_tokenizer")
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(tmp_path / "generator_tokenizer")
    sequence = AnswerCodec(load_checkpoint(tmp_path)).encode("Paris").sequence
    assert sequence[:2] == [START, BOS]
    assert sequence[-1] == EOS


def test_an_answer_longer_than_the_generator_writes_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="159 tokens") as refused:
        AnswerCodec(load_checkpoint(folder)).encode("Paris " * 160)
    assert refused.value.param == "answers"


def test_a_checkpoint_trained_on_answers_without_a_beginning_is_scored_without_it(folder: Path) -> None:
    # As the demo's reader was: it never writes the `<s>` that its tokenizer puts first.
    config = RagConfig.from_pretrained(folder)
    config.generator.answers_begin_with_bos = False
    config.save_pretrained(folder)
    sequence = AnswerCodec(load_checkpoint(folder)).encode("Paris").sequence
    assert sequence == [START, *generator_tokenizer()(" Paris", add_special_tokens=False)["input_ids"], EOS]
