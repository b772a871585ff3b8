"""`make bench-serve`: questions arriving at rising rates, ours beside the same model served the plain way.

Three systems answer the demo's questions over HTTP: both of our services, and FastAPI around transformers' own RAG, one
question at a time or with naive batching (`benchmarks/plain_server.py`). All three run from the start, and take turns
at every rate, so that what else the machine does meets all alike; the two that are not asked wait without work. Load is
open-loop (`benchmarks/load.py`) and comes from this process, on the same cores. A system is asked at higher rates until
it misses the limit: p99 above it, or a request failed. Its throughput is the highest rate that it held.

The demo's model is so small that what surrounds it counts for most. `--model base` puts a BART of BART-base's size in
its generator's place, with random weights (`benchmarks/models.py`), whose answers are all 16 tokens long.
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
from benchmarks.models import SHAPES, write_checkpoint
from generator_svc.settings import DEMO_CHECKPOINT

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

RESULTS = Path(__file__).parent / "results"
PLAIN_PORT = 18010
QUESTIONS = 64
NAMES = {"ours": "ours", "none": "transformers, one by one", "naive": "transformers, naive batching"}


@dataclass(frozen=True)
class Model:
    """What is served, and how it is asked: ``rates`` are questions a second, ``limit_ms`` is p99's.

    ``shape`` is one of `SHAPES`, or None for the demo's own generator.
    """

    shape: str | None
    max_new_tokens: int
    rates: tuple[float, ...]
    seconds: float
    limit_ms: float
    timeout_s: float


MODELS = {
    "demo": Model(
        shape=None,
        max_new_tokens=MAX_NEW_TOKENS,
        rates=(1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256),
        seconds=20.0,
        limit_ms=1000.0,
        timeout_s=10.0,
    ),
    "base": Model(
        shape="base",
        max_new_tokens=16,
        rates=(0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8),
        seconds=60.0,
        limit_ms=5000.0,
        timeout_s=30.0,
    ),
}


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
def plain(batching: str, port: int, checkpoint: Path, beams: int, max_new_tokens: int) -> Iterator[System]:
    command = ["-m", "benchmarks.plain_server", "--port", port, "--batching", batching, "--beams", beams]
    command += ["--checkpoint", checkpoint, "--max-new-tokens", max_new_tokens]
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


@contextmanager
def ours(checkpoint: Path, beams: int, max_new_tokens: int) -> Iterator[System]:
    body = {"num_beams": beams, "max_new_tokens": max_new_tokens, "strategy": "token", "provenance": "none"}
    settings = {
        "GENERATOR_CHECKPOINT": str(checkpoint),
        # The rivals take every request at once and refuse none; so that the same is compared, neither do we.
        "GENERATOR_SHED_AFTER_MS": "0",
        "GENERATOR_MAX_CONCURRENT": "256",
        "GENERATOR_CLIENT_SHARE": "1",
    }
    with tempfile.TemporaryDirectory() as folder, both_services(Path(folder), **settings):
        url = f"http://127.0.0.1:{PORT}/v1/answer"
        yield System("ours", url, body, lambda wire: wire["results"][0]["answers"][0]["text"])


def asked(system: System, questions: Sequence[str], due: Sequence[float], timeout_s: float) -> list[Sample]:
    async def run() -> list[Sample]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        async with httpx.AsyncClient(limits=limits, timeout=timeout_s) as client:

            async def send(index: int) -> str:
                body = {**system.body, "question": questions[index % len(questions)]}
                response = await client.post(system.url, json=body)
                response.raise_for_status()
                return system.text(response.json())

            return await offer(send, due, timeout_s)

    return asyncio.run(run())


def curves(arguments: argparse.Namespace, checkpoint: Path, beams: int, console: Console) -> list[Point]:
    model = MODELS[arguments.model]
    questions = demo_questions(QUESTIONS)
    with tempfile.TemporaryDirectory() as scratch:
        answer = transformers_rag(
            Path(scratch), checkpoint=checkpoint, beams=beams, max_new_tokens=model.max_new_tokens
        )
        expected = [text for at in range(0, QUESTIONS, 8) for text in answer(questions[at : at + 8])]
        del answer
    points: list[Point] = []
    with ExitStack() as everything:
        running: list[tuple[System, ExitStack]] = []
        for starting in (
            ours(checkpoint, beams, model.max_new_tokens),
            plain("none", PLAIN_PORT, checkpoint, beams, model.max_new_tokens),
            plain("naive", PLAIN_PORT + 1, checkpoint, beams, model.max_new_tokens),
        ):
            processes = everything.enter_context(ExitStack())
            running.append((processes.enter_context(starting), processes))
        for system, _ in running:  # the first requests pay for what is made once
            asked(system, questions, [0.0] * 8, 600.0)
        for rate in arguments.rates:
            due = arrivals(rate, arguments.seconds, seed=int(rate))
            for system, processes in list(running):
                samples = asked(system, questions, due, model.timeout_s)
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
                    running.remove((system, processes))
                    processes.close()  # or it would go on with questions that nobody waits for, beside the others
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
    figure, axes = plt.subplots(
        1, len(beams), figsize=(5.5 * len(beams), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, number in zip(axes[0], beams, strict=True):
        for colour, (key, name) in zip(("#0f9d8f", "#c0568f", "#3b82c4"), NAMES.items(), strict=True):
            of_system = [p.figures for p in points if (p.system, p.beams) == (key, number)]
            rates = [f.offered for f in of_system]
            axis.plot(rates, [f.p99 * 1e3 for f in of_system], "o-", color=colour, label=f"{name}, p99")
            axis.plot(rates, [f.p50 * 1e3 for f in of_system], "--", color=colour, label=f"{name}, p50")
        axis.axhline(limit_ms, color="#999999", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="questions a second, offered")
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            scale.set_major_formatter("{x:g}")
            scale.set_minor_formatter(NullFormatter())
        axis.set_title("greedy" if number == 1 else f"{number} beams")
        axis.grid(visible=True, which="both", linewidth=0.3)
    axes[0][0].set_ylabel("latency from when it was due, ms")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
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
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--quick", action="store_true", help="a quarter of the time: about six minutes with the demo's")
    parser.add_argument("--seconds", type=float, help="of load, at each rate (default: 20; base: 60)")
    parser.add_argument("--rates", nargs="+", type=float, help="questions a second")
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--limit-ms", type=float, help="of p99 (default: 1000; base: 5000)")
    parser.add_argument("--output", type=Path, help="a plot is put beside it")
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    arguments.seconds = arguments.seconds or (model.seconds / 4 if arguments.quick else model.seconds)
    arguments.rates = arguments.rates or model.rates
    arguments.limit_ms = arguments.limit_ms or model.limit_ms
    output = arguments.output or RESULTS / ("serve.json" if model.shape is None else f"serve_{model.shape}.json")
    console = Console(width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = DEMO_CHECKPOINT
        if model.shape is not None:
            checkpoint = Path(folder)
            write_checkpoint(SHAPES[model.shape], checkpoint)
        points = [point for number in arguments.beams for point in curves(arguments, checkpoint, number, console)]
    console.print(summary(points, arguments.beams, arguments.limit_ms))
    plot(points, arguments.beams, arguments.limit_ms, output.with_suffix(".png"))
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.serve", *sys.argv[1:]]),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe("cpu"),
        "model": arguments.model,
        "limit_ms": arguments.limit_ms,
        "seconds_a_rate": arguments.seconds,
        "throughput": {
            str(number): {key: throughput(points, key, number, arguments.limit_ms) for key in NAMES}
            for number in arguments.beams
        },
        "points": [asdict(point) for point in points],
    }
    output.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"written: {output} and {output.with_suffix('.png').name}", highlight=False)


if __name__ == "__main__":
    main()
