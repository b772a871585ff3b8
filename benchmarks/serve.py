"""`make bench-serve`: questions arriving at rising rates, ours beside the same model served the plain way.

Three systems answer the demo's questions over HTTP: both of our services, and FastAPI around transformers' own RAG, one
question at a time or with naive batching (`benchmarks/plain_server.py`). All three run from the start, and take turns
at every rate, so that what else the machine does meets all alike; the two that are not asked wait without work. Load is
open-loop (`benchmarks/load.py`) and comes from this process, on the same cores. A system is asked at higher rates until
it misses the limit: p99 above it, or a request failed. Its throughput is the highest rate that it held.
"""

import argparse
import asyncio
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
from rich.console import Console
from rich.table import Table

from benchmarks.demo import MAX_NEW_TOKENS, PORT, both_services, demo_questions, transformers_rag
from benchmarks.load import Figures, Sample, arrivals, figures, offer
from benchmarks.machine import describe

mpl.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
PLAIN_PORT = 18010
RATES = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256)
QUESTIONS = 64
TIMEOUT_S = 10.0
NAMES = {"ours": "ours", "none": "transformers, one by one", "naive": "transformers, naive batching"}


@dataclass(frozen=True)
class System:
    """``key`` is one of `NAMES`."""

    key: str
    url: str
    body: dict[str, Any]
    text: Callable[[Any], str]


@dataclass(frozen=True)
class Point:
    """One system at one rate; ``equal`` is the share of answers with transformers' text."""

    system: str
    beams: int
    figures: Figures
    equal: float


@contextmanager
def plain(batching: str, port: int, beams: int) -> Iterator[System]:
    command = ["-m", "benchmarks.plain_server", "--port", port, "--batching", batching, "--beams", beams]
    process = subprocess.Popen([sys.executable, *map(str, command)])
    try:
        url = f"http://127.0.0.1:{port}"
        while process.poll() is None and not _answers(f"{url}/readyz"):
            time.sleep(0.3)
        yield System(batching, f"{url}/v1/answer", {}, lambda wire: wire["answer"])
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def our_system(beams: int) -> System:
    body = {"num_beams": beams, "max_new_tokens": MAX_NEW_TOKENS, "strategy": "token", "provenance": "none"}
    return System(
        "ours", f"http://127.0.0.1:{PORT}/v1/answer", body, lambda wire: wire["results"][0]["answers"][0]["text"]
    )


def asked(system: System, questions: Sequence[str], due: Sequence[float]) -> list[Sample]:
    async def run() -> list[Sample]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        async with httpx.AsyncClient(limits=limits, timeout=TIMEOUT_S) as client:

            async def send(index: int) -> str:
                body = {**system.body, "question": questions[index % len(questions)]}
                response = await client.post(system.url, json=body)
                response.raise_for_status()
                return system.text(response.json())

            return await offer(send, due, TIMEOUT_S)

    return asyncio.run(run())


def curves(arguments: argparse.Namespace, beams: int, console: Console) -> list[Point]:
    questions = demo_questions(QUESTIONS)
    with tempfile.TemporaryDirectory() as scratch:
        expected = transformers_rag(Path(scratch), beams=beams)(questions)
    points: list[Point] = []
    with ExitStack() as stack:
        # The rivals take every request at once and refuse none; so that the same is compared, neither do we.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(
            both_services(
                folder, GENERATOR_SHED_AFTER_MS="0", GENERATOR_MAX_CONCURRENT="256", GENERATOR_CLIENT_SHARE="1"
            )
        )
        running = [
            our_system(beams),
            stack.enter_context(plain("none", PLAIN_PORT, beams)),
            stack.enter_context(plain("naive", PLAIN_PORT + 1, beams)),
        ]
        for system in running:  # the first requests pay for what is made once
            asked(system, questions, [0.0] * 8)
        for rate in arguments.rates:
            due = arrivals(rate, arguments.seconds, seed=int(rate))
            for system in list(running):
                samples = asked(system, questions, due)
                found = figures(samples, rate, arguments.seconds)
                answers = [(i, sample.answer) for i, sample in enumerate(samples) if sample.answer is not None]
                equal = sum(text == expected[i % QUESTIONS] for i, text in answers) / max(1, len(answers))
                points.append(Point(system.key, beams, found, equal))
                console.print(
                    f"{beams} beams, {rate:g}/s, {NAMES[system.key]}: p50 {found.p50 * 1e3:.0f} ms, "
                    f"p99 {found.p99 * 1e3:.0f} ms, {found.failed} failed, {equal:.0%} as transformers",
                    highlight=False,
                )
                if not held(found, arguments.limit_ms):
                    running.remove(system)
                time.sleep(1.0)
            if not running:
                break
    return points


