"""Training: tokenizers, schedule, the loop with its resume, and the examples that the demo is trained on."""

import random
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BartConfig, DPRConfig, PreTrainedTokenizerFast, RagConfig, RagTokenizer

from services.demo.build import CHECKPOINT
from services.demo.corpus import build_corpus
from services.demo.facts import fold, load_entities
from services.demo.mixture import CURRICULUM, READER_BATCH, RETRIEVER_BATCH, Mixture
from services.demo.synthetic import ExampleStream
from services.demo.train import vocabulary_names
from services.training.loop import Task, train
from services.training.metrics import auroc, exact_match, recall_at
from services.training.reader import ReaderTask, Reading
from services.training.retriever import Pair, RetrievalDev, RetrieverTask
from services.training.schedule import Schedule
from services.training.tokenizers import train_encoder_tokenizer, train_reader_tokenizer
from shared.errors import StartupError

TEXTS = [
    "Paris is a city in France. It has 2,138,551 inhabitants.",
    "São Tomé and Príncipe's capital is São Tomé.",
    "How many people live in Reykjavík?",
] * 20


@pytest.fixture(scope="module")
def reader_tokenizer() -> PreTrainedTokenizerFast:
    return train_reader_tokenizer(TEXTS, vocab_size=400)


@pytest.fixture(scope="module")
def encoder_tokenizer() -> PreTrainedTokenizerFast:
    return train_encoder_tokenizer(TEXTS, vocab_size=300)


