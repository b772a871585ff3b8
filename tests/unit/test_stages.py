"""What shares a batch, and that each job of a batch gets what it would get alone."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from generator_svc.checkpoint import load_checkpoint
from generator_svc.contexts import Context
from generator_svc.engine.scheduler import Scheduler
from generator_svc.metrics import GeneratorMetrics
from generator_svc.stages import Assemble, Encode, Generate, Job, Score, Stages, Tokenize, batch_key, batch_size
from shared.deadline import Deadline
from shared.errors import InferenceError, InvalidRequest
from shared.worker import DeviceWorker
from tests.tiny_checkpoint import generator_tokenizer, save_tiny_checkpoint

GREEDY = {"num_beams": 1, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return Stages(
        load_checkpoint(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))),
        10_000,
        GeneratorMetrics(CollectorRegistry()),
    )


def generate(n_docs: int, options: Mapping[str, Any] = GREEDY, strategy: str = "token", seed: int = 0) -> Generate:
    random = np.random.default_rng(seed)
    contexts = [Context([0, *random.integers(5, 300, 5 + i + seed).tolist(), 2], False) for i in range(n_docs)]
    scores = random.standard_normal(n_docs, dtype=np.float32)
    return Generate(contexts, scores, {"strategy": strategy, **options})


async def outcomes(stages: Stages, jobs: Sequence[Job]) -> list[Any]:
    """What the worker gives for jobs that arrive together, in their order."""
    worker: DeviceWorker[Any, Any] = DeviceWorker(
        stages.run,
        name="test",
        key=batch_key,
        size=batch_size,
        max_batch_size=128,
        max_wait_ms=0,
        max_queue=64,
        step=stages.step,
        admits=stages.admits,
    )
    await worker.start()
    try:
        submitted = [worker.submit(job, Deadline.after(None, 60_000)) for job in jobs]
        return await asyncio.gather(*submitted, return_exceptions=True)
    finally:
        await worker.stop()


def test_jobs_of_one_kind_share_a_batch() -> None:
    assert batch_key(generate(3)) == batch_key(generate(2, {"num_beams": 2}, strategy="sequence"))
    assert batch_key(Encode("a")) == batch_key(Encode("b")) != batch_key(Tokenize(["a"]))


def test_the_size_of_a_job_is_its_rows() -> None:
    assert batch_size(Encode("a")) == 1
    assert batch_size(generate(3)) == 3


@pytest.mark.parametrize("max_tokens", [1, 300, 10_000])
async def test_merged_jobs_of_every_kind_get_their_own_answers_whatever_the_budget(
    stages: Stages, max_tokens: int
) -> None:
    stages.scheduler = Scheduler(stages._engine, max_tokens)
    jobs = [
        generate(
            1 + seed % 3,
            {"num_beams": 1 + seed % 2, "max_new_tokens": 3 + seed},
            strategy=("token", "sequence")[seed % 2],
            seed=seed,
        )
        for seed in range(8)
    ]
    together = await outcomes(stages, jobs)
    assert stages.scheduler.running == 0
    for job, merged in zip(jobs, together, strict=True):
        [alone] = await outcomes(stages, [job])
        assert [answer.text for answer in merged] == [answer.text for answer in alone]
        assert [answer.log_prob for answer in merged] == pytest.approx([a.log_prob for a in alone], abs=1e-4)


async def test_the_text_arrives_in_pieces_that_make_up_the_answer(stages: Stages) -> None:
    pieces: list[list[str]] = [[] for _ in range(8)]
    jobs = [
        replace(generate(3, {"max_new_tokens": 12, "min_new_tokens": 6}, seed=seed), on_text=pieces[seed].append)
        for seed in range(8)
    ]
    for [answer], arrived in zip(await outcomes(stages, jobs), pieces, strict=True):
        assert answer.text.startswith("".join(arrived))  # random bytes may end in half a character
    assert max(len(arrived) for arrived in pieces) > 3


async def test_a_mask_token_without_a_row_of_its_own_is_read_as_unknown(tmp_path: Path) -> None:
    stages = Stages(
        load_checkpoint(save_tiny_checkpoint(tmp_path, mask_row=False)), 10_000, GeneratorMetrics(CollectorRegistry())
    )
    mask = [("title", f"text {generator_tokenizer().mask_token}")]
    [[context]] = stages.run([Assemble("how many?", mask)])
    unknown = Context(
        [3 if token == generator_tokenizer().mask_token_id else token for token in context.input_ids], False
    )
    assert unknown != context
    [read], [expected] = [
        await outcomes(stages, [Generate([given], np.zeros(1, np.float32), GREEDY)]) for given in (context, unknown)
    ]
    assert read == expected


async def test_scores_of_different_numbers_of_answers_share_a_batch(stages: Stages) -> None:
    [few, many] = await outcomes(stages, [Tokenize(["2138551"]), Tokenize(["Scheele", "it is not known", "Paris"])])
    jobs = []
    for seed, answers in enumerate((few, many)):
        contexts = generate(2, seed=seed)
        jobs.append(Score(contexts.contexts, contexts.doc_scores, "sequence", answers))
    for job, together in zip(jobs, await outcomes(stages, jobs), strict=True):
        [alone] = await outcomes(stages, [job])
        assert [answer.text for answer in together] == [answer.text for answer in job.answers]
        assert [answer.log_prob for answer in together] == pytest.approx([a.log_prob for a in alone], abs=1e-4)


async def test_probabilities_that_are_not_finite_are_an_error_and_no_answer(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save_tiny_checkpoint(tmp_path))
    checkpoint.model.generator.final_logits_bias.fill_(float("nan"))  # as an overflow in float16 leaves it
    [outcome] = await outcomes(Stages(checkpoint, 10_000, GeneratorMetrics(CollectorRegistry())), [generate(2)])
    assert isinstance(outcome, InferenceError)


def test_a_refused_job_leaves_the_others_of_its_batch_alone(stages: Stages) -> None:
    passage = [("title", "text")]
    refused, made = stages.run([Assemble("how many? " * 90, passage), Assemble("how many?", passage)])
    assert isinstance(refused, InvalidRequest)
    assert len(made) == 1
    refused, made = stages.run([Tokenize(["x " * 400]), Tokenize(["x"])])
    assert isinstance(refused, InvalidRequest)
    assert len(made) == 1
