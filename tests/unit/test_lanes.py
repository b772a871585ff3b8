"""Questions that move in step over fixed tensors, as CUDA graphs replay them, against each by itself."""

import gc
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from generator_svc.engine import RagEngine, lanes
from generator_svc.engine.bart_backend import BartBackend
from generator_svc.engine.decoding import TreeDecoding
from generator_svc.engine.evidence import Evidence
from generator_svc.engine.lane import LaneDecoding
from generator_svc.engine.lanes import Lanes
from generator_svc.engine.scheduler import Scheduler
from shared.errors import RagError
from tests.parity import draw, in_memory, ours
from tests.tiny_checkpoint import tiny_model


def engines(model: Any) -> tuple[RagEngine, RagEngine, Lanes]:
    ordinary, in_step = RagEngine(in_memory(model)), RagEngine(in_memory(model))
    backend = in_step._backend
    assert isinstance(backend, BartBackend)
    backend._bart.on_cpu = False  # documents are encoded together
    backend.use_lanes(capture=False)
    assert backend.lanes is not None
    return ordinary, in_step, backend.lanes


def contexts(n_questions: int, n_docs: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_questions)
    ids = torch.randint(5, 300, (n_questions * n_docs, 30), generator=generator)
    mask = (torch.arange(30) < torch.randint(4, 31, (n_questions * n_docs, 1), generator=generator)).long()
    return ids.masked_fill(mask == 0, 1), mask, torch.randn(n_questions, n_docs, generator=generator)


@pytest.mark.parametrize("strategy", ["token", "sequence"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 12},
        {"max_new_tokens": 1},
        {"num_beams": 3, "max_new_tokens": 10},
        {"num_beams": 3, "max_new_tokens": 10, "no_repeat_ngram_size": 2},  # a rule that cannot be captured
        {"num_beams": 4, "max_new_tokens": 9, "early_stopping": True, "repetition_penalty": 1.3, "min_new_tokens": 4},
        {"do_sample": True, "seed": 3, "num_return_sequences": 4, "max_new_tokens": 8},  # takes the ordinary way
        {"num_beams": 4, "min_new_tokens": 30, "max_new_tokens": 40},
    ],
    ids=str,
)
def test_questions_in_step_are_answered_as_each_by_itself(strategy: Any, options: dict[str, Any]) -> None:
    ordinary, in_step, _ = engines(tiny_model())
    for n_questions in (1, 3, 1, 5):  # the third takes the first one's tensors over
        inputs = contexts(n_questions, 3)
        expected = ordinary.generate(*inputs, strategy=strategy, **options)
        found = in_step.generate(*inputs, strategy=strategy, **options)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert found.log_probs.tolist() == pytest.approx(expected.log_probs.tolist(), abs=1e-4)
        assert found.doc_posterior.numpy() == pytest.approx(expected.doc_posterior.numpy(), abs=1e-4)


def test_a_lane_is_used_again_and_no_more_are_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, in_step, kept = engines(tiny_model())
    monkeypatch.setattr(lanes, "MOST_IDLE", 2)
    used = []
    for n_questions in (1, 1, 2, 3, 1):
        inputs = contexts(n_questions, 3)
        tasks = [
            in_step.task([ids[ids != 1] for ids in inputs[0][at * 3 : (at + 1) * 3]], scores, strategy="token")
            for at, scores in enumerate(inputs[2])
        ]
        decodings = in_step.begin(tasks)
        assert all(isinstance(decoding, LaneDecoding) for decoding in decodings)
        used.append(decodings[0].lane)
        del decodings
        gc.collect()
        assert len(kept._idle) <= 2
    assert used[0] is used[1]
    assert used[4] is not used[0]  # it has made room for the others


def test_documents_of_very_different_lengths_take_the_ordinary_way() -> None:
    ordinary, in_step, _ = engines(tiny_model())
    generator = torch.Generator().manual_seed(0)
    one = [torch.randint(5, 300, (length,), generator=generator) for length in (120, 3, 3, 3, 3, 3)]
    answers = []
    for engine in (ordinary, in_step):
        task = engine.task(one, torch.zeros(6), strategy="token", num_beams=3, max_new_tokens=6)
        assert isinstance(engine.begin([task])[0], TreeDecoding)
        answers.append(engine.run([task])[0].sequences.tolist())
    assert answers[0] == answers[1]


def test_a_question_that_leaves_changes_nothing_for_those_that_began_with_it() -> None:
    _, in_step, _ = engines(tiny_model())
    inputs = contexts(3, 3)
    rules: dict[str, Any] = {"strategy": "token", "num_beams": 3, "max_new_tokens": 8}
    expected = in_step.generate(*inputs, **rules)
    tasks = [
        in_step.task([ids[ids != 1] for ids in inputs[0][at * 3 : (at + 1) * 3]], scores, **rules)
        for at, scores in enumerate(inputs[2])
    ]
    running = in_step.begin(tasks)
    in_step.step(running)
    staying = [running[0], running[2]]
    del running
    while unfinished := [decoding for decoding in staying if not decoding.finished]:
        in_step.step(unfinished)
    found = [evidence.sequences[0].tolist() for evidence in in_step.finish(staying)]
    best = [evidence.sequences[0].tolist() for evidence in expected.evidence]
    assert found == [best[0], best[2]]


class Leaving:
    """A caller who goes after having been asked so often, if the answer has not come."""

    def __init__(self, patience: int) -> None:
        self.patience, self.answers = patience, 0

    @property
    def wanted(self) -> bool:
        self.patience -= 1
        return self.patience >= 0

    def finished(self, evidence: Evidence) -> None:
        self.answers += len(evidence.sequences)

    def encoded(self, questions: int) -> None: ...

    def decoded(self) -> None: ...

    def written(self, tokens: Tensor) -> None: ...

    def failed(self, error: RagError) -> None:
        raise error


def test_callers_who_leave_at_any_step_leave_no_lane_taken() -> None:
    _, in_step, kept = engines(tiny_model(eos_bias=-30.0))
    scheduler, rng = Scheduler(in_step, 10_000), random.Random(0)
    inputs = contexts(1, 3)
    documents = [ids[ids != 1] for ids in inputs[0]]
    everybody: list[Leaving] = []
    for _ in range(60):
        rules: dict[str, Any] = {"strategy": rng.choice(["token", "sequence"]), "num_beams": rng.choice([1, 3])}
        tickets = [Leaving(rng.choice([0, 1, 3, 9, 200])) for _ in range(rng.randint(1, 3))]
        everybody += tickets
        scheduler.join([in_step.task(documents, inputs[2][0], max_new_tokens=6, **rules) for _ in tickets], tickets)
        for _ in range(rng.randint(0, 4)):
            scheduler.step()
    while scheduler.step():
        pass
    gc.collect()
    assert kept._used == 0
    assert all(ticket.answers for ticket in everybody if ticket.patience > 100)
    assert any(not ticket.answers for ticket in everybody)


@settings(max_examples=40)
@given(seed=st.integers(0, 100_000))
def test_random_models_and_options_give_the_same_in_step(seed: int) -> None:
    """Both ways are held to transformers by ``tests.parity``, every second draw in step; here they meet each other."""
    drawn = draw(seed)
    assert ours(drawn, in_step=True) == ours(drawn, in_step=False)
