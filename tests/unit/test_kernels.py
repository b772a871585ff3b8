"""What a decode step does beside its matrix products: plain torch against the engine's other code, Triton against it.

No GPU here: Triton's interpreter runs the kernels, in a process of its own, since Triton decides for it when it is
imported. It multiplies no bfloat16 (as of 3.7), so that what multiplies is interpreted in float16 instead.
"""

import importlib.util
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch.nn.functional import layer_norm

from generator_svc.engine import heads, kernels
from generator_svc.engine.attention import attend
from shared.schemas import Strategy
from tests.compiled_kernels import SHARED_BYTES, compiled
from tests.kernel_cases import ATTENTION, PRODUCTS, SMALL, arguments, check
from tests.search_cases import BEST, SEARCHES, check_answers, check_best, check_search

N, K, H, E = 4, 3, 2, 12
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEARCHING = {"_best_of_pieces", "_best_of_problem", "_keep_beams"}
NOT_INTERPRETED = dict.fromkeys(ATTENTION, (torch.bfloat16,)) | dict.fromkeys(PRODUCTS, (torch.bfloat16, torch.float32))
INTERPRETED = [
    (kernel, dtype, sizes)
    for kernel, sizes in SMALL
    for dtype in DTYPES
    if dtype not in NOT_INTERPRETED.get(kernel, ())
]


@pytest.fixture
def fresh_usable() -> Iterator[None]:
    kernels.usable.cache_clear()
    yield
    kernels.usable.cache_clear()


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(abs, 0).result()  # it starts with the variable
            patch.undo()
            yield pool


@pytest.mark.parametrize(("kernel", "dtype", "sizes"), INTERPRETED, ids=str)
def test_triton_computes_what_torch_does(
    interpreter: ProcessPoolExecutor, kernel: str, dtype: torch.dtype, sizes: dict[str, int]
) -> None:
    interpreter.submit(check, kernel, dtype, "cpu", sizes).result()


@pytest.mark.parametrize("sizes", BEST, ids=str)
def test_triton_finds_the_continuations_that_torch_finds(
    interpreter: ProcessPoolExecutor, sizes: dict[str, int]
) -> None:
    interpreter.submit(check_best, "cpu", sizes).result()


@pytest.mark.parametrize("sizes", SEARCHES, ids=str)
def test_a_search_by_triton_goes_the_way_of_one_by_torch(
    interpreter: ProcessPoolExecutor, sizes: dict[str, Any]
) -> None:
    interpreter.submit(check_search, "cpu", sizes, 8).result()


@pytest.mark.parametrize("strategy", ["token", "sequence"])
def test_questions_in_step_by_triton_are_answered_as_each_by_itself(
    interpreter: ProcessPoolExecutor, strategy: Strategy
) -> None:
    interpreter.submit(check_answers, strategy).result()


