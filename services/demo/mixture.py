"""What the demo's models are trained on: real entities of the train split, mixed with endless invented ones.

Real entities alone are learned by heart. Invented ones, with names and figures never seen twice, leave copying as the
only way to get the answer right; and copying also works on the entities that were held out.
"""

import random
from collections import defaultdict
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from generator_svc.contexts import context_text, question_form
from services.demo.corpus import passage_groups, render_passage
from services.demo.facts import KINDS, Entity, Kind, fold
from services.demo.questions import ask, spoken_name
from services.demo.synthetic import Example, ExampleStream
from services.demo.wording import WORDINGS
from services.training.reader import Reading
from services.training.retriever import Pair

READER_BATCH = 64
READER_KINDS: dict[Kind, float] = {"city": 0.40, "country": 0.40, "element": 0.12, "airport": 0.08}
READER_REAL = 0.3
CURRICULUM = 0.33
"""Share of the reader's run in which passages grow from one fact to seven."""
UNTOLD, UNTOLD_LATE = 0.15, 0.25
"""Share of the reader's examples, after the curriculum and in the last quarter, whose passage does not tell."""
LATE = 0.75

RETRIEVER_BATCH = 128
RETRIEVER_KINDS: dict[Kind, float] = {"city": 0.50, "country": 0.35, "element": 0.07, "airport": 0.08}
RETRIEVER_REAL = 0.5
SIBLING = 0.25
"""Share of the retriever's entities that bring a sibling of a similar name into the batch."""


class Mixture:
    """Draws batches for both models. Stateless: the same `rng` gives the same batch."""

    def __init__(
        self, entities: Sequence[Entity], stream: ExampleStream, encoder_tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._stream, self._encoder_tokenizer = stream, encoder_tokenizer
        self._real: dict[Kind, list[Entity]] = defaultdict(list)
        for entity in entities:
            if entity.split == "train":
                self._real[entity.kind].append(entity)

    def readings(self, rng: random.Random, progress: float) -> list[Reading]:
        """A batch for the reader, whose passages state 1, then 2, then up to 7 facts as the run goes on."""
        return [self._reading(rng, progress) for _ in range(READER_BATCH)]

    def pairs(self, rng: random.Random) -> list[Pair]:
        """A batch for the retriever: the passages of some entities, each with a question that only it answers."""
        pairs: list[Pair] = []
        names: set[str] = set()
        while len(pairs) < RETRIEVER_BATCH:
            real = rng.random() < RETRIEVER_REAL
            entity = self._draw_real(rng, RETRIEVER_KINDS) if real else self._stream.entity(rng)
            if fold(entity.name) in names:
                continue
            names.add(fold(entity.name))
            pairs += _pairs_of(rng, entity)
            if rng.random() < SIBLING:
                name = self._stream.mutate_name(rng, entity.name)
                if len(name) > 2 and fold(name) not in names:
                    names.add(fold(name))
                    stranger = self._stream.entity(rng, entity.kind)
                    pairs += _pairs_of(rng, Entity(stranger.kind, name, stranger.split, stranger.facts))
        return pairs[:RETRIEVER_BATCH]

    def _reading(self, rng: random.Random, progress: float) -> Reading:
        grown = progress >= CURRICULUM
        real = rng.random() < READER_REAL * (1.0 if grown else 0.3)
        entity = self._draw_real(rng, READER_KINDS) if real else self._stream.entity(rng)
        example = self._stream.example(rng, entity, _max_facts(rng, progress))
        late = progress >= LATE
        if grown and rng.random() < (UNTOLD_LATE if late else UNTOLD):
            untold = self._untold(rng, entity, example, late=late)
            if untold is not None:
                return untold
        return Reading(self._context(example.title, example.text, example.question), example.answer)

    def _untold(self, rng: random.Random, entity: Entity, example: Example, *, late: bool) -> Reading | None:
        """A passage that does not tell; None where the draw happens to give one that does."""
        draw = rng.random()
        if late and draw >= 0.75:
            return self._beside_the_point(rng, example)
        return self._left_out(rng, entity) if draw < 0.4 * (0.75 if late else 1.0) else self._of_another(rng, example)

    def _beside_the_point(self, rng: random.Random, example: Example) -> Reading | None:
        """A fact that entities of this kind do not have: the melting point of a city."""
        kind = rng.choice([other for other in KINDS if other != example.kind])
        facts = [fact for fact in WORDINGS[kind] if fact not in WORDINGS[example.kind]]
        question = ask(rng, kind, rng.choice(facts), example.entity)
        return None if question is None else Reading(self._context(example.title, example.text, question), None)

    def _of_another(self, rng: random.Random, example: Example) -> Reading | None:
        """The same fact asked of a similar name, or of any other."""
        name = example.entity
        other = self._stream.mutate_name(rng, name) if rng.random() < 0.5 else self._stream.name(rng)
        question = ask(rng, example.kind, example.fact, other)
        if question is None or fold(other) == fold(name):
            return None
        return Reading(self._context(example.title, example.text, question), None)

    def _left_out(self, rng: random.Random, entity: Entity) -> Reading | None:
        """A fact of the entity that this passage of it leaves out."""
        fact = rng.choice(list(entity.facts))
        title, facts = rng.choice(passage_groups(entity))
        others = [other for other in facts if other != fact]
        question = ask(rng, entity.kind, fact, spoken_name(rng, entity, fact))
        if question is None or not others:
            return None
        text, _ = render_passage(rng, entity, title, others, rng.choice((2, 4, 7)))
        if entity.facts[fact] in text:  # told in passing: Monaco is the capital of Monaco
            return None
        return Reading(self._context(title, text, question), None)

    def _context(self, title: str, text: str, question: str) -> str:
        return context_text(title, text, question_form(question, self._encoder_tokenizer))

    def _draw_real(self, rng: random.Random, kinds: dict[Kind, float]) -> Entity:
        (kind,) = rng.choices(list(kinds), list(kinds.values()))
        return rng.choice(self._real[kind])


def _max_facts(rng: random.Random, progress: float) -> int:
    if progress < CURRICULUM * 0.3:
        return 1
    if progress < CURRICULUM * 0.6:
        return 2
    return rng.choice((2, 3, 4) if progress < CURRICULUM else (2, 4, 7, 7, 7))


def _pairs_of(rng: random.Random, entity: Entity) -> list[Pair]:
    """Up to three passages of an entity. Where one states what another is asked for, the later one is left out."""
    groups = passage_groups(entity)
    rng.shuffle(groups)
    pairs: list[Pair] = []
    asked: set[str] = set()
    stated: set[str] = set()
    for title, facts in groups[: rng.randint(1, 3)]:
        fact = rng.choice(facts)
        text, told = render_passage(rng, entity, title, facts, rng.choice((3, 5, 7)), must=fact)
        question = ask(rng, entity.kind, fact, spoken_name(rng, entity, fact))
        if question is None or fact in stated or asked.intersection(told):
            continue
        asked.add(fact)
        stated.update(told)
        pairs.append(Pair(question, title, text))
    return pairs
