"""Questions that join, run together and leave."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from generator_svc.checkpoint import load_checkpoint
from generator_svc.engine import Evidence, RagEngine, Task
from generator_svc.engine.scheduler import Scheduler, Scoring, cache_tokens
from shared.errors import InferenceError, InvalidRequest, RagError
from tests.tiny_checkpoint import save_tiny_checkpoint


@dataclass
class Caller:
    wanted: bool = True
    pieces: list[Tensor] = field(default_factory=list)
    evidence: Evidence | None = None
    error: RagError | None = None
    steps: int = 0

    def encoded(self, questions: int) -> None:
        pass

    def decoded(self) -> None:
        self.steps += 1

    def failed(self, error: RagError) -> None:
        self.error = error

    def finished(self, evidence: Evidence) -> None:
        self.evidence = evidence

    def written(self, tokens: Tensor) -> None:
        self.pieces.append(tokens)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> RagEngine:
    return RagEngine(load_checkpoint(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))))


def task(engine: RagEngine, *, question: int = 0, n_docs: int = 2, new_tokens: int = 6, **options: Any) -> Task:
    """A question whose answers have exactly `new_tokens` tokens."""
    made = torch.Generator().manual_seed(question)
    contexts = [torch.randint(5, 300, (7 + document,), generator=made) for document in range(n_docs)]
    scores = torch.randn(n_docs, generator=made)
    return engine.task(contexts, scores, min_new_tokens=new_tokens, max_new_tokens=new_tokens, **options)


OPTIONS: list[dict[str, Any]] = [
    {"strategy": "token"},
    {"strategy": "token", "num_beams": 3, "new_tokens": 3},
    {"strategy": "sequence", "num_beams": 2, "new_tokens": 9},
    {"strategy": "sequence", "decoding": "fast", "num_beams": 2},
    {"strategy": "token", "do_sample": True, "num_return_sequences": 2, "seed": 4, "new_tokens": 12},
    {"strategy": "token", "repetition_penalty": 1.5, "n_docs": 4},
]


def test_questions_that_join_at_different_steps_get_the_answers_they_would_get_alone(engine: RagEngine) -> None:
    tasks = [task(engine, question=index, **options) for index, options in enumerate(OPTIONS)]
    callers = [Caller() for _ in tasks]
    scheduler = Scheduler(engine, max_tokens=100_000)
    for one, caller in zip(tasks, callers, strict=True):
        scheduler.join([one], [caller])
        scheduler.step()
    while scheduler.step():
        pass
    for options, one, caller in zip(OPTIONS, tasks, callers, strict=True):
        [alone] = engine.run([one])
        assert caller.evidence is not None, options
        assert torch.equal(caller.evidence.sequences, alone.sequences), options
        assert torch.allclose(caller.evidence.log_probs, alone.log_probs, atol=1e-4), options


def test_a_question_leaves_at_the_step_that_ends_it(engine: RagEngine) -> None:
    scheduler, short, long = Scheduler(engine, max_tokens=100_000), Caller(), Caller()
    scheduler.join([task(engine, new_tokens=9), task(engine, new_tokens=3)], [long, short])
    for running in (2, 2, 1):
        scheduler.step()
        assert scheduler.running == running
    assert short.evidence is not None
    assert long.evidence is None


def test_who_is_no_longer_wanted_is_dropped_before_the_next_step(engine: RagEngine) -> None:
    scheduler, gone, stays = Scheduler(engine, max_tokens=100_000), Caller(), Caller()
    scheduler.join([task(engine), task(engine)], [gone, stays])
    gone.wanted = False
    scheduler.step()
    assert scheduler.running == 1
    assert gone.pieces == []
    assert len(stays.pieces) == 1
    stays.wanted = False
    assert not scheduler.step()
    assert scheduler.tokens == 0


@pytest.fixture
def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document a part of encoding, a trie a part of scoring, a part a step, a question a time."""
    monkeypatch.setattr("generator_svc.engine.decoder.CPU_TOKENS", 1)
    monkeypatch.setattr("generator_svc.engine.decoder.CPU_ROWS", 44)
    monkeypatch.setattr("generator_svc.engine.bart_backend.CPU_HELD_NUMBERS", 1)
    monkeypatch.setattr("generator_svc.engine.scheduler.BETWEEN_STEPS_S", 0.0)


@pytest.mark.usefixtures("in_small_parts")
def test_others_decode_at_every_step_while_a_large_question_is_encoded_and_scored(engine: RagEngine) -> None:
    scheduler, runs, large = Scheduler(engine, max_tokens=100_000), Caller(), Caller()
    scheduler.join([task(engine, new_tokens=60)], [runs])
    while not runs.steps:
        scheduler.step()
    scheduler.join([task(engine, n_docs=20, new_tokens=3, strategy="sequence", num_beams=2)], [large])
    steps_of_large = []
    while large.evidence is None:
        before = runs.steps
        scheduler.step()
        assert runs.steps == before + 1
        steps_of_large.append(large.steps)
    assert steps_of_large.count(0) == 19  # the first step comes with the twentieth document
    assert steps_of_large.count(3) > 19  # a trie a document


