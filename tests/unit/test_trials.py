"""Which of two kernels is taken: the faster one, as long as it computes the same. Times are given here."""

from collections.abc import Callable, Iterator

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from generator_svc.engine import trials

TIMES = {"quick": 10.0, "quicker": 9.8, "slow": 20.0, "wrong": 1.0, "broken": 1.0, "lost": 1.0}


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was timed, in the order of its being timed."""
    timed: list[str] = []

    def microseconds(run: Callable[..., Tensor], *_: object) -> float:
        timed.append(run.__name__)
        return TIMES[run.__name__]

    monkeypatch.setattr(trials, "microseconds", microseconds)
    monkeypatch.setattr(trials, "_better", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return timed


def quick(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def quicker(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def slow(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def wrong(x: Tensor, weight: Tensor) -> Tensor:
    return 1.5 * quick(x, weight)


def lost(x: Tensor, weight: Tensor) -> Tensor:
    return torch.full_like(quick(x, weight), torch.nan)


def broken(x: Tensor, weight: Tensor) -> Tensor:
    raise RuntimeError("out of resource: shared memory")


def arguments(rows: int, width: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width), torch.randn(5, width)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"), [(quick, slow, True), (slow, quick, False), (quicker, quick, False)]
)
def test_ours_is_taken_where_it_is_clearly_faster(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], expected: bool
) -> None:
    assert trials.is_better(ours, theirs, arguments(3)) is expected


def test_each_form_is_tried_once(measured: list[str]) -> None:
    for rows in (17, 32, 20, 17):
        assert trials.is_better(quick, slow, arguments(rows))
    assert measured == ["quick", "slow"]
    for other in (arguments(33), arguments(16), arguments(17, width=16)):
        assert trials.is_better(quick, slow, other)
    assert measured == ["quick", "slow"] * 4


@pytest.mark.parametrize("ours", [wrong, lost, broken])
def test_what_does_not_compute_the_same_is_left_with_one_warning(ours: Callable[..., Tensor]) -> None:
    with capture_logs() as logs:
        assert [trials.is_better(ours, slow, arguments(3)) for _ in range(2)] == [False, False]
    (warning,) = logs
    assert (warning["event"], warning["log_level"]) == ("kernel_unusable", "warning")
    assert (warning["kernel"], warning["rows"], warning["matrix"]) == (ours.__name__, 3, (5, 8))


def test_numbers_that_neither_has_are_no_difference() -> None:
    x, weight = arguments(3)
    x[1] = torch.nan
    assert trials.is_better(quick, slow, (x, weight))


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch, measured: list[str]) -> None:
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not trials.is_better(quick, slow, arguments(3))
    assert not measured
    assert trials.is_better(quick, slow, arguments(3))
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert trials.is_better(quick, slow, arguments(3))