@pytest.mark.parametrize("capability", [89, 90])
def test_every_kernel_compiles_for_gpus_that_are_not_here(capability: int) -> None:
    """As it is launched for BART's shapes, with no more shared memory than a program may have."""
    pytest.importorskip("triton")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(compiled, capability).result()
    assert max(kernel.shared_bytes for kernel in found) <= SHARED_BYTES[capability]
    kernels_of = Counter(kernel.name for kernel in found)
    assert kernels_of.keys() == {
        "_add_norm", "_attend_to_nodes", "_attend_to_source", "_embed", "_log_sum",
        "_log_sum_of_chunks", "_marginalize", "_product", "_best_of_pieces", "_best_of_problem", "_keep_beams",
    }  # fmt: skip
    # One for 4 beams, whatever the documents, and one for 32.
    assert kernels_of["_keep_beams"] == 2
    # How many of a document's keys and values are to be fetched is all that is read before a kernel's turn.
    assert {(kernel.name, *kernel.early) for kernel in found if kernel.early} == (
        {("_attend_to_source", "ld.global.cg.b32")} if capability >= 90 else set()
    )
    chained = {kernel.name for kernel in found if "griddepcontrol.launch_dependents" in kernel.ptx}
    assert chained == {kernel.name for kernel in found if "griddepcontrol.wait" in kernel.ptx}
    assert chained == (kernels_of.keys() - SEARCHING if capability >= 90 else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_is_rounded_before_it_is_normalised(dtype: torch.dtype) -> None:
    x, residual, norm = arguments("add_norm", dtype, rows=5, width=24)
    weight, bias, eps = norm
    expected = layer_norm((x.float() + residual.float()).to(dtype), (24,), weight, bias, eps)
    assert torch.equal(kernels.add_norm(x, residual, norm), expected)


@pytest.mark.parametrize("start", [0, 1, 20])
def test_new_nodes_are_kept_and_nothing_else_is_written(start: int) -> None:
    sizes = {"documents": N, "rows": K, "heads": H, "width": E, "problems": 2, "start": start}
    qkv, nodes, visible, _ = arguments("attend_to_nodes", torch.float32, **sizes)
    before = nodes.clone()
    kernels.attend_to_nodes(qkv, nodes, visible, start)
    for n in range(N):
        for k in range(K):
            assert torch.equal(nodes[:, n, :, start + k], qkv[n, k, 1:])
    nodes[:, :, :, start : start + K] = before[:, :, :, start : start + K]
    assert torch.equal(nodes, before)


@pytest.mark.parametrize("problems", [1, 2, 4])
def test_a_row_attends_to_the_nodes_that_its_problem_lets_it_see(problems: int) -> None:
    sizes = {"documents": N, "rows": K, "heads": H, "width": E, "problems": problems, "start": 20}
    qkv, nodes, visible, start = arguments("attend_to_nodes", torch.float32, **sizes)
    attended = kernels.attend_to_nodes(qkv, nodes, visible, start)
    for n in range(N):
        hidden = ~visible[n // (N // problems), :, : start + K]
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
        keys, values = nodes[:, n, :, : start + K]
        expected = attend(qkv[n, :, 0].transpose(0, 1)[None], keys[None], values[None], mask)[0].transpose(0, 1)
        torch.testing.assert_close(attended[n], expected)


def test_a_row_attends_to_the_source_of_its_document_and_an_empty_slot_gives_zeros() -> None:
    q, cross, lengths = arguments("attend_to_source", torch.float32, documents=N, rows=K, heads=H, width=E, longest=30)
    assert 0 in lengths
    attended = kernels.attend_to_source(q, cross, lengths)
    for n, length in enumerate(lengths.tolist()):
        if length == 0:
            assert not attended[n].any()
            continue
        keys, values = cross[:, n : n + 1, :, :length]
        expected = attend(q[n : n + 1].transpose(1, 2), keys, values, None)[0].transpose(0, 1)
        torch.testing.assert_close(attended[n], expected)


def test_the_two_last_ones_are_the_head_of_rag_token() -> None:
    logits, _ = arguments("marginalize", torch.float32, questions=2, documents=5, rows=3, vocabulary=50, behind=0)
    log_prior = torch.randn(2, 5).log_softmax(1)
    normalizer = kernels.log_normalizer(logits.flatten(0, 2), log_prior.flatten()).view(2, 5, 3)
    found = kernels.marginalize(logits, normalizer)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, 3))
    for question in range(2):
        torch.testing.assert_close(found[question], heads.marginalize(logits[question], log_prior[question])[0])


@pytest.mark.usefixtures("fresh_usable")
def test_without_triton_one_warning_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "generator_svc.engine.triton_kernels", None)
    with capture_logs() as logs:
        assert [kernels.usable(torch.device("cuda")) for _ in range(2)] == [False, False]
    (warning,) = logs
    assert warning["log_level"] == "warning"
    assert warning["event"] == "triton_unusable"
    assert "install triton and a C compiler" in warning["advice"]


@pytest.mark.usefixtures("fresh_usable")
def test_nothing_is_missing_on_a_cpu() -> None:
    with capture_logs() as logs:
        assert not kernels.usable(torch.device("cpu"))
    assert logs == []
