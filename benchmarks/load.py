"""Open-loop load: requests are sent when they are due, whether or not earlier ones have been answered.

A client that waits for an answer before it sends the next question slows down with the service and hides its queues
("coordinated omission"). Here arrivals are a Poisson process, and a latency counts from the moment at which the request
was due.
"""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """``seconds`` from when the request was due to its answer; ``answer`` None where it failed."""

    seconds: float
    answer: str | None


@dataclass(frozen=True)
class Figures:
    """Latencies are seconds, of requests that succeeded; ``achieved`` of them were answered a second."""

    offered: float
    achieved: float
    failed: int
    p50: float
    p99: float


def arrivals(rate: float, duration_s: float, seed: int) -> list[float]:
    """Seconds from the start at which requests are due: a Poisson process of ``rate`` a second."""
    dice = random.Random(seed)
    due, at = [], dice.expovariate(rate)
    while at < duration_s:
        due.append(at)
        at += dice.expovariate(rate)
    return due


async def offer(send: Callable[[int], Awaitable[str]], due: Sequence[float], timeout_s: float) -> list[Sample]:
    """Sends request i at ``due[i]``; whatever raises, or takes longer than ``timeout_s`` from then on, has failed."""
    began = time.perf_counter()

    async def one(index: int) -> Sample:
        await asyncio.sleep(began + due[index] - time.perf_counter())
        try:
            async with asyncio.timeout(began + due[index] + timeout_s - time.perf_counter()):
                answer = await send(index)
        except Exception:  # noqa: BLE001  whatever it was, nobody got an answer
            return Sample(timeout_s, None)
        return Sample(time.perf_counter() - began - due[index], answer)

    return await asyncio.gather(*map(one, range(len(due))))


def figures(samples: Sequence[Sample], offered: float, duration_s: float) -> Figures:
    done = sorted(sample.seconds for sample in samples if sample.answer is not None)
    return Figures(
        offered=offered,
        achieved=len(done) / max(duration_s, max((sample.seconds for sample in samples), default=0.0)),
        failed=len(samples) - len(done),
        p50=percentile(done, 0.5),
        p99=percentile(done, 0.99),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of values does not exceed; infinite where there are none."""
    if not ordered:
        return float("inf")
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
