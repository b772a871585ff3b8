"""Triton's kernels of the search beside plain torch on the CPU: for Triton's interpreter, and for CUDA.

Shapes: as in :mod:`generator_svc.engine.beams`.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from generator_svc.engine import Evidence, RagEngine, affine, kernels
from generator_svc.engine.beams import REJECTED, Beams
from generator_svc.engine.layers import Norm
from generator_svc.engine.search import BeamSearch
from shared.schemas import Strategy
from tests.parity import in_memory
from tests.tiny_checkpoint import tiny_model

START, EOS, PAD = 0, 2, 1
# Vocabularies of less than a piece, of a whole one and of some; more beams than a tile's power of two.
BEST: list[dict[str, int]] = [
    {"problems": 2, "beams": 3, "vocabulary": 50, "count": 6},
    {"problems": 1, "beams": 4, "vocabulary": 9001, "count": 8},
    {"problems": 3, "beams": 1, "vocabulary": 4096, "count": 2},
    {"problems": 2, "beams": 5, "vocabulary": 5000, "count": 15},
]
SEARCHES: list[dict[str, Any]] = [
    {"problems": 1, "beams": 2, "vocabulary": 7, "max_length": 4, "documents": 1},
    {"problems": 3, "beams": 3, "vocabulary": 40, "max_length": 9, "documents": 2},
    {"problems": 4, "beams": 2, "vocabulary": 40, "max_length": 9, "documents": 1, "length_penalty": 3.0},
    {"problems": 4, "beams": 2, "vocabulary": 40, "max_length": 9, "documents": 1, "length_penalty": 3.0}
    | {"early_stopping": True},
    {"problems": 2, "beams": 5, "vocabulary": 60, "max_length": 7, "documents": 5, "early_stopping": "never"},
    {"problems": 2, "beams": 4, "vocabulary": 30, "max_length": 7, "documents": 1, "length_penalty": 2.0},
    {"problems": 2, "beams": 4, "vocabulary": 30, "max_length": 7, "documents": 1, "length_penalty": -1.0},
    {"problems": 1, "beams": 2, "vocabulary": 20, "max_length": 20, "documents": 3, "ends": False},
    {"problems": 1, "beams": 17, "vocabulary": 90, "max_length": 5, "documents": 2},
]
# BART's, with 4 questions of 5 documents and 4 beams: of RAG-Token, and of RAG-Sequence.
REAL_BEST: list[dict[str, int]] = [
    {"problems": 4, "beams": 4, "vocabulary": 50265, "count": 8},
    {"problems": 20, "beams": 4, "vocabulary": 50265, "count": 8},
    {"problems": 2, "beams": 32, "vocabulary": 50265, "count": 64},
]
REAL_SEARCHES: list[dict[str, Any]] = [
    {"problems": 4, "beams": 4, "vocabulary": 50265, "max_length": 40, "documents": 5, "ends": False},
    {"problems": 20, "beams": 4, "vocabulary": 50265, "max_length": 17, "documents": 1},
    {"problems": 2, "beams": 32, "vocabulary": 50265, "max_length": 130, "documents": 5},
]


def check_best(device: str, sizes: dict[str, int]) -> None:
    """Raises:
    AssertionError: Triton finds other continuations than torch.
    """
    generator = torch.Generator().manual_seed(0)
    scores_PKV = torch.randn(sizes["problems"], sizes["beams"], sizes["vocabulary"], generator=generator)
    scores_PKV[torch.rand(scores_PKV.shape, generator=generator) < 0.3] = -torch.inf
    beam_scores_PK = torch.randn(sizes["problems"], sizes["beams"], generator=generator)
    expected = kernels.best_continuations(scores_PKV, beam_scores_PK, sizes["count"])
    compiled: Any = importlib.import_module("generator_svc.engine.triton_search")
    found = compiled.best_continuations(scores_PKV.to(device), beam_scores_PK.to(device), sizes["count"])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.cpu(), other)


class Steps:
    """A search that moves on over random log-probabilities, the same on every device.

    Args:
        ends: whether the token that ends an answer is a likely one.
    """

    def __init__(
        self, device: str, *, problems: int, beams: int, vocabulary: int, ends: bool = True, **rules: Any
    ) -> None:
        self._device, self._ends = torch.device(device), ends
        self._shape = (problems * beams, vocabulary)
        self._generator = torch.Generator().manual_seed(problems * beams)
        options = {"length_penalty": 1.0, "early_stopping": False} | rules
        self.documents = options["documents"]
        self.search = BeamSearch(
            problems=problems, beams=beams, start=START, pad=PAD, processors=LogitsProcessorList(),
            stopping=StoppingCriteriaList([MaxLengthCriteria(rules["max_length"]), EosTokenCriteria(EOS)]),
            returned=beams, eos_tokens=1, device=self._device, **options,
        )  # fmt: skip
        self.alive_P = torch.ones(problems, dtype=torch.bool, device=self._device)

    def step(self) -> Tensor:
        """(P, K) the row that each beam continues."""
        logits_RV = torch.randn(self._shape, generator=self._generator)
        logits_RV[:, EOS] += torch.randn(self._shape[0], generator=self._generator).mul(3) + 2 if self._ends else -99.0
        shares_NRV = torch.randn(self.documents, *self._shape, generator=self._generator).to(self._device)
        log_probs_RV = logits_RV.log_softmax(1).to(self._device)
        if self.search.length == 1:
            log_probs_RV = log_probs_RV[: len(self.alive_P)]
        return self.search.choose_in_place(log_probs_RV, lambda rows, tokens: shares_NRV[:, rows, tokens], self.alive_P)


def check_search(device: str, sizes: dict[str, Any], columns: int) -> None:
    """With so many columns of hypotheses moved at once: with few they take several turns.

    Raises:
    AssertionError: a search by Triton goes another way than one by torch.
    """
    compiled: Any = importlib.import_module("generator_svc.engine.triton_search")
    by_torch, by_triton = Steps("cpu", **sizes), Steps(device, **sizes)
    for _ in range(sizes["max_length"] - 1):
        expected = by_torch.step()
        # in the interpreter tensors lie on the CPU, and torch would be chosen
        with patch.multiple(kernels, **of_triton()), patch.object(compiled, "COLUMNS", columns):
            found = by_triton.step()
        alive_P = by_torch.alive_P
        assert torch.equal(by_triton.alive_P.cpu(), alive_P)
        here, there = by_torch.search.state, Beams(*(kept.cpu() for kept in by_triton.search.state))
        assert torch.equal(there.is_done, here.is_done)
        is_open_PK = (here.open_scores > REJECTED / 2) & alive_P[:, None]
        assert torch.equal(found.cpu()[is_open_PK], expected[is_open_PK])
        for name in Beams._fields:
            at_PK = is_open_PK if name.startswith("open") else here.is_done
            torch.testing.assert_close(getattr(there, name)[at_PK], getattr(here, name)[at_PK])
    assert by_torch.search.results()


def check_answers(strategy: Strategy) -> None:
    """In the interpreter: questions in step, with every kernel there is, against each by itself.

    Raises:
        AssertionError: they have other answers.
    """
    generator = torch.Generator().manual_seed(0)
    contexts = [torch.randint(5, 300, (length,), generator=generator) for length in (9, 20, 4, 13)]
    rules: dict[str, Any] = {"strategy": strategy, "num_beams": 3, "max_new_tokens": 4, "repetition_penalty": 1.2}

    def answers(engine: RagEngine) -> list[Evidence]:
        tasks = [engine.task(contexts[at : at + 2], torch.tensor([0.3, -0.2]), **rules) for at in (0, 2)]
        return engine.run(tasks)

    ordinary = answers(RagEngine(in_memory(tiny_model())))
    with everything_by_triton():
        in_step = RagEngine(in_memory(tiny_model()))
        backend: Any = in_step._backend
        backend._bart.on_cpu = False
        backend.use_lanes(capture=False)
        by_triton = answers(in_step)
    for expected, found in zip(ordinary, by_triton, strict=True):
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.log_probs, expected.log_probs)


@contextmanager
def everything_by_triton() -> Iterator[None]:
    """On a CPU, what a decoder leaves to Triton's kernels on CUDA, the products included."""

    def after(self: Norm, product: affine.Affine, x: Tensor, residual: Tensor) -> Tensor:
        return kernels.affine_norm(x, product.weight, product.bias, residual, self)

    with (
        patch.multiple(kernels, **of_triton()),
        patch.object(affine, "ONEDNN_DTYPES", []),
        patch.object(Norm, "after", after),
    ):
        yield


def of_triton() -> dict[str, Any]:
    """The functions of :mod:`generator_svc.engine.kernels`, by name, as Triton's kernels compute them."""
    files = ("attention", "kernels", "products", "search")
    modules = [importlib.import_module(f"generator_svc.engine.triton_{name}") for name in files]
    names = [name for name, function in vars(kernels).items() if hasattr(function, "__wrapped__") and name != "usable"]
    return {name: getattr(module, name) for module in modules for name in names if hasattr(module, name)}