class TestTokenizers:
    @given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40))
    def test_reader_gives_any_text_back(self, reader_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        text = unicodedata.normalize("NFC", text)
        ids = reader_tokenizer(f"x{text}")["input_ids"]
        assert reader_tokenizer.decode(ids[1:-1], skip_special_tokens=False) == f"x{text}"

    def test_digits_are_single_tokens(
        self, reader_tokenizer: PreTrainedTokenizerFast, encoder_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        assert encoder_tokenizer.tokenize("2,138") == ["2", ",", "1", "3", "8"]
        assert reader_tokenizer.tokenize("2,138") == ["Ġ2", ",", "1", "3", "8"]

    def test_a_name_has_the_same_tokens_at_the_start_and_within(
        self, reader_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        name = reader_tokenizer.tokenize("Paris")
        assert reader_tokenizer.tokenize("in Paris")[-len(name) :] == name

    def test_encoder_ignores_case_and_accents(self, encoder_tokenizer: PreTrainedTokenizerFast) -> None:
        assert encoder_tokenizer.tokenize("SÃO TOMÉ") == encoder_tokenizer.tokenize("sao tome")

    def test_both_reload_unchanged_through_rag_tokenizer(
        self,
        reader_tokenizer: PreTrainedTokenizerFast,
        encoder_tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
    ) -> None:
        RagTokenizer(encoder_tokenizer, reader_tokenizer).save_pretrained(tmp_path)
        RagConfig.from_question_encoder_generator_configs(DPRConfig(), BartConfig()).save_pretrained(tmp_path)
        loaded = RagTokenizer.from_pretrained(tmp_path)
        for ours, theirs in (
            (encoder_tokenizer, loaded.question_encoder),
            (reader_tokenizer, loaded.generator),
        ):
            assert theirs.backend_tokenizer.to_str() == ours.backend_tokenizer.to_str()
            assert theirs.special_tokens_map == ours.special_tokens_map


class TestSchedule:
    def test_rises_stays_and_falls(self) -> None:
        schedule = Schedule(steps=1000, peak=1.0, warmup=100, plateau=0.4, floor=0.02)
        rates = [schedule.rate(step) for step in range(1000)]
        assert rates[0] == pytest.approx(0.01)
        assert rates[100:401] == pytest.approx([1.0] * 301)
        assert all(later <= earlier for earlier, later in pairwise(rates[400:]))
        assert rates[-1] == pytest.approx(0.02, abs=1e-4)


def reader_task(tokenizer: PreTrainedTokenizerFast) -> ReaderTask:
    def draw(rng: random.Random, progress: float) -> list[Reading]:
        numbers = [str(rng.randint(10, 99)) for _ in range(4)]
        return [Reading(f"Paris / It has {n} people. // how many?", n) for n in numbers] + [
            Reading("Paris / It is a city. // how many?", None)
        ]

    return ReaderTask(tokenizer, draw, [("Paris / It has 42 people. // how many?", "42")])


def retriever_task(tokenizer: PreTrainedTokenizerFast) -> RetrieverTask:
    def draw(rng: random.Random) -> list[Pair]:
        numbers = rng.sample(range(10, 99), 4)
        return [Pair(f"How many people live in {n}?", f"{n}", f"{n} is a city.") for n in numbers]

    dev = RetrievalDev([("Paris", "It is a city."), ("France", "It has 2 people.")], ["Paris?"], [(0,)])
    return RetrieverTask(tokenizer, draw, dev)


class TestLoop:
    @pytest.fixture(params=["reader", "retriever"])
    def new_task(self, request, reader_tokenizer, encoder_tokenizer):  # noqa: ANN001, ANN201
        if request.param == "reader":
            return lambda: reader_task(reader_tokenizer)
        return lambda: retriever_task(encoder_tokenizer)

    def test_a_resumed_run_ends_in_the_weights_of_an_uninterrupted_one(self, new_task, tmp_path: Path) -> None:  # noqa: ANN001
        schedule = Schedule(steps=4, warmup=2)
        straight, interrupted, resumed = new_task(), new_task(), new_task()
        train(straight, schedule, tmp_path / "straight", lambda _: None)
        train(interrupted, schedule, tmp_path / "resumed", lambda _: None, stop_after=2)
        train(resumed, schedule, tmp_path / "resumed", lambda _: None)
        assert weights_equal(straight, resumed)
        assert not weights_equal(interrupted, resumed)

    def test_the_state_of_another_recipe_is_refused(self, new_task, tmp_path: Path) -> None:  # noqa: ANN001
        train(new_task(), Schedule(steps=1), tmp_path, lambda _: None, recipe={"corpus": "a"})
        with pytest.raises(StartupError, match="another recipe"):
            train(new_task(), Schedule(steps=1), tmp_path, lambda _: None, recipe={"corpus": "b"})

    def test_training_learns_and_reports(self, reader_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        events = []
        train(
            reader_task(reader_tokenizer),
            Schedule(steps=12, warmup=3),
            tmp_path,
            events.append,
            report_every=4,
        )
        losses = [event["loss"] for event in events if event["event"] == "step"]
        assert losses == sorted(losses, reverse=True)
        assert events[-1]["event"] == "evaluation"
        assert set(events[-1]) == {"event", "step", "exact match"}


def weights_equal(one: Task, other: Task) -> bool:
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    entities = load_entities()
    tokenizers = RagTokenizer.from_pretrained(CHECKPOINT)
    names = vocabulary_names(tokenizers.question_encoder, tokenizers.generator)
    return Mixture(entities, ExampleStream(entities, *names), tokenizers.question_encoder)


class TestMixture:
    def test_the_same_generator_draws_the_same_batch(self, mixture: Mixture) -> None:
        assert mixture.pairs(random.Random("0/7")) == mixture.pairs(random.Random("0/7"))
        assert mixture.readings(random.Random("0/7"), 0.5) == mixture.readings(random.Random("0/7"), 0.5)

    def test_batches_are_full(self, mixture: Mixture) -> None:
        assert len(mixture.pairs(random.Random(1))) == RETRIEVER_BATCH
        assert len(mixture.readings(random.Random(1), 0.9)) == READER_BATCH

    def test_every_answer_stands_in_its_context(self, mixture: Mixture) -> None:
        readings = [r for seed in range(5) for r in mixture.readings(random.Random(seed), 0.9)]
        assert all(reading.answer in reading.context for reading in readings if reading.answer is not None)

    def test_passages_that_do_not_tell_come_after_the_curriculum(self, mixture: Mixture) -> None:
        early = [r for seed in range(5) for r in mixture.readings(random.Random(seed), CURRICULUM * 0.9)]
        late = [r for seed in range(5) for r in mixture.readings(random.Random(seed), 0.9)]
        assert all(reading.answer is not None for reading in early)
        assert 0.05 < sum(reading.answer is None for reading in late) / len(late) < 0.25

    def test_no_held_out_entity_is_drawn(self, mixture: Mixture) -> None:
        entities = load_entities()
        held_out = {p.title for p in build_corpus(entities) if entities[p.entity].split != "train"}
        invented_by_chance = 0
        for seed in range(5):
            for pair in mixture.pairs(random.Random(seed)):
                invented_by_chance += pair.title in held_out
        assert invented_by_chance <= 5  # Markov chains spell a real name now and then

    def test_tokens_of_names_are_words_and_pieces(self) -> None:
        tokenizers = RagTokenizer.from_pretrained(CHECKPOINT)
        words, pieces = vocabulary_names(tokenizers.question_encoder, tokenizers.generator)
        assert len(words) > 1000
        assert len(pieces) > 500
        assert all(fold(word) and word.isalpha() for word in words + pieces)


class TestMetrics:
    def test_exact_match_ignores_case_articles_and_punctuation(self) -> None:
        assert exact_match("The Hague", "hague")
        assert exact_match("2,138,551.", "2138551")
        assert not exact_match("2,138,551", "2,138,552")

    def test_recall_counts_a_question_once(self) -> None:
        ranked, gold = [[3, 1], [5, 6]], [(1, 3), (9,)]
        assert recall_at(1, ranked, gold) == 0.5
        assert recall_at(2, ranked, gold) == 0.5

    @given(
        positives=st.lists(st.integers(0, 5), min_size=1, max_size=8),
        negatives=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    )
    def test_auroc_counts_pairs(self, positives: list[int], negatives: list[int]) -> None:
        pairs = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
        assert auroc(positives, negatives) == pytest.approx(sum(pairs) / len(pairs))
