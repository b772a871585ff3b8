"""Endless invented entities in the corpus's wording.

A model that has seen a name or a value only once learns to remember it; one that meets a new one in every example
learns to copy it from the passage. Names come from Markov chains over real names and, for a third, from the
vocabularies of the two tokenizers, so that every token has been part of some name.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.demo.corpus import MAX_FACTS, passage_groups, render_passage
from services.demo.facts import KINDS, Entity, Kind
from services.demo.figures import FIGURES
from services.demo.names import MarkovNames
from services.demo.questions import ask, spoken_name
from services.demo.values import listing
from services.demo.wording import WORDINGS

KIND_WEIGHTS: dict[Kind, float] = {"city": 0.4, "country": 0.35, "element": 0.14, "airport": 0.11}
TOKEN_NAME_RATE = 0.35
KEEP_REAL_RATE = 0.35  # of values that are names: the real ones are met again in the corpus

# Facts whose values are names, and what such values are made with.
PLACES = ("capital", "capital_of", "city", "country", "discovery_place", "largest_city", "second_city", "state")
NAMED = frozenset(
    (*PLACES, "capital_timezone", "currency", "demonym", "discoverer", "language", "neighbours", "timezone")
)
MONEY = ("Dollar", "Franc", "Peso", "Dinar", "Rupee", "Krona", "Pound")
ZONES = ("Europe", "Asia", "Africa", "America", "Pacific", "Australia")


@dataclass(frozen=True)
class Example:
    """A question with its answer and a passage that states it among `facts`."""

    question: str
    answer: str
    title: str
    text: str
    kind: Kind
    fact: str
    entity: str
    facts: tuple[str, ...]


class ExampleStream:
    """Draws synthetic entities and examples; learns only from entities of the training split."""

    def __init__(self, entities: Sequence[Entity], words: Sequence[str] = (), pieces: Sequence[str] = ()) -> None:
        """Take names and values from `entities`; `words` and `pieces` are items of the tokenizers' vocabularies."""
        train = [entity for entity in entities if entity.split == "train"]
        cities = [entity.name for entity in train if entity.kind == "city"]
        self._chains = {order: MarkovNames(cities, order) for order in (2, 3)}
        self._values: dict[tuple[Kind, str], list[str]] = defaultdict(list)
        for entity in train:
            for fact, value in entity.facts.items():
                self._values[entity.kind, fact].append(value)
        of_kind = Counter(entity.kind for entity in train)
        self._rate = {(kind, fact): len(values) / of_kind[kind] for (kind, fact), values in self._values.items()}
        self._countries = [entity.name for entity in train if entity.kind == "country"]
        self._words, self._pieces = tuple(words), tuple(pieces)

    def entity(self, rng: random.Random, kind: Kind | None = None) -> Entity:
        """An invented entity with the facts that its kind may have."""
        kind = kind or rng.choices(KINDS, [KIND_WEIGHTS[k] for k in KINDS])[0]
        facts: dict[str, str] = {}
        while not facts:
            for fact in WORDINGS[kind]:
                rate = self._rate.get((kind, fact))
                if rate and rng.random() < min(0.9, max(0.15, rate)):
                    facts[fact] = self._value(rng, kind, fact)
        return Entity(kind, self._name_of(rng, kind, facts), "train", facts)

    def name(self, rng: random.Random) -> str:
        """An invented name."""
        draw = rng.random()
        if self._words and draw < TOKEN_NAME_RATE:
            return self._name_of_tokens(rng)
        if draw < 0.85:
            name = self._chains[3 if rng.random() < 0.6 else 2].sample(rng)
        else:
            syllables = (rng.choice("bcdfghjklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))
            name = "".join(syllables).capitalize() + rng.choice(("", "n", "s", "ka", "grad", "ville", "berg", "ton"))
        if rng.random() < 0.08:
            name = rng.choice(("San", "New", "Port", "Santa", "Al", "Saint", "Fort", "North", "Upper")) + f" {name}"
        return name

    def mutate_name(self, rng: random.Random, name: str) -> str:
        """A name that is easily taken for `name`: one word, the ending or the beginning is another."""
        words, draw = name.split(" "), rng.random()
        if len(words) > 1 and draw < 0.4:
            words[rng.randrange(len(words))] = self.name(rng).split(" ")[0]
            return " ".join(words)
        half = len(name) // 2
        if draw < 0.7:
            return name[: max(2, half)] + self.name(rng).lower()[-rng.randint(2, 5) :]
        return self.name(rng)[: rng.randint(2, 5)] + name[max(1, half) :].lower()

    def example(self, rng: random.Random, entity: Entity, max_facts: int = MAX_FACTS) -> Example:
        """A question about one of the entity's facts, with a freshly worded passage that states it."""
        title, facts = rng.choice(passage_groups(entity))
        fact = "neighbours" if "neighbours" in facts and rng.random() < 0.35 else rng.choice(facts)
        text, stated = render_passage(rng, entity, title, facts, max_facts, must=fact)
        question = ask(rng, entity.kind, fact, spoken_name(rng, entity, fact))
        assert question is not None, "only held-out wordings can be missing"  # noqa: S101
        return Example(question, entity.facts[fact], title, text, entity.kind, fact, entity.name, stated)

    def _name_of(self, rng: random.Random, kind: Kind, facts: Mapping[str, str]) -> str:
        """A name with what names of its kind often have: a city's country, an airport's city, `-ium`, `Islands`."""
        name, draw = self.name(rng), rng.random()
        if kind == "airport":
            if draw < 0.7:
                name = f"{facts.get('city') or self.name(rng)} {name}"
            return name + (" International Airport" if rng.random() < 0.8 else " Airport")
        if kind == "element":
            return f"{name}ium" if draw < 0.6 else name
        if kind == "country":
            frame = rng.choice(("{} Islands", "United {}", "Republic of {}", "{} Republic")) if draw < 0.08 else "{}"
            return frame.format(name)
        return f"{name}, {facts['country']}" if draw < 0.05 and "country" in facts else name

    def _name_of_tokens(self, rng: random.Random) -> str:
        name = rng.choice(self._words)
        name, draw = name[0].upper() + name[1:], rng.random()
        if self._pieces and draw < 0.25:
            return name + rng.choice(self._pieces)
        if draw < 0.45:
            word = rng.choice(self._words)
            return f"{name} {word[0].upper()}{word[1:]}"
        return name

    def _value(self, rng: random.Random, kind: Kind, fact: str) -> str:
        """A random value of the form that the fact's real values have."""
        real = rng.choice(self._values[kind, fact])
        if fact in NAMED and rng.random() >= KEEP_REAL_RATE:
            return self._named_value(rng, fact)
        return FIGURES[fact](rng, real) if fact in FIGURES else real

    def _named_value(self, rng: random.Random, fact: str) -> str:
        """A value with an invented name in it."""
        match fact:
            case "discoverer":
                return f"{self.name(rng)} {self.name(rng)}"
            case "timezone" | "capital_timezone":
                return f"{rng.choice(ZONES)}/{self.name(rng)}"
            case "currency":
                return f"{self.name(rng)} {rng.choice(MONEY)}"
            case "neighbours":
                return listing([self._neighbour(rng) for _ in range(rng.randint(1, 5))])
            case _:
                return self.name(rng)

    def _neighbour(self, rng: random.Random) -> str:
        return rng.choice(self._countries) if rng.random() < 0.6 else self.name(rng)
