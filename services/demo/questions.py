"""Questions about the corpus in many paraphrases, some of which are kept out of training."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from services.demo.corpus import Passage, with_article
from services.demo.facts import KINDS, Entity, Kind, Split, fold
from services.demo.wording import NAME, WORDINGS, Wording

KIND_WEIGHTS: dict[Kind, float] = {"city": 0.5, "country": 0.33, "element": 0.07, "airport": 0.1}

# Frames that ask for any fact that has a name of its own.
FRAMES = (
    "What is the {p} of {n}?",
    "What's the {p} of {n}?",
    "What is {n}'s {p}?",
    "What's {n}'s {p}?",
    "Tell me the {p} of {n}.",
    "Tell me {n}'s {p}.",
    "Give me the {p} of {n}.",
    "Do you know the {p} of {n}?",
    "{n} {p}",
    "{p} {n}",
    "{p} of {n}",
    "I need the {p} of {n}.",
    "Which {p} does {n} have?",
    "What {p} does {n} have?",
    "Show the {p} for {n}",
    "Find the {p} of {n}.",
    "Could you tell me the {p} of {n}?",
    "{n}: {p}?",
    "Please give the {p} of {n}.",
    "What would be the {p} of {n}?",
    "And the {p} of {n}?",
    "Name the {p} of {n}.",
    "What {p} is there for {n}?",
    "What is the {p} for {n}?",
    "For {n}, what is the {p}?",
    "The {p} of {n} is what?",
    "Look up the {p} of {n}.",
    "What do you know about the {p} of {n}?",
)
FRAME_RATE = 0.3
STOP_WORDS = frozenset("the is of a an in what which does do are that there to on at".split())
POLITE = ("Please tell me: ", "I want to know: ", "Hi, ", "Can you tell me: ", "Hello, ", "Quick question: ", "So, ")

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
        pattern = _training_pattern(rng, kind, wording, augment=augment)
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
    """The entity's name as people say it: an airport's city is often left out."""
    city = entity.facts.get("city", "")
    rest = entity.name.removeprefix(f"{city} ")
    if entity.kind != "airport" or rest == entity.name or rest.split()[0] in {"International", "Airport"}:
        return entity.name
    return rest if fact != "city" and rng.random() < 0.2 or fact == "city" and rng.random() < 0.5 else entity.name


def unanswerable_questions(entities: Sequence[Entity], n: int = 100, seed: int = 29) -> list[str]:
    """Questions in the corpus's own wording that it cannot answer: places and elements of fiction, invented names."""
    rng = random.Random(seed)
    known = {fold(entity.name) for entity in entities}
    names: dict[Kind, list[str]] = {kind: [name for name in FICTION[kind] if fold(name) not in known] for kind in KINDS}
    questions: list[str] = []
    while len(questions) < n:
        kind = rng.choices(KINDS, [KIND_WEIGHTS[kind] for kind in KINDS])[0]
        text = ask(rng, kind, rng.choice(list(WORDINGS[kind])), rng.choice(names[kind]))
        if text is not None and text not in questions:
            questions.append(text)
    return questions


FICTION: dict[Kind, tuple[str, ...]] = {
    "city": (
        "Atlantis",
        "Gotham City",
        "Metropolis",
        "Minas Tirith",
        "King's Landing",
        "Emerald City",
        "Rivendell",
        "El Dorado",
        "Bikini Bottom",
        "Ankh-Morpork",
        "Hogsmeade",
        "Zion City",
        "Coruscant City",
        "Camelot",
        "Shangri-La",
        "Springwood Falls",
        "Winterfell",
        "Mos Eisley",
        "Rapture",
        "Zootopia",
    ),
    "country": (
        "Wakanda",
        "Genovia",
        "Narnia",
        "Mordor",
        "Gondor",
        "Latveria",
        "Ruritania",
        "Freedonia",
        "Sokovia",
        "Westeros",
        "Zubrowka",
        "Oceania Prime",
        "Elbonia",
        "Syldavia",
        "Borduria",
        "Lilliput",
        "Utopia",
        "Panem",
        "Zamunda",
        "Arstotzka",
    ),
    "element": (
        "Vibranium",
        "Adamantium",
        "Unobtainium",
        "Mithril",
        "Kryptonite",
        "Dilithium",
        "Octarine",
        "Carbonite",
        "Tiberium",
        "Naquadah",
    ),
    "airport": (
        "Gotham City International Airport",
        "Wakanda International Airport",
        "Atlantis Harbour International Airport",
        "Mordor International Airport",
        "Narnia Lantern Waste Airport",
        "Springwood Falls International Airport",
        "Emerald City Yellow Brick Airport",
        "Metropolis Daily Planet Airport",
    ),
}


def normalized(pattern: str) -> str:
    """A wording without case and punctuation, to tell whether two are the same."""
    return " ".join(re.sub(r"[^\w{}' ]", " ", pattern.lower()).split())


@cache
def held_out_patterns(kind: Kind) -> frozenset[str]:
    """Every wording about this kind of entity that training must not produce, normalized."""
    return frozenset(normalized(p) for wording in WORDINGS[kind].values() for p in wording.held_out)


def _training_pattern(rng: random.Random, kind: Kind, wording: Wording, *, augment: bool) -> str:
    """A wording to train on; drawn again should a frame or a dropped word give one that is held out."""
    while True:
        pattern = rng.choice(wording.questions)
        if augment and wording.noun_phrases and rng.random() < FRAME_RATE:
            pattern = rng.choice(FRAMES).replace("{p}", rng.choice(wording.noun_phrases))
        if augment and rng.random() < 0.1:
            pattern = _drop_stop_word(rng, pattern)
        if normalized(pattern) not in held_out_patterns(kind):
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
    return name if rng.random() < 0.6 else _without_accents(name)


def _without_accents(text: str) -> str:
    folded = fold(text)
    return (
        "".join(f.upper() if c.isupper() else f for c, f in zip(text, folded, strict=True))
        if len(folded) == len(text)
        else text
    )


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
