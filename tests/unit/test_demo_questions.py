"""The demo's questions: paraphrases, what is kept out of training, and invented examples."""

import random
import re
from collections import Counter

import pytest

from services.demo.corpus import Passage, build_corpus
from services.demo.facts import KINDS, Entity, Kind, fold, load_entities
from services.demo.questions import Question, ask, question_set, spoken_name, unanswerable_questions
from services.demo.synthetic import ExampleStream
from services.demo.wording import WORDINGS
from services.demo.wording.frames import ALIASES, POLITE
from services.demo.wording.unanswerable import UNKNOWN_FACTS

NAME = "Qwerty"  # occurs in no wording
FACTS = [(kind, fact) for kind in KINDS for fact in WORDINGS[kind]]
FREQUENT = [
    ("city", "population"),
    ("city", "country"),
    ("country", "capital"),
    ("country", "population"),
    ("country", "currency"),
    ("country", "language"),
    ("country", "neighbours"),
    ("element", "symbol"),
    ("airport", "iata"),
]


@pytest.fixture(scope="module")
def entities() -> list[Entity]:
    return load_entities()


@pytest.fixture(scope="module")
def passages(entities: list[Entity]) -> list[Passage]:
    return build_corpus(entities)


@pytest.fixture(scope="module")
def stream(entities: list[Entity]) -> ExampleStream:
    return ExampleStream(entities, words=["canberra", "harbour", "quartz"], pieces=["berra", "wick"])


@pytest.fixture(scope="module")
def held_out_questions(entities: list[Entity], passages: list[Passage]) -> list[Question]:
    return question_set(entities, passages, "test", 400, held_out_patterns=True, seed=2)


def plain(text: str) -> str:
    """Lower case, no punctuation, no greeting, no article or noun before the name: what two wordings share."""
    for greeting in POLITE:
        text = text.removeprefix(greeting)
    words = re.sub(r"[^a-z0-9' ]", " ", text.lower()).split()
    return " ".join(words).replace("the city of qwerty", "qwerty").replace("the country qwerty", "qwerty")


# ── wording ──


@pytest.mark.parametrize(("kind", "fact"), FACTS)
def test_every_fact_is_worded_in_many_ways(kind: Kind, fact: str) -> None:
    wording = WORDINGS[kind][fact]
    assert len(wording.statements) >= 5
    assert len(wording.questions) >= 8
    assert len(wording.held_out) >= 2


@pytest.mark.parametrize(("kind", "fact"), FREQUENT)
def test_frequent_facts_are_asked_for_in_twelve_ways_and_stated_in_six(kind: Kind, fact: str) -> None:
    assert len(WORDINGS[kind][fact].statements) >= 6
    assert len(set(WORDINGS[kind][fact].questions)) >= 12


@pytest.mark.parametrize(("kind", "fact"), FACTS)
def test_patterns_have_their_slots_and_no_others(kind: Kind, fact: str) -> None:
    wording = WORDINGS[kind][fact]
    for statement in wording.statements:
        assert statement.count("{v}") == 1
        assert set(re.findall(r"{.*?}", statement)) <= {"{n}", "{v}", "{a}"}
        assert statement.endswith(".")
    assert any("{n}" in statement for statement in wording.statements)
    for question in (*wording.questions, *wording.held_out):
        assert re.findall(r"{.*?}", question) == ["{n}"]


def test_every_fact_that_entities_have_can_be_asked_for(entities: list[Entity]) -> None:
    held = {(entity.kind, fact) for entity in entities for fact in entity.facts}
    assert held == set(FACTS)


# ── what is kept out of training ──


@pytest.mark.parametrize("kind", KINDS)
def test_no_held_out_wording_is_ever_trained_on(kind: Kind) -> None:
    held_out = {
        plain(pattern.replace("{n}", NAME))
        for wordings in WORDINGS.values()
        for wording in wordings.values()
        for pattern in wording.held_out
    }
    rng = random.Random(7)
    asked = {plain(ask(rng, kind, fact, NAME) or "") for fact in WORDINGS[kind] for _ in range(1500)}
    assert len(asked) > 1000
    assert asked & held_out == set()


def test_a_held_out_question_uses_a_held_out_wording() -> None:
    rng = random.Random(3)
    held_out = {pattern.replace("{n}", NAME) for pattern in WORDINGS["city"]["population"].held_out}
    asked = {ask(rng, "city", "population", NAME, held_out_pattern=True, augment=False) for _ in range(100)}
    assert asked == held_out


def test_held_out_questions_are_spread_over_wh_forms(held_out_questions: list[Question]) -> None:
    openings = Counter(question.text.split()[0].lower() for question in held_out_questions)
    assert {"what", "which", "how", "in", "on"} <= set(openings)
    assert max(openings.values()) < 0.5 * len(held_out_questions)


# ── asking ──


def test_the_same_seed_asks_the_same_questions(entities: list[Entity], passages: list[Passage]) -> None:
    assert question_set(entities, passages, "dev", 50, seed=5) == question_set(entities, passages, "dev", 50, seed=5)
    assert question_set(entities, passages, "dev", 50, seed=5) != question_set(entities, passages, "dev", 50, seed=6)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_questions_are_about_entities_of_their_split(
    entities: list[Entity], passages: list[Passage], split: str
) -> None:
    splits = {(entity.kind, entity.name): entity.split for entity in entities}
    asked = question_set(entities, passages, split, 200, seed=1)  # type: ignore[arg-type]  # parametrized by hand
    assert {splits[question.kind, question.entity] for question in asked} == {split}


