"""Answers as text and as tokens."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, RagConfig

from generator_svc.answers import AnswerCodec
from generator_svc.checkpoint import Checkpoint, load_checkpoint
from generator_svc.settings import DEMO_CHECKPOINT
from shared.errors import InvalidRequest
from tests.tiny_checkpoint import GENERATOR_SPECIALS, SENTENCES, generator_tokenizer, save_tiny_checkpoint

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


def words_with_spaces() -> PreTrainedTokenizerFast:
    """As T5 has it: "▁" before a word, and none of it at the beginning of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=list(GENERATOR_SPECIALS.values()), show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **GENERATOR_SPECIALS)


@pytest.mark.parametrize("kind", ["bart", "t5", "demo"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_tokens_of_an_answer_join_to_its_text(kind: str, data: st.DataObject) -> None:
    checkpoint = checkpoint_of(kind)
    codec, tokenizer = AnswerCodec(checkpoint), checkpoint.generator_tokenizer
    # no part of a character
    whole = sorted(number for name, number in tokenizer.get_vocab().items() if name.strip("Ġ▁").isascii())
    ids = data.draw(st.lists(st.sampled_from(whole), max_size=12))
    written = zip(codec.tokens(ids), ids, strict=True)
    words = [token for token, number in written if number not in tokenizer.all_special_ids]
    assert "".join(words).rstrip() == codec.text(ids)


@cache
def checkpoint_of(kind: str) -> Checkpoint:
    if kind == "demo":
        return load_checkpoint(DEMO_CHECKPOINT)
    with TemporaryDirectory() as folder:
        checkpoint = load_checkpoint(save_tiny_checkpoint(Path(folder)))
    return checkpoint if kind == "bart" else replace(checkpoint, generator_tokenizer=words_with_spaces())


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
