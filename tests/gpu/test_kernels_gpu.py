"""Triton's kernels on CUDA against plain torch on the CPU, and in a captured graph."""

from typing import Any

import pytest
import torch
from torch import Tensor

from generator_svc.engine import kernels
from tests.kernel_cases import ATTENTION, REAL, SMALL, arguments, check
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
        return getattr(kernels, kernel)(*values)

    captured, later = (arguments(kernel, torch.bfloat16, DEVICE, seed, **sizes) for seed in (1, 2))
    run(captured)  # compiled now
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(captured)
    for mine, new in zip(captured, later, strict=True):
        if isinstance(mine, Tensor):
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
    from generator_svc.engine import triton_kernels  # noqa: PLC0415  where Triton is

    for start in (0, 1, 4, 16, 17, 64, 80):
        sizes = {"documents": 4, "rows": 4, "heads": 2, "width": 64, "problems": 2, "start": 80}
        *others, _ = arguments("attend_to_nodes", torch.bfloat16, DEVICE, **sizes)
        kernels.attend_to_nodes(*others, start)
        compiled = sum(len(cache[0]) for cache in triton_kernels._attend_to_nodes.device_caches.values())
        if start == 0:
            at_first = compiled
    assert compiled == at_first
