"""Questions that move in step over fixed tensors, as CUDA graphs replay them, against each by itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from generator_svc.engine import RagEngine
from generator_svc.engine.bart_backend import BartBackend
from generator_svc.engine.lanes import Lanes
from tests.parity import in_memory
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
