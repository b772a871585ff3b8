"""Triton's kernels on CUDA against plain torch on the CPU, and in a captured graph."""

from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from generator_svc.engine import kernels, trials
from tests.kernel_cases import ATTENTION, OPTIONS, PRODUCTS, REAL, SMALL, arguments, check, tensors_of
from tests.search_cases import BEST, REAL_BEST, REAL_SEARCHES, SEARCHES, check_best, check_search

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _has_triton() -> None:
    pytest.importorskip("triton")


def test_the_kernels_are_used_where_triton_is_installed() -> None:
    assert kernels.usable(torch.empty(0, device=DEVICE).device)


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "sizes"), SMALL + REAL, ids=str)
def test_triton_computes_what_torch_does(kernel: str, sizes: dict[str, int], dtype: torch.dtype) -> None:
    if kernel in PRODUCTS and dtype == torch.float32:
        pytest.skip("left to torch")
    check(kernel, dtype, DEVICE, sizes)


@pytest.mark.parametrize("sizes", BEST + REAL_BEST, ids=str)
def test_triton_finds_the_continuations_that_torch_finds(sizes: dict[str, int]) -> None:
    check_best(DEVICE, sizes)


@pytest.mark.parametrize("columns", [8, 64])
@pytest.mark.parametrize("sizes", SEARCHES + REAL_SEARCHES, ids=str)
def test_a_search_by_triton_goes_the_way_of_one_by_torch(sizes: dict[str, Any], columns: int) -> None:
    check_search(DEVICE, sizes, columns)


@pytest.mark.parametrize(("kernel", "sizes"), REAL, ids=str)
def test_a_captured_kernel_reads_what_has_come_since(kernel: str, sizes: dict[str, int]) -> None:
    def run(values: list[Any]) -> Tensor:
        return getattr(kernels, kernel)(*values, **OPTIONS.get(kernel, {}))

    captured, later = (arguments(kernel, torch.bfloat16, DEVICE, seed, **sizes) for seed in (1, 2))
    run(captured)  # compiled now
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(captured)
    for mine, new in zip(tensors_of(captured), tensors_of(later), strict=True):
        mine.copy_(new)
    graph.replay()
    assert torch.equal(found, run(later))


@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize(("rows", "width"), [(33, 64), (4, 130), (32, 128)])
def test_more_than_a_program_holds_is_left_to_torch(kernel: str, rows: int, width: int) -> None:
    sizes = {"documents": 2, "rows": rows, "heads": 1, "width": width}
    sizes |= {"problems": 1, "start": 9} if kernel == "attend_to_nodes" else {"longest": 40}
    expected = getattr(kernels, kernel)(*arguments(kernel, torch.float32, **sizes))
    found = getattr(kernels, kernel)(*arguments(kernel, torch.float32, DEVICE, **sizes))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_a_tree_that_grows_compiles_nothing_more() -> None:
    from generator_svc.engine import triton_attention  # noqa: PLC0415  where Triton is

    for start in (0, 1, 4, 16, 17, 64, 80):
        sizes = {"documents": 4, "rows": 4, "heads": 2, "width": 64, "problems": 2, "start": 80}
        *others, _ = arguments("attend_to_nodes", torch.bfloat16, DEVICE, **sizes)
        kernels.attend_to_nodes(*others, start)
        compiled = sum(len(cache[0]) for cache in triton_attention._attend_to_nodes.device_caches.values())
        if start == 0:
            at_first = compiled
    assert compiled == at_first


def test_the_faster_product_is_found_when_its_form_is_first_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_better", {})
    for kernel, sizes in (
        ("affine", {"rows": 20, "inner": 768, "outer": 3072, "gelu": 1}),
        ("affine_norm", {"rows": 20, "inner": 3072, "outer": 768}),
    ):
        values = arguments(kernel, torch.bfloat16, DEVICE, **sizes)
        with capture_logs() as logs:
            found = getattr(kernels, kernel)(*values)
        assert [log["event"] for log in logs if log["log_level"] == "warning"] == []
        torch.testing.assert_close(found, getattr(kernels, kernel).__wrapped__(*values), atol=3e-2, rtol=3e-2)
    assert len(trials._better) == 2


def test_kernels_that_are_launched_ahead_of_their_turn_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads at once what the one before has just written, a hundred times over, in a graph."""
    from generator_svc.engine import triton_launch, triton_products  # noqa: PLC0415  where Triton is

    generator = torch.Generator().manual_seed(0)
    norm = torch.ones(768, device=DEVICE, dtype=torch.bfloat16)
    narrow, wide = (
        (torch.randn(*shape, generator=generator) * shape[1] ** -0.5).to(DEVICE, torch.bfloat16)
        for shape in ((768, 3072), (3072, 768))
    )
    bias = torch.randn(3072, generator=generator).to(DEVICE, torch.bfloat16)
    start = torch.randn(160, 768, generator=generator).to(DEVICE, torch.bfloat16)

    def chain() -> Tensor:
        x = start
        for _ in range(100):
            inner = triton_products.affine(x, wide, bias, True)
            x = triton_products.affine_norm(inner, narrow, norm, x, (norm, norm, 1e-5))
        return x

    assert triton_launch.device(torch.cuda.current_device()).chains == (torch.cuda.get_device_capability()[0] >= 9)
    expected = chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(20):
        graph.replay()
        assert torch.equal(found, expected)
    in_turn = triton_launch.device(torch.cuda.current_device())._replace(chains=False)
    monkeypatch.setattr(triton_launch, "device", lambda _: in_turn)
    assert torch.equal(chain(), expected)
