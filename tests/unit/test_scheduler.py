"""Questions that join, run together and leave."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from generator_svc.checkpoint import load_checkpoint
from generator_svc.engine import Evidence, RagEngine, Task
from generator_svc.engine.scheduler import Scheduler, cache_tokens
from tests.tiny_checkpoint import save_tiny_checkpoint


@dataclass
class Caller:
    wanted: bool = True
    pieces: list[Tensor] = field(default_factory=list)
    evidence: Evidence | None = None

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
