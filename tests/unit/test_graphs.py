"""The decode step over fixed tensors, as CUDA graphs replay it, against the ordinary one."""

import gc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from generator_svc.engine import RagEngine, graphs
from generator_svc.engine.bart_backend import BartBackend
from generator_svc.engine.decoder import Bart
from generator_svc.engine.graphs import StaticGroups
from tests.parity import draw, in_memory
from tests.tiny_checkpoint import tiny_model

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=10)


def static_bart(model: Any) -> Bart:
    bart = Bart(model.generator)
    bart.graphs = StaticGroups(bart, capture=False)
    return bart


def grown(bart: Bart, contexts: list[Tensor], steps: list[list[list[int]]]) -> list[Tensor]:
    """The logits of every step. ``steps``: for each document the parents of its new rows; none where it pauses."""
    documents = bart.prefill(contexts, 40)
    root = torch.ones(1, 1, dtype=torch.bool)
    behind: dict[int, Tensor] = {}  # (rows, nodes) of each document: what its newest rows descend from
    logits = []
    for depth, parents in enumerate(steps):
        going = [at for at, rows in enumerate(parents) if rows]
        for at in going:
            mask, rows = behind.get(at), parents[at]
            new = torch.eye(len(rows), dtype=torch.bool)
            behind[at] = root if mask is None else torch.cat([mask[torch.tensor(rows) % len(mask)], new], 1)
        masks = [behind[at] for at in going]
        given = [None if len(mask) == 1 and bool(mask.all()) else mask for mask in masks]
        tokens = torch.cat([torch.arange(len(mask)) + depth + at for at, mask in zip(going, masks, strict=True)])
        depths = torch.full_like(tokens, depth)
        logits.append(bart.next_logits([documents[at] for at in going], tokens % bart.vocab_size, depths, given))
    return logits


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), lengths=LENGTHS, data=st.data())
def test_a_static_step_gives_the_logits_of_an_ordinary_one(seed: int, lengths: list[int], data: st.DataObject) -> None:
    """Documents whose trees grow by up to five rows a step, or pause."""
    model = draw(seed).model
    vocabulary = model.config.generator.vocab_size
    contexts = [torch.arange(length) * 7 % vocabulary for length in lengths]
    rows = st.lists(st.integers(0, 4), max_size=5)
    later = st.lists(rows, min_size=len(lengths), max_size=len(lengths)).filter(any)
    steps = [[[0]] * len(lengths), *data.draw(st.lists(later, max_size=4))]
    expected, found = (grown(bart, contexts, steps) for bart in (Bart(model.generator), static_bart(model)))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def engines(model: Any) -> tuple[RagEngine, RagEngine, StaticGroups]:
    ordinary, static = RagEngine(in_memory(model)), RagEngine(in_memory(model))
    backend = static._backend
    assert isinstance(backend, BartBackend)
    backend._bart.graphs = StaticGroups(backend._bart, capture=False)
    return ordinary, static, backend._bart.graphs


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
        {"num_beams": 3, "max_new_tokens": 10},
        {"do_sample": True, "seed": 3, "num_return_sequences": 4, "max_new_tokens": 8},
        {"num_beams": 4, "min_new_tokens": 130, "max_new_tokens": 140},  # more nodes than any static group has
    ],
    ids=str,
)
def test_generation_over_static_groups_changes_nothing(strategy: Any, options: dict[str, Any]) -> None:
    ordinary, static, _ = engines(tiny_model())
    for n_questions in (1, 3, 1):  # the third takes the first one's tensors over
        inputs = contexts(n_questions, 3)
        expected = ordinary.generate(*inputs, strategy=strategy, **options)
        found = static.generate(*inputs, strategy=strategy, **options)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert found.log_probs.tolist() == pytest.approx(expected.log_probs.tolist(), abs=1e-4)


def test_a_group_that_outgrows_its_places_goes_on_the_ordinary_way() -> None:
    """Thirty steps of five rows where there are places for 64 nodes; one document is ahead of the other."""
    model = tiny_model()
    contexts = [torch.arange(3, 12), torch.arange(5, 9)]
    steps = [[[0], [0]], *[[[0, 1, 2, 0, 1], [3, 2, 1] if depth % 2 else []] for depth in range(30)]]
    static = static_bart(model)
    for ours, theirs in zip(grown(static, contexts, steps), grown(Bart(model.generator), contexts, steps), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_tensors_are_used_again_and_no_more_are_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GROUPS", 2)
    bart = static_bart(tiny_model())
    first = bart.prefill([torch.arange(3, 9)], 8)
    tensors = first[0].group.cross[0].data_ptr()
    second, third = bart.prefill([torch.arange(3, 9)], 8), bart.prefill([torch.arange(3, 9)], 8)
    assert second[0].group.cross[0].shape == first[0].group.cross[0].shape == (2, 1, *first[0].group.cross[0].shape[2:])
    assert third[0].group.cross[0].shape[3] == 6  # as long as its document: a group of its own
    del first
    gc.collect()
    again = bart.prefill([torch.arange(3, 12)], 8)
    assert again[0].group.cross[0].data_ptr() == tensors