def test_gold_passages_are_those_that_state_the_answer(
    entities: list[Entity], passages: list[Passage], held_out_questions: list[Question]
) -> None:
    for question in held_out_questions:
        about = [p for p in passages if (e := entities[p.entity]).name == question.entity and e.kind == question.kind]
        assert question.gold == tuple(p.id for p in about if question.fact in p.facts)
        assert all(question.answer in passages[i].text for i in question.gold)
        assert question.gold


def test_plain_questions_are_well_formed() -> None:
    rng = random.Random(1)
    for kind, fact in FACTS:
        text = ask(rng, kind, fact, "Paris", augment=False)
        assert text is not None
        assert "paris" in text.lower()
        assert text[0].isupper()


def test_airports_are_asked_about_by_the_short_forms_that_people_use() -> None:
    rng = random.Random(1)
    full = "Paris Charles de Gaulle International Airport"
    asked = [ask(rng, "airport", "iata", full, augment=False) or "" for _ in range(400)]
    assert any("Paris Charles de Gaulle?" in text for text in asked)
    assert any("Paris Charles de Gaulle Airport" in text for text in asked)


def test_an_airport_stays_an_airport_where_its_city_would_answer_differently() -> None:
    rng = random.Random(1)
    asked = [ask(rng, "airport", "country", "Perth International Airport") or "" for _ in range(400)]
    assert all("airport" in text.lower() for text in asked)


def test_names_are_typed_without_their_accents_too() -> None:
    rng = random.Random(1)
    asked = [ask(rng, "city", "population", "Łódź", augment=False) or "" for _ in range(100)]
    assert {"Łódź" in text for text in asked} == {True, False}
    assert all("Łódź" in text or "Lodz" in text for text in asked)


def test_only_trained_entities_are_asked_about_by_names_that_nobody_could_guess(entities: list[Entity]) -> None:
    splits = {entity.name: entity.split for entity in entities}
    assert {splits[name] for name in ALIASES} == {"train"}
    (britain,) = [entity for entity in entities if entity.name == "United Kingdom"]
    rng = random.Random(1)
    assert {spoken_name(rng, britain, "capital") for _ in range(200)} == {"United Kingdom", "UK", "Great Britain"}


# ── what the corpus cannot answer ──


def test_a_hundred_unanswerable_questions_are_all_different_and_repeatable(entities: list[Entity]) -> None:
    questions = unanswerable_questions(entities)
    assert len(set(questions)) == len(questions) == 100
    assert questions == unanswerable_questions(entities)


def test_unanswerable_questions_name_nothing_in_the_corpus_or_ask_what_it_does_not_hold(
    entities: list[Entity],
) -> None:
    unheld = [
        re.escape(pattern).replace(re.escape("{n}"), "(.+)")
        for patterns in UNKNOWN_FACTS.values()
        for pattern in patterns
    ]
    folded = {f" {fold(entity.name)} " for entity in entities}
    strangers = 0
    for question in unanswerable_questions(entities):
        if any(re.fullmatch(pattern, question) for pattern in unheld):
            continue
        strangers += 1
        words = " " + " ".join(re.findall(r"[\w'-]+", fold(question))) + " "
        assert [name for name in folded if len(name) > 6 and name in words and name not in ORDINARY] == [], question
    assert strangers >= 60


ORDINARY = {" home "}  # words of a question that happen to be the name of a town


# ── invented examples ──


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_states_its_answer(stream: ExampleStream, kind: Kind) -> None:
    rng = random.Random(4)
    for max_facts in (1, 3, 7) * 100:
        example = stream.example(rng, stream.entity(rng, kind), max_facts)
        assert example.kind == kind
        assert example.fact in example.facts
        assert example.answer in example.text
        assert len(example.facts) <= max_facts


def test_examples_repeat_for_the_same_seed(entities: list[Entity]) -> None:
    def drawn() -> list[object]:
        fresh, rng = ExampleStream(entities, ["quartz"], ["wick"]), random.Random(9)
        return [fresh.example(rng, fresh.entity(rng)) for _ in range(50)]

    assert drawn() == drawn()


def test_invented_names_are_new_and_some_are_made_of_the_tokenizers_words(
    entities: list[Entity], stream: ExampleStream
) -> None:
    rng = random.Random(2)
    names = [stream.name(rng) for _ in range(1000)]
    assert 0.25 < sum(bool(re.match("Canberra|Harbour|Quartz", name)) for name in names) / 1000 < 0.45
    real = {entity.name for entity in entities}
    assert len(set(names) - real) > 550


def test_a_mutated_name_is_near_but_not_the_same(stream: ExampleStream) -> None:
    rng = random.Random(2)
    for name in ("Paris", "New Delhi", "Ouagadougou"):
        mutated = [stream.mutate_name(rng, name) for _ in range(50)]
        assert sum(m != name for m in mutated) >= 48
        assert all(set(m.lower()) & set(name.lower()) for m in mutated)


def test_nothing_is_learnt_from_entities_that_are_held_out() -> None:
    train = [Entity("city", f"Aaaa{i}", "train", {"population": "1,000", "country": "Aaland"}) for i in range(5)]
    country = [Entity("country", "Aaland", "train", {"capital": "Aaaa"})]
    hidden = [Entity("city", f"Zzzz{i}", "test", {"population": "1,000", "country": "Zzland"}) for i in range(50)]
    stream, rng = ExampleStream(train + country + hidden), random.Random(1)
    drawn = [stream.entity(rng, "city") for _ in range(300)]
    assert not any("zz" in (entity.name + entity.facts.get("country", "")).lower() for entity in drawn)
