"""What shares a batch, and that each job of a batch gets what it would get alone."""

from pathlib import Path

import numpy as np
import pytest

from generator_svc.checkpoint import load_checkpoint
from generator_svc.contexts import Context
from generator_svc.engine import GenerationOptions
from generator_svc.stages import Assemble, Encode, Generate, Score, Stages, Tokenize, batch_key, batch_size
from shared.errors import InferenceError, InvalidRequest
from tests.tiny_checkpoint import generator_tokenizer, save_tiny_checkpoint

GREEDY = GenerationOptions(num_beams=1, max_new_tokens=8)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return Stages(load_checkpoint(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))))


def generate(n_docs: int, options: GenerationOptions = GREEDY, strategy: str = "token", seed: int = 0) -> Generate:
    random = np.random.default_rng(seed)
    contexts = [Context([0, *random.integers(5, 300, 5 + i + seed).tolist(), 2], False) for i in range(n_docs)]
    return Generate(contexts, random.standard_normal(n_docs, dtype=np.float32), strategy, options)


def test_equal_options_share_a_batch_and_others_do_not() -> None:
    key = batch_key(generate(3))
    assert key == batch_key(generate(3, seed=1))
    assert key != batch_key(generate(2))
    assert key != batch_key(generate(3, strategy="sequence"))
    assert key != batch_key(generate(3, GenerationOptions(num_beams=2, max_new_tokens=8)))
    assert batch_key(Encode("a")) == batch_key(Encode("b")) != batch_key(Tokenize(["a"]))


def test_sampling_shares_with_nobody_not_even_with_its_like() -> None:
    job = generate(3, GenerationOptions(do_sample=True, seed=1))
    assert batch_key(job) != batch_key(job)


def test_the_size_of_a_job_is_its_rows() -> None:
    assert batch_size(Encode("a")) == 1
    assert batch_size(generate(3)) == 3
    assert batch_size(generate(3, GenerationOptions(num_beams=4))) == 12
    assert batch_size(generate(3, GenerationOptions(do_sample=True, num_return_sequences=5))) == 15


@pytest.mark.parametrize("strategy", ["token", "sequence"])
def test_a_merged_job_gets_its_own_answers(stages: Stages, strategy: str) -> None:
    options = GenerationOptions(num_beams=3, num_return_sequences=2, max_new_tokens=8)
    jobs = [generate(3, options, strategy, seed) for seed in range(4)]
    merged = stages.run(jobs)
    for job, together in zip(jobs, merged, strict=True):
        [alone] = stages.run([job])
        assert [answer.text for answer in together] == [answer.text for answer in alone]
        assert [answer.log_prob for answer in together] == pytest.approx([a.log_prob for a in alone], abs=1e-4)


def test_a_mask_token_without_a_row_of_its_own_is_read_as_unknown(tmp_path: Path) -> None:
    stages = Stages(load_checkpoint(save_tiny_checkpoint(tmp_path, mask_row=False)))
    mask = [("title", f"text {generator_tokenizer().mask_token}")]
    [[context]] = stages.run([Assemble("how many?", mask)])
    unknown = Context(
        [3 if token == generator_tokenizer().mask_token_id else token for token in context.input_ids], False
    )
    assert unknown != context
    [[read]], [[expected]] = (
        stages.run([Generate([given], np.zeros(1, np.float32), "token", GREEDY)]) for given in (context, unknown)
    )
    assert read == expected


def test_scores_of_different_numbers_of_answers_share_a_batch(stages: Stages) -> None:
    [few, many] = stages.run([Tokenize(["2138551"]), Tokenize(["Scheele", "it is not known", "Paris"])])
    jobs = []
    for seed, answers in enumerate((few, many)):
        contexts = generate(2, seed=seed)
        jobs.append(Score(contexts.contexts, contexts.doc_scores, "sequence", answers))
    for job, together in zip(jobs, stages.run(jobs), strict=True):
        [alone] = stages.run([job])
        assert [answer.text for answer in together] == [answer.text for answer in job.answers]
        assert [answer.log_prob for answer in together] == pytest.approx([a.log_prob for a in alone], abs=1e-4)


def test_probabilities_that_are_not_finite_are_an_error_and_no_answer(tmp_path: Path) -> None:
    stages = Stages(load_checkpoint(save_tiny_checkpoint(tmp_path)))
    stages.checkpoint.model.generator.final_logits_bias.fill_(float("nan"))  # as an overflow in float16 leaves it
    [outcome] = stages.run([generate(2)])
    assert isinstance(outcome, InferenceError)


def test_a_refused_job_leaves_the_others_of_its_batch_alone(stages: Stages) -> None:
    passage = [("title", "text")]
    refused, made = stages.run([Assemble("how many? " * 90, passage), Assemble("how many?", passage)])
    assert isinstance(refused, InvalidRequest)
    assert len(made) == 1
    refused, made = stages.run([Tokenize(["x " * 400]), Tokenize(["x"])])
    assert isinstance(refused, InvalidRequest)
    assert len(made) == 1
