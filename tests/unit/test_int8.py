"""Products in int8: exact over the rounded numbers, row by row alone, near the true ones; and who is refused."""

import dataclasses
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu

from generator_svc.checkpoint import load_checkpoint
from generator_svc.engine import RagEngine, int8
from generator_svc.engine.decoder import Bart
from generator_svc.engine.int8 import ZERO, Int8Affine, quantized, quantized_weight
from shared.errors import StartupError
from tests.parity import draw, in_memory
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_model

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
dtypes = st.sampled_from(list(EPS))
sizes = st.integers(1, 70)
runs_here = pytest.mark.skipif(not int8.supported(), reason="this CPU has no instructions for products of int8")


def random_rows(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different size, some of them nothing but zeros."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 7, (shape[0], 1), generator=generator)
    kept = torch.rand(shape[0], 1, generator=generator) > 0.1
    return (torch.randn(*shape, generator=generator) * scale * kept).to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@given(seed=st.integers(0, 10_000), rows=sizes, width=sizes, dtype=dtypes)
def test_a_rounded_number_is_half_a_step_away_at_most(seed: int, rows: int, width: int, dtype: torch.dtype) -> None:
    x_RI = random_rows(seed, rows, width, dtype=dtype)
    integers_RI, scale_R1 = quantized(x_RI)
    assert scale_R1.dtype == dtype
    assert integers_RI.min() >= ZERO - 127
    back_RI = (integers_RI.double() - ZERO) * scale_R1.double()
    assert ((back_RI - x_RI.double()).abs() <= scale_R1.double() * (0.5 + 1e-4)).all()


@given(seed=st.integers(0, 10_000), rows=sizes, width=sizes, dtype=dtypes, together=st.integers(1, 300))
def test_many_rows_are_rounded_in_parts_as_at_once(
    seed: int, rows: int, width: int, dtype: torch.dtype, together: int
) -> None:
    x_RI = random_rows(seed, rows, width, dtype=dtype)
    with patch.object(int8, "TOGETHER", together):
        in_parts = quantized(x_RI)
    assert all(map(torch.equal, in_parts, quantized(x_RI)))


@given(seed=st.integers(0, 10_000), rows=sizes, width=sizes, dtype=dtypes)
def test_a_rounded_weight_is_half_a_step_away_at_most(seed: int, rows: int, width: int, dtype: torch.dtype) -> None:
    weight_OI = random_rows(seed, rows, width, dtype=dtype)
    integers_OI, scale_O = quantized_weight(weight_OI)
    gap_OI = (integers_OI.double() * scale_O.double()[:, None] - weight_OI.double()).abs()
    assert (gap_OI <= scale_O.double()[:, None] * (0.5 + 1e-4)).all()


@runs_here
@given(seed=st.integers(0, 10_000), rows=sizes, width=sizes, dtype=dtypes)
def test_a_product_is_that_of_the_rounded_numbers(seed: int, rows: int, width: int, dtype: torch.dtype) -> None:
    x_RI, weight_OI = random_rows(seed, rows, width, dtype=dtype), random_rows(seed + 1, 40, width, dtype=dtype)
    bias_O = torch.randn(40).to(dtype)
    (integers_RI, scale_R1), (integers_OI, scale_O) = quantized(x_RI), quantized_weight(weight_OI)
    product_RO = (integers_RI.double() - ZERO) @ integers_OI.double().T * scale_R1.double() * scale_O.double()
    found_RO = Int8Affine(weight_OI, bias_O, out=dtype)(x_RI).double()
    bound_RO = 2 * EPS[dtype] * (product_RO.abs() + bias_O.double().abs()) + 1e-30
    assert ((found_RO - (product_RO + bias_O.double())).abs() <= bound_RO).all()


@runs_here
@given(seed=st.integers(0, 10_000), rows=st.integers(2, 200), dtype=dtypes)
def test_a_row_is_the_same_whatever_stands_beside_it(seed: int, rows: int, dtype: torch.dtype) -> None:
    x_RI = random_rows(seed, rows, 48, dtype=dtype)
    affine = Int8Affine(random_rows(seed + 1, 33, 48, dtype=dtype), torch.randn(33), out=dtype, gelu=True)
    at = seed % rows
    assert torch.equal(affine(x_RI)[at], affine(x_RI[at : at + 1])[0])


@runs_here
def test_a_product_of_usual_numbers_is_off_by_one_percent() -> None:
    generator = torch.Generator().manual_seed(0)
    x_RI, weight_OI = (torch.randn(*shape, generator=generator) for shape in ((100, 768), (3072, 768)))
    bias_O = torch.randn(3072, generator=generator)
    expected_RO = x_RI.double() @ weight_OI.double().T + bias_O.double()
    assert error(Int8Affine(weight_OI, bias_O, out=torch.float32)(x_RI), expected_RO) < 0.015
    with_gelu = Int8Affine(weight_OI, bias_O, out=torch.float32, gelu=True)(x_RI)
    assert error(with_gelu, gelu(expected_RO)) < 0.015


@runs_here
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none_and_in_its_row(broken: float) -> None:
    x_RI = torch.randn(6, 32)
    affine = Int8Affine(torch.randn(8, 32), torch.randn(8), out=torch.float32)
    clean_RO = affine(x_RI)
    x_RI[2, 5] = broken
    found_RO = affine(x_RI)
    assert not found_RO[2].isfinite().any()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(found_RO[others], clean_RO[others])


@runs_here
def test_answers_are_off_by_their_rounding() -> None:
    """Weights and states have seven bits: on random models, whose calls are all close, a little more than bfloat16."""
    gaps: list[float] = []
    for seed in range(60):
        drawn = draw(seed)
        options = {"strategy": drawn.strategy, "max_length": drawn.options["max_length"], "num_beams": 1}
        inputs = (drawn.ids, drawn.mask, drawn.doc_scores)
        exact = RagEngine(in_memory(draw(seed).model))
        made = RagEngine(dataclasses.replace(in_memory(drawn.model), dtype=torch.int8)).generate(*inputs, **options)
        scored = exact.score(*inputs, made.sequences, question=made.question, strategy=drawn.strategy)
        gaps += ((made.log_probs - scored.log_probs).abs() / (made.sequences.shape[1] - 1)).tolist()
    gaps.sort()
    assert gaps[len(gaps) // 2] < 0.1
    assert gaps[-1] < 1.5


@runs_here
def test_no_weight_is_held_twice() -> None:
    model = tiny_model(forced_eos=False)
    before = sum(parameter.numel() for parameter in model.generator.parameters())
    bart = Bart(model.generator, int8=True)
    left = sum(parameter.numel() for parameter in model.generator.parameters())
    layers = [product for block in bart.encoder_layers for product in (block.qkv, block.out, block.fc1, block.fc2)]
    assert all(isinstance(product, Int8Affine) for product in layers)
    tables = model.generator.model.shared.weight.numel()
    assert left < before - 0.4 * (before - tables)
    assert model.generator.model.encoder.layers[0].fc1.weight.numel() == 0


@pytest.mark.parametrize(
    ("of_checkpoint", "supported", "reason"),
    [
        ({}, False, "VNNI or AMX instructions, and this one has neither"),
        ({"device": "cuda"}, True, "on CUDA take bfloat16"),
    ],
)
def test_what_cannot_multiply_in_int8_says_so(
    monkeypatch: pytest.MonkeyPatch, of_checkpoint: dict[str, str], supported: bool, reason: str
) -> None:
    monkeypatch.setattr("generator_svc.engine.engine.int8_supported", lambda: supported)
    changes = {name: torch.device(value) for name, value in of_checkpoint.items()}
    with pytest.raises(StartupError, match=reason):
        RagEngine(dataclasses.replace(in_memory(tiny_model()), dtype=torch.int8, **changes))


@runs_here
def test_the_question_encoder_stays_as_it_is(tmp_path: Path) -> None:
    loaded = load_checkpoint(save_tiny_checkpoint(tmp_path), dtype=torch.int8)
    assert loaded.dtype == torch.int8
    assert loaded.model.generator.dtype == torch.float32
    RagEngine(loaded)
    assert loaded.model.generator.dtype == int8.states_dtype()
    assert loaded.model.question_encoder.dtype == torch.float32