def held(found: Figures, limit_ms: float) -> bool:
    return found.failed == 0 and found.p99 * 1e3 <= limit_ms


def throughput(points: Sequence[Point], system: str, beams: int, limit_ms: float) -> float:
    """The highest rate that was held."""
    rates = [p.figures.offered for p in points if (p.system, p.beams) == (system, beams) and held(p.figures, limit_ms)]
    return max(rates, default=0.0)


def plot(points: Sequence[Point], beams: Sequence[int], limit_ms: float, path: Path) -> None:
    figure, axes = plt.subplots(1, len(beams), figsize=(5.5 * len(beams), 4.2), sharey=True, squeeze=False)
    for axis, number in zip(axes[0], beams, strict=True):
        for colour, (key, name) in zip(("#0f9d8f", "#c0568f", "#3b82c4"), NAMES.items(), strict=True):
            of_system = [p.figures for p in points if (p.system, p.beams) == (key, number)]
            rates = [f.offered for f in of_system]
            axis.plot(rates, [f.p99 * 1e3 for f in of_system], "o-", color=colour, label=f"{name}, p99")
            axis.plot(rates, [f.p50 * 1e3 for f in of_system], "--", color=colour, label=f"{name}, p50")
        axis.axhline(limit_ms, color="#999999", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="questions a second, offered")
        axis.set_title("greedy" if number == 1 else f"{number} beams")
        axis.grid(visible=True, which="both", linewidth=0.3)
    axes[0][0].set_ylabel("latency from when it was due, ms")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def summary(points: Sequence[Point], beams: Sequence[int], limit_ms: float) -> Table:
    table = Table(title=f"questions a second with p99 within {limit_ms:g} ms, none failed")
    for name in ("beams", *NAMES.values(), "ours / one by one", "ours / naive"):
        table.add_column(name, justify="right")
    for number in beams:
        ours, one, naive = (throughput(points, key, number, limit_ms) for key in NAMES)
        ratios = (f"{ours / other:.1f}" if other else "-" for other in (one, naive))
        table.add_row(str(number), f"{ours:g}", f"{one:g}", f"{naive:g}", *ratios)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 seconds a rate: about six minutes")
    parser.add_argument("--seconds", type=float, default=20.0, help="of load, at each rate (default: %(default)s)")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="questions a second")
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--limit-ms", type=float, default=1000.0, help="of p99 (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "serve.json", help="a plot is put beside it")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds = 5.0
    console = Console(width=None if sys.stdout.isatty() else 120)
    points = [point for number in arguments.beams for point in curves(arguments, number, console)]
    console.print(summary(points, arguments.beams, arguments.limit_ms))
    plot(points, arguments.beams, arguments.limit_ms, arguments.output.with_suffix(".png"))
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.serve", *sys.argv[1:]]),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe("cpu"),
        "limit_ms": arguments.limit_ms,
        "seconds_a_rate": arguments.seconds,
        "throughput": {
            str(number): {key: throughput(points, key, number, arguments.limit_ms) for key in NAMES}
            for number in arguments.beams
        },
        "points": [asdict(point) for point in points],
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"written: {arguments.output} and {arguments.output.with_suffix('.png').name}", highlight=False)


if __name__ == "__main__":
    main()
