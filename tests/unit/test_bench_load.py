"""Open-loop load: when requests are due, and from when their latency counts."""

import asyncio
import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load import arrivals, figures, offer, percentile


def test_arrivals_are_a_poisson_process_and_the_same_for_one_seed() -> None:
    due = arrivals(50.0, 200.0, seed=1)
    assert due == arrivals(50.0, 200.0, seed=1) != arrivals(50.0, 200.0, seed=2)
    assert due == sorted(due)
    assert due[-1] < 200.0
    assert len(due) == pytest.approx(10_000, abs=5 * math.sqrt(10_000))
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
    assert statistics.pstdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.05)  # as exponential gaps have it


async def test_a_slow_answer_delays_no_request_and_counts_from_when_it_was_due() -> None:
    began: list[float] = []
    clock = asyncio.get_running_loop().time

    async def send(index: int) -> str:
        began.append(clock())
        await asyncio.sleep(0.3 if index == 0 else 0.0)
        return "yes"

    samples = await offer(send, [0.0, 0.05, 0.1], timeout_s=5.0)
    assert began[2] - began[0] < 0.3, "the second and third waited for the first"
    assert [sample.answer for sample in samples] == ["yes"] * 3
    assert samples[0].seconds >= 0.3


async def test_errors_and_late_answers_are_failures() -> None:
    async def send(index: int) -> str:
        if index == 0:
            raise ValueError
        await asyncio.sleep(0.0 if index == 1 else 5.0)
        return "yes"

    samples = await offer(send, [0.0, 0.0, 0.0], timeout_s=0.2)
    assert [sample.answer for sample in samples] == [None, "yes", None]
    found = figures(samples, offered=3.0, duration_s=1.0)
    assert (found.failed, found.achieved) == (2, 1.0)
    assert figures(samples[:1], 1.0, 1.0).p99 == math.inf


@given(st.lists(st.floats(0, 100), min_size=1), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_percentiles_are_those_of_numpys_inverted_distribution(values: list[float], share: float) -> None:
    assert percentile(sorted(values), share) == np.percentile(values, 100 * share, method="inverted_cdf")
