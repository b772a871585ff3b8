"""Questions about the corpus in many paraphrases, some of which are kept out of training."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from services.demo.corpus import Passage, with_article
from services.demo.facts import KINDS, Entity, Kind, Split, fold, unaccented
from services.demo.names import MarkovNames
from services.demo.wording import NAME, WORDINGS, Wording
from services.demo.wording.frames import ALIASES, FRAMES, NOUNS, POLITE, STOP_WORDS
from services.demo.wording.unanswerable import FICTION, UNKNOWN_FACTS

KIND_WEIGHTS: dict[Kind, float] = {"city": 0.5, "country": 0.33, "element": 0.07, "airport": 0.1}

FRAME_RATE = 0.3
NOUN_RATE = 0.05  # "the city of Paris"
COUNTRY_RATE = 0.06  # "Paris, France"
ALIAS_RATE = 0.25  # "the USA"
NAME_ENDINGS: dict[Kind, str] = {"element": "ium", "airport": " International Airport"}

# Facts for which a city of the same name would be just as good an answer: their questions keep the word "airport".
_SHARED_WITH_CITY = frozenset({"country", "timezone", "city"})


@dataclass(frozen=True)
class Question:
    """A question, the answer that the corpus gives, and the passages that give it."""

    text: str
    answer: str
    gold: tuple[int, ...]
    """Ids of the entity's passages that state the fact."""
    kind: Kind
    fact: str
    entity: str


def ask(
    rng: random.Random,
    kind: Kind,
    fact: str,
    name: str,
    *,
    held_out_pattern: bool = False,
    augment: bool = True,
) -> str | None:
    """One question for a fact of the entity called `name`.

    Args:
        held_out_pattern: use a wording that training never sees; None where the fact has none.
        augment: vary it as people do (frames, lower case, a stop word or the question mark dropped, a greeting).
    """
    wording = WORDINGS[kind][fact]
    if held_out_pattern:
        if not wording.held_out:
            return None
        pattern = rng.choice(wording.held_out)
    else:
        pattern = _training_pattern(rng, wording, augment=augment)
    if augment and kind in NOUNS and rng.random() < NOUN_RATE and kind not in pattern:
        pattern = pattern.replace(NAME, NOUNS[kind])
    question = pattern.replace(NAME, _spoken(rng, kind, fact, name))
    question = question[0].upper() + question[1:]
    return _typed_by_a_person(rng, question) if augment else question


def question_set(
    entities: Sequence[Entity],
    passages: Sequence[Passage],
    split: Split,
    n: int,
    *,
    held_out_patterns: bool = False,
    seed: int,
) -> list[Question]:
    """`n` questions about entities of `split`, kinds by `KIND_WEIGHTS`, each fact of a chosen passage alike likely."""
    rng = random.Random(seed)
    by_kind: dict[Kind, list[Passage]] = {kind: [] for kind in KINDS}
    by_entity: dict[int, list[Passage]] = {}
    for passage in passages:
        entity = entities[passage.entity]
        if entity.split == split:
            by_kind[entity.kind].append(passage)
            by_entity.setdefault(passage.entity, []).append(passage)
    kinds = [kind for kind in KINDS if by_kind[kind]]
    weights = [KIND_WEIGHTS[kind] for kind in kinds]
    questions: list[Question] = []
    while len(questions) < n:
        passage = rng.choice(by_kind[rng.choices(kinds, weights)[0]])
        entity, fact = entities[passage.entity], rng.choice(passage.facts)
        text = ask(rng, entity.kind, fact, spoken_name(rng, entity, fact), held_out_pattern=held_out_patterns)
        if text is not None:
            gold = tuple(p.id for p in by_entity[passage.entity] if fact in p.facts)
            questions.append(Question(text, entity.facts[fact], gold, entity.kind, fact, entity.name))
    return questions


