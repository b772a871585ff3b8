"""Which of two ways to compute the same is faster on this GPU: tried, when it is first met."""

from collections.abc import Callable, Sequence
from typing import Any

import structlog
import torch
from torch import Tensor

LEAST_GAIN = 1.03  # that ours must bring: times differ by less than that between two tries
MOST_GAP = 0.03  # of the largest number, which bfloat16 has eight bits for
RUNS, REPEATS = 8, 3
ROWS = (16, 32, 64, 128, 256)
"""How rows are told apart: so many or fewer. With more it is arithmetic that counts, and libraries know how."""

_log = structlog.get_logger(__name__)
_better: dict[tuple[Any, ...], bool] = {}


def is_better(ours: Callable[..., Any], theirs: Callable[..., Any], arguments: Sequence[Any]) -> bool:
    """Whether `ours` gives what `theirs` gives, in less time. Neither may change what it is given.

    The first argument has rows, by the number of which times are remembered, and the second is the matrix that they are
    multiplied with. Nothing can be tried while a graph is captured, so that something new is left to `theirs` there.
    """
    x_RI, weight_OI = arguments[:2]
    rows = next(most for most in ROWS if len(x_RI) <= most)
    form = (ours.__name__, x_RI.device, x_RI.dtype, rows, *weight_OI.shape)
    if form not in _better:
        if torch.cuda.is_current_stream_capturing():
            return False
        _better[form] = _tried(ours, theirs, arguments)
    return _better[form]


def _tried(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], arguments: Sequence[Any]) -> bool:
    x_RI, weight_OI = arguments[:2]
    about = {"kernel": ours.__name__, "rows": len(x_RI), "matrix": tuple(weight_OI.shape), "dtype": str(x_RI.dtype)}
    try:
        found, expected = ours(*arguments), theirs(*arguments)
        atol = MOST_GAP * float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
        torch.testing.assert_close(found, expected, rtol=MOST_GAP, atol=atol, equal_nan=True)
        ours_us, theirs_us = (microseconds(run, arguments, x_RI.device) for run in (ours, theirs))
    except Exception as error:  # noqa: BLE001  whatever it is, torch's own does the same
        _log.warning("kernel_unusable", error=f"{type(error).__name__}: {error}", advice="torch's is used", **about)
        return False
    _log.debug("kernel_tried", ours_us=ours_us, torch_us=theirs_us, **about)
    return ours_us * LEAST_GAIN < theirs_us


def microseconds(run: Callable[..., Tensor], arguments: Sequence[Any], device: torch.device) -> float:
    """Of one run as part of a captured graph, its weights not in the cache, and of clearing that."""
    spoiler = torch.empty(torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(RUNS):
            spoiler.zero_()
            run(*arguments)
    graph.replay()
    times = []
    for _ in range(REPEATS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(1000 * float(began.elapsed_time(ended)) / RUNS)
    return min(times)
