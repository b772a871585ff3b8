"""The demo corpus: each entity's facts put into short passages with varied wording."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from services.demo.facts import Entity, Kind
from services.demo.wording import NAME, PRONOUNS, WORDINGS

MAX_FACTS = 7
PRONOUN_RATE = 0.6

# A country and an element have several passages, each on one theme; cities and airports have one.
THEMES: dict[Kind, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "country": (
        (NAME, ("continent", "capital", "population", "area", "currency", "language", "largest_city")),
        ("Geography of {n}", ("neighbours", "neighbour_count", "area", "subregion", "continent", "population_density")),
        ("Cities of {n}", ("largest_city", "largest_city_population", "second_city", "second_city_population")),
        (
            "Capital of {n}",
            ("capital", "capital_population", "capital_coordinates", "capital_timezone"),
        ),
        ("People of {n}", ("population", "population_density", "demonym", "language", "languages")),
        ("Money of {n}", ("currency", "currency_code", "currency_symbol")),
        ("Codes of {n}", ("calling_code", "tld", "iso2", "iso3", "iso_number")),
    ),
    "element": (
        (NAME, ("symbol", "number", "mass", "category", "discoverer", "discovery_year", "discovery_place")),
        (
            "Properties of {n}",
            (
                "phase",
                "melting_point",
                "boiling_point",
                "density",
                "electronegativity",
                "period",
                "group",
                "block",
            ),
        ),
    ),
}

# Facts that a passage keeps when it cannot hold all.
LEADING: dict[Kind, tuple[str, ...]] = {
    "city": ("country", "population"),
    "country": ("continent", "capital"),
    "element": ("symbol", "number"),
    "airport": ("country", "city", "iata"),
}

# Values that take a definite article in a sentence ("a city in the Netherlands").
COUNTRY_FACTS = frozenset({"country", "capital_of", "discovery_place"})
_ARTICLE_WORDS = frozenset({"Islands", "Republic", "States", "Kingdom", "Emirates", "Territory", "Territories"})
_ARTICLE_NAMES = frozenset(
    ("Bahamas", "Comoros", "Gambia", "Maldives", "Netherlands", "Philippines", "Seychelles", "Vatican")
)
_ARTICLE_ALIASES = frozenset({"DR Congo", "UAE", "UK", "US", "USA"})


@dataclass(frozen=True)
class Passage:
    """One document of the corpus; `id` is its position, `facts` are those that `text` states verbatim."""

    id: int
    title: str
    text: str
    entity: int
    """Index into the entities that the corpus was built from."""
    facts: tuple[str, ...]


def build_corpus(entities: Sequence[Entity], seed: int = 13) -> list[Passage]:
    """Every entity's passages, in the order of `entities`; the same for the same seed on every machine."""
    rng = random.Random(seed)
    passages: list[Passage] = []
    for index, entity in enumerate(entities):
        for title, facts in passage_groups(entity):
            text, stated = render_passage(rng, entity, title, facts, MAX_FACTS)
            passages.append(Passage(len(passages), title, text, index, stated))
    return passages


def passage_groups(entity: Entity) -> list[tuple[str, list[str]]]:
    """The passages that an entity has: each with its title and the facts that it may state."""
    themes = THEMES.get(entity.kind, ((NAME, tuple(WORDINGS[entity.kind])),))
    groups = []
    for title, facts in themes:
        held = [fact for fact in facts if fact in entity.facts]
        if held:
            groups.append((title.replace(NAME, entity.name), held))
    return groups


def render_passage(
    rng: random.Random,
    entity: Entity,
    title: str,
    facts: Sequence[str],
    max_facts: int,
    *,
    must: str | None = None,
) -> tuple[str, tuple[str, ...]]:
    """State up to `max_facts` of `facts` in random order; returns the text and the facts that it states.

    `must` is always among them; a passage about the entity as a whole (its title is the name) keeps the leading ones.
    """
    chosen = list(facts)
    if len(chosen) > max_facts:
        kept = [must] if must is not None else []
        first = LEADING[entity.kind] if title == entity.name and (must is None or rng.random() < 0.7) else ()
        leading = [fact for fact in chosen if fact in first and fact != must]
        others = [fact for fact in chosen if fact not in first and fact != must]
        rng.shuffle(others)
        chosen = (kept + leading + others)[:max_facts]
    rng.shuffle(chosen)
    sentences = [_state(rng, entity, fact, opening=i == 0) for i, fact in enumerate(chosen)]
    return " ".join(sentences), tuple(chosen)


def with_article(name: str) -> str:
    """`the Netherlands`, but `France`."""
    known = name in _ARTICLE_NAMES | _ARTICLE_ALIASES
    definite = known or name.rsplit(maxsplit=1)[-1] in _ARTICLE_WORDS or " of the " in name
    return f"the {name}" if definite else name


def _named(entity: Entity) -> str:
    """The name as it stands inside a sentence."""
    if entity.kind == "country":
        return with_article(entity.name)
    return entity.name.lower() if entity.kind == "element" else entity.name


def _state(rng: random.Random, entity: Entity, fact: str, *, opening: bool) -> str:
    """One sentence that states a fact; the sentence that opens a passage names its subject."""
    statements = WORDINGS[entity.kind][fact].statements
    if opening:
        statements = tuple(s for s in statements if NAME in s) or statements
    pattern = rng.choice(statements)
    value = entity.facts[fact]
    article = "an" if value[0].lower() in "aeiou" else "a"
    value = with_article(value) if fact in COUNTRY_FACTS else value
    starts = pattern.startswith(NAME)
    nouns = [p for p in PRONOUNS[entity.kind] if p.split()[-1].lower() not in pattern.split()]
    pronouns = nouns if starts else nouns[1:]  # "it" would be clumsy inside a sentence
    if opening or not pronouns or rng.random() >= PRONOUN_RATE:
        subject = _named(entity)
    else:
        subject = rng.choice(pronouns)
        if subject == "It":
            pattern = pattern.replace(f"{NAME}'s", "Its")
        if not starts:
            subject = subject.lower()
    sentence = pattern.replace("{a}", article).replace("{v}", value).replace(NAME, subject)
    return sentence[0].upper() + sentence[1:]