def spoken_name(rng: random.Random, entity: Entity, fact: str) -> str:
    """The entity's name as people say it: an airport's city is often left out, a city's country sometimes added."""
    if entity.split == "train" and entity.name in ALIASES and rng.random() < ALIAS_RATE:
        return rng.choice(ALIASES[entity.name])
    if entity.kind == "city":
        fits = fact not in {"country", "capital_of", "continent"} and "," not in entity.name
        if fits and "country" in entity.facts and rng.random() < COUNTRY_RATE:
            return f"{entity.name}, {entity.facts['country']}"
    elif entity.kind == "airport":
        rest = entity.name.removeprefix(f"{entity.facts.get('city', '')} ")
        bare = rest.split()[0] in {"International", "Airport"}
        if not bare and rng.random() < (0.5 if fact == "city" else 0.2):
            return rest
    return entity.name


def unanswerable_questions(entities: Sequence[Entity], n: int = 100, seed: int = 29) -> list[str]:
    """`n` questions that look like the corpus's own and that it cannot answer.

    Half ask about names of fiction, a quarter about invented names, a quarter about facts of real entities of which
    the corpus says nothing. No name asked about, bar the last kind's, is part of any entity's name.
    """
    rng = random.Random(seed)
    everything = " | ".join(fold(entity.name) for entity in entities)
    chain = MarkovNames([entity.name for entity in entities if entity.kind == "city"], order=3)
    questions: dict[str, None] = {}
    while len(questions) < n:
        kind = rng.choices(KINDS, [KIND_WEIGHTS[kind] for kind in KINDS])[0]
        draw = rng.random()
        if draw < 0.25:
            name = rng.choice([entity.name for entity in entities if entity.kind == kind])
            questions[rng.choice(UNKNOWN_FACTS[kind]).replace(NAME, name)] = None
            continue
        name = rng.choice(FICTION[kind]) if draw < 0.75 else chain.sample(rng) + NAME_ENDINGS.get(kind, "")
        if fold(name.removesuffix(" International Airport")) not in everything:
            questions[ask(rng, kind, rng.choice(list(WORDINGS[kind])), name) or ""] = None
    return list(questions)


def normalized(pattern: str) -> str:
    """A wording without case and punctuation, to tell whether two are the same."""
    return " ".join(re.sub(r"[^\w{}' ]", " ", pattern.lower()).split())


@cache
def held_out_patterns() -> frozenset[str]:
    """Every wording that training must not produce for any fact of any kind, normalized."""
    return frozenset(
        normalized(pattern)
        for wordings in WORDINGS.values()
        for wording in wordings.values()
        for pattern in wording.held_out
    )


def _training_pattern(rng: random.Random, wording: Wording, *, augment: bool) -> str:
    """A wording to train on; drawn again should a frame or a dropped word give one that is held out."""
    while True:
        pattern = rng.choice(wording.questions)
        if augment and wording.noun_phrases and rng.random() < FRAME_RATE:
            pattern = rng.choice(FRAMES).replace("{p}", rng.choice(wording.noun_phrases))
        if augment and rng.random() < 0.1:
            pattern = _drop_stop_word(rng, pattern)
        if normalized(pattern) not in held_out_patterns():
            return pattern


def _drop_stop_word(rng: random.Random, pattern: str) -> str:
    words = pattern.split(" ")
    droppable = [i for i, word in enumerate(words) if word.lower() in STOP_WORDS]
    if len(droppable) > 1:
        words.pop(rng.choice(droppable))
    return " ".join(words)


def _spoken(rng: random.Random, kind: Kind, fact: str, name: str) -> str:
    """The name as typed: accents left out, elements in lower case, airports without "International Airport"."""
    if kind == "airport":
        draw = rng.random()
        if draw < 0.25:
            name = name.replace(" International Airport", " Airport")
        elif draw < 0.5 and len(short := re.sub(r"( International)? Airport$", "", name)) > 3:
            name = f"{short} airport" if fact in _SHARED_WITH_CITY or rng.random() < 0.4 else short
    if kind == "element" and rng.random() < 0.7:
        name = name.lower()
    if kind == "country" and rng.random() < 0.75:
        name = with_article(name)
    return name if rng.random() < 0.6 else unaccented(name)


def _typed_by_a_person(rng: random.Random, question: str) -> str:
    draw = rng.random()
    if draw < 0.15:
        question = question.lower()
    elif draw < 0.2:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.15:
        question = question.rstrip("?.")
    if rng.random() < 0.04:
        question = rng.choice(POLITE) + question[0].lower() + question[1:]
    return question