@pytest.mark.usefixtures("in_small_parts")
def test_a_small_question_is_answered_while_a_large_one_is_encoded(engine: RagEngine) -> None:
    scheduler, large, small, given = Scheduler(engine, max_tokens=100_000), Caller(), Caller(), Caller()
    scheduler.join([task(engine, n_docs=40)], [large])
    scheduler.step()
    one = task(engine, new_tokens=3)
    scheduler.join([one], [small])
    answer = torch.tensor([[2, 17, 2]])
    scheduler.score([Scoring(one.contexts, torch.zeros(2), answer)], "token", [given])
    while small.evidence is None or given.evidence is None:
        scheduler.step()
    assert large.steps == 0
    assert scheduler.running == 1
    ids, scores = torch.nn.utils.rnn.pad_sequence(list(one.contexts), batch_first=True), torch.zeros(1, 2)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in one.contexts], batch_first=True)
    expected = engine.score(ids, mask, scores, answer, strategy="token")
    assert given.evidence.log_probs == pytest.approx(expected.log_probs)


@pytest.mark.usefixtures("in_small_parts")
def test_those_who_come_together_begin_one_after_the_other(engine: RagEngine) -> None:
    scheduler, callers = Scheduler(engine, max_tokens=100_000), [Caller() for _ in range(4)]
    scheduler.join([task(engine, n_docs=3) for _ in callers], callers)
    callers[1].wanted = False
    for _ in range(7):
        scheduler.step()
    assert [caller.steps for caller in callers] == [5, 0, 2, 0]
    assert scheduler.tokens == 3 * cache_tokens(task(engine, n_docs=3))


@pytest.mark.usefixtures("in_small_parts")
def test_who_is_no_longer_wanted_is_dropped_between_two_documents(engine: RagEngine) -> None:
    scheduler, gone = Scheduler(engine, max_tokens=100_000), Caller()
    scheduler.join([task(engine, n_docs=20)], [gone])
    assert scheduler.step()
    gone.wanted = False
    assert not scheduler.step()
    assert scheduler.tokens == 0


def test_questions_with_many_rows_take_turns_and_small_ones_move_at_every_step(
    engine: RagEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("generator_svc.engine.decoder.CPU_ROWS", 12)
    tasks = [task(engine, question=at, n_docs=3, num_beams=3, new_tokens=7) for at in range(3)]
    callers, small = [Caller() for _ in tasks], Caller()
    scheduler = Scheduler(engine, max_tokens=100_000)
    scheduler.join(tasks, callers)
    scheduler.step()  # a row a document: all have a turn
    scheduler.join([task(engine, new_tokens=40)], [small])
    for steps in range(1, 13):
        scheduler.step()
        assert small.steps == steps
        counts = [caller.steps for caller in callers]
        assert sum(counts) == 3 + steps
        assert max(counts) - min(counts) <= 1
    while scheduler.step():
        pass
    for one, caller in zip(tasks, callers, strict=True):
        [alone] = engine.run([one])
        assert caller.evidence is not None
        assert torch.equal(caller.evidence.sequences, alone.sequences)


@pytest.mark.parametrize(("raised", "told"), [(InvalidRequest, InvalidRequest), (ZeroDivisionError, InferenceError)])
def test_what_fails_while_it_is_encoded_fails_alone(
    engine: RagEngine, monkeypatch: pytest.MonkeyPatch, raised: type[Exception], told: type[RagError]
) -> None:
    def fails(*_: Any) -> None:
        raise raised("not so")

    scheduler, runs, fated = Scheduler(engine, max_tokens=100_000), Caller(), Caller()
    scheduler.join([task(engine)], [runs])
    scheduler.step()
    with monkeypatch.context() as broken:
        broken.setattr("generator_svc.engine.decoder.Bart.encode", fails)
        scheduler.join([task(engine)], [fated])
        scheduler.step()
    while scheduler.step():
        pass
    assert isinstance(fated.error, told)
    assert runs.error is None
    assert runs.evidence is not None


def test_every_step_shows_what_is_written_so_far(engine: RagEngine) -> None:
    scheduler, caller = Scheduler(engine, max_tokens=100_000), Caller()
    scheduler.join([task(engine, new_tokens=5)], [caller])
    while scheduler.step():
        pass
    assert [len(piece) for piece in caller.pieces] == [2, 3, 4, 5, 6]  # the start token first
    assert caller.evidence is not None
    assert caller.pieces[-1].tolist() == caller.evidence.sequences[0].tolist()


def test_a_question_that_is_alone_is_admitted_by_its_size(engine: RagEngine) -> None:
    one = task(engine)
    scheduler = Scheduler(engine, max_tokens=2 * cache_tokens(one))
    assert scheduler.admits([cache_tokens(one)] * 2)
    assert not scheduler.admits([cache_tokens(one)] * 3)
    scheduler.join([one], [Caller()])
    assert scheduler.admits([cache_tokens(one)])
    assert not scheduler.admits([cache_tokens(one)] * 2)
    while scheduler.step():
        pass
    assert scheduler.admits([cache_tokens(one)] * 2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_size_of_a_question_bounds_the_nodes_that_its_search_adds(
    engine: RagEngine, options: dict[str, Any]
) -> None:
    one = task(engine, **options)
    [decoding] = engine.begin([one])
    while not decoding.finished:
        engine.step([decoding])
    nodes = sum(cache.size for cache in decoding.caches)  # type: ignore[attr-defined]
    assert nodes + sum(len(context) for context in one.contexts) <= cache_tokens(one)


def test_a_step_that_fails_ends_every_question(engine: RagEngine) -> None:
    def broken(_: Tensor) -> list[int]:
        raise ZeroDivisionError

    scheduler = Scheduler(engine, max_tokens=100_000)
    scheduler.join([task(engine), task(engine, prefix_allowed_tokens=broken)], [Caller(), Caller()])
    with pytest.raises(ZeroDivisionError):
        scheduler.step()
    assert scheduler.running == 0
    assert not scheduler.step()
