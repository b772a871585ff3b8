"""`make bench-overload`: ten times the capacity, from many clients, for two minutes; and a polite client beside one.

Both services run as real processes with their default settings (and keys, one a client). In turn:

1. capacity: questions answered a second by as many callers as the service works for at once, each asking again as soon
   as it has its answer, their process beside;
2. unloaded: open-loop load (`benchmarks/load.py`) at a tenth of it. Its p99 is the yardstick;
3. overload: ten times the capacity, from eight clients, open-loop;
4. recovery: the load of 2 again, from the moment at which 3 ends;
5. starving: one client floods at ten times the capacity, and another sends the load of 2.

Verdicts: only 200, 429 and 503, and no connection failed; p99 of what was accepted within twice the unloaded p99;
memory flat; within five seconds after the overload all is as before; the polite client is answered as if it were alone.
"""

import argparse
import json
import os
import secrets
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
import psutil
from rich.console import Console

from benchmarks.demo import MAX_NEW_TOKENS, PORT, both_services, demo_questions
from benchmarks.flood import Flood, Plan, Sent
from benchmarks.load import percentile
from benchmarks.machine import describe

mpl.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
CLIENTS = 8
TIMES_CAPACITY = 10
UNLOADED_SHARE = 0.1
RECOVERY_S = 12.0
MAY_RECOVER_S = 5.0
MAY_GROW = 0.05  # of the resident memory, from the first quarter of the overload to the last
MAY_GROW_BYTES = 32 * 2**20
SHED = (429, 503)


@dataclass(frozen=True)
class Verdict:
    name: str
    held: bool
    figures: str


@dataclass(frozen=True)
class Memory:
    """Resident bytes of both services, ``at_s`` since the flood began."""

    at_s: float
    generator: int
    retriever: int


class Load:
    """Plans on one pair of services, a key for each client."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = keys
        settings = {"num_beams": 1, "max_new_tokens": MAX_NEW_TOKENS, "provenance": "none"}
        self.bodies = [json.dumps({"question": question, **settings}) for question in demo_questions(64)]

    def plan(self, seconds: float, *, rate: float = 0.0, callers: int = 0, keys: Sequence[str] = ()) -> Plan:
        return Plan(PORT, "/v1/answer", self.bodies, keys or self.keys, rate, seconds, 7, callers)


def latencies(samples: Sequence[Sent]) -> list[float]:
    """Of what was answered, in order."""
    return sorted(sent.seconds for sent in samples if sent.status == 200)


def statuses(samples: Sequence[Sent]) -> dict[str, int]:
    return {str(status): count for status, count in sorted(Counter(sent.status for sent in samples).items())}


def watched(flood: Flood, services: dict[str, psutil.Process]) -> tuple[list[Sent], list[Memory]]:
    """Runs a flood to its end, and looks at the memory of the services twice a second."""
    memory: list[Memory] = []
    flood.began()
    began_s, done = time.monotonic(), threading.Event()

    def look() -> None:
        while not done.wait(0.5):
            resident = {name: process.memory_info().rss for name, process in services.items()}
            memory.append(Memory(time.monotonic() - began_s, resident["generator"], resident["retriever"]))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        return flood.samples(), memory
    finally:
        done.set()
        looking.join()


def processes() -> dict[str, psutil.Process]:
    found = {}
    for process in psutil.Process().children(recursive=True):
        for name in ("generator", "retriever"):
            if f"{name}_svc" in process.cmdline():
                found[name] = process
    return found


def grown(memory: Sequence[Memory], of: Callable[[Memory], int]) -> tuple[float, float]:
    """Median bytes in the second quarter of the time (the first has the burst), and in the last."""
    values = [of(seen) for seen in memory]
    quarter = max(1, len(values) // 4)
    return statistics.median(values[quarter : 2 * quarter] or values), statistics.median(values[-quarter:])


def recovered_after(samples: Sequence[Sent], limit_s: float) -> float:
    """Seconds after the overload until every question was answered, and within the limit."""
    return max(
        (sent.due_s + sent.seconds for sent in samples if sent.status != 200 or sent.seconds > limit_s), default=0
    )


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    keys = [secrets.token_hex(16) for _ in range(CLIENTS + 2)]
    flood_keys, polite, rude = keys[:CLIENTS], keys[-2:-1], keys[-1:]
    named = ",".join(f"client-{number}:{key}" for number, key in enumerate(keys))
    load = Load(flood_keys)
    with (
        tempfile.TemporaryDirectory() as folder,
        both_services(
            Path(folder), keys[0], GENERATOR_CLIENT_KEYS=named, GENERATOR_LOG_LEVEL="warning", **arguments.settings
        ) as client,
    ):
        services = processes()
        callers = int(client.info("generator").limits["max_concurrent"])
        Flood(load.plan(min(5.0, arguments.seconds / 4), callers=2)).samples()  # pays for what is made once

        samples = Flood(load.plan(arguments.seconds / 12, callers=callers)).samples()
        capacity = len(latencies(samples)) / max(sent.due_s + sent.seconds for sent in samples)
        console.print(f"capacity: {capacity:.1f} questions a second", highlight=False)

        light = UNLOADED_SHARE * capacity
        unloaded = Flood(load.plan(arguments.seconds / 2, rate=light)).samples()
        unloaded_p99 = percentile(latencies(unloaded), 0.99)
        say(console, f"unloaded, {light:.1f} a second", unloaded)

        flood = Flood(load.plan(arguments.seconds, rate=TIMES_CAPACITY * capacity))
        overload, memory = watched(flood, services)
        say(console, f"overload, {TIMES_CAPACITY * capacity:.0f} a second", overload)
        recovery = Flood(load.plan(RECOVERY_S, rate=light)).samples()
        say(console, "recovery", recovery)

        # Once more, from one client, and the same light load from another.
        time.sleep(2.0)
        flood = Flood(load.plan(arguments.seconds / 2, rate=TIMES_CAPACITY * capacity, keys=rude))
        flood.began()
        time.sleep(1.0)
        beside = Flood(load.plan(arguments.seconds / 2 - 2, rate=light, keys=polite)).samples()
        greedy = flood.samples()
        say(console, "polite client beside a flood", beside)
        say(console, "  the flood", greedy)

    verdicts = judge(unloaded_p99, overload=overload, memory=memory, recovery=recovery, beside=beside, greedy=greedy)
    return {
        "capacity": capacity,
        "unloaded": summary(unloaded),
        "overload": {"offered": TIMES_CAPACITY * capacity, **summary(overload)},
        "recovery": summary(recovery),
        "polite": summary(beside),
        "flood_beside_polite": summary(greedy),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "memory": [asdict(seen) for seen in memory],
        "series": series(overload),
    }


def judge(
    unloaded_p99: float,
    *,
    overload: Sequence[Sent],
    memory: Sequence[Memory],
    recovery: Sequence[Sent],
    beside: Sequence[Sent],
    greedy: Sequence[Sent],
) -> list[Verdict]:
    allowed = {200, *SHED}
    others = [sent for sent in (*overload, *recovery, *beside, *greedy) if sent.status not in allowed]
    accepted_p99 = percentile(latencies(overload), 0.99)
    growth = {
        "generator": grown(memory, lambda seen: seen.generator),
        "retriever": grown(memory, lambda seen: seen.retriever),
    }
    flat = all(after - before <= max(MAY_GROW * before, MAY_GROW_BYTES) for before, after in growth.values())
    recovered_s = recovered_after(recovery, 2 * unloaded_p99)
    polite_p99 = percentile(latencies(beside), 0.99)
    refused = sum(sent.status != 200 for sent in beside)
    return [
        Verdict("only 200, 429 and 503", not others, f"{len(others)} others of {len(overload) + len(greedy)}"),
        Verdict(
            "p99 of the accepted within twice the unloaded p99",
            accepted_p99 <= 2 * unloaded_p99,
            f"{accepted_p99 * 1e3:.0f} ms against {unloaded_p99 * 1e3:.0f} ms: {accepted_p99 / unloaded_p99:.2f}",
        ),
        Verdict(
            "memory flat",
            flat,
            ", ".join(f"{name} {b / 2**20:.0f} → {a / 2**20:.0f} MiB" for name, (b, a) in growth.items()),
        ),
        Verdict("full recovery within 5 s", recovered_s <= MAY_RECOVER_S, f"after {recovered_s:.1f} s"),
        Verdict(
            "a polite client beside a flood is answered as if alone",
            refused == 0 and polite_p99 <= 2 * unloaded_p99,
            f"{refused} of {len(beside)} refused, p99 {polite_p99 * 1e3:.0f} ms: {polite_p99 / unloaded_p99:.2f}",
        ),
    ]


def summary(samples: Sequence[Sent]) -> dict[str, Any]:
    done = latencies(samples)
    return {
        "statuses": statuses(samples),
        "answered_a_second": len(done) / max(sent.due_s + sent.seconds for sent in samples),
        "p50_ms": percentile(done, 0.5) * 1e3,
        "p99_ms": percentile(done, 0.99) * 1e3,
        "max_ms": max(done, default=float("inf")) * 1e3,
        "shed_p99_ms": percentile(sorted(sent.seconds for sent in samples if sent.status in SHED), 0.99) * 1e3,
    }


def say(console: Console, what: str, samples: Sequence[Sent]) -> None:
    found = summary(samples)
    console.print(
        f"{what}: {found['statuses']}, {found['answered_a_second']:.1f} answered a second, "
        f"p50 {found['p50_ms']:.0f}, p99 {found['p99_ms']:.0f}, at most {found['max_ms']:.0f} ms",
        highlight=False,
    )


def series(samples: Sequence[Sent]) -> list[dict[str, float]]:
    """Second by second: what was offered, answered and shed, and how long the answers of that second took."""
    by_second: dict[int, list[Sent]] = {}
    for sent in samples:
        by_second.setdefault(int(sent.due_s), []).append(sent)
    return [
        {
            "second": second,
            "offered": len(of),
            "accepted": len(latencies(of)),
            "shed": sum(sent.status in SHED for sent in of),
            "p50_ms": percentile(latencies(of), 0.5) * 1e3,
            "p99_ms": percentile(latencies(of), 0.99) * 1e3,
        }
        for second, of in sorted(by_second.items())
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    figure, (rates, times, memory) = plt.subplots(3, 1, figsize=(8, 8), sharex=True)
    seconds = [row["second"] for row in result["series"]]
    for name, colour in (("offered", "#999999"), ("shed", "#c0568f"), ("accepted", "#0f9d8f")):
        rates.plot(seconds, [row[name] for row in result["series"]], color=colour, label=name)
    rates.set(ylabel="requests a second", yscale="log")
    for name, style in (("p99_ms", "-"), ("p50_ms", "--")):
        times.plot(
            seconds, [row[name] for row in result["series"]], style, color="#3b82c4", label=f"accepted, {name[:3]}"
        )
    times.axhline(2 * result["unloaded"]["p99_ms"], color="#999999", linewidth=0.8, label="twice the unloaded p99")
    times.set(ylabel="latency, ms", ylim=(0, None))
    for name, colour in (("generator", "#0f9d8f"), ("retriever", "#c0568f")):
        at = [seen["at_s"] for seen in result["memory"]]
        memory.plot(at, [seen[name] / 2**20 for seen in result["memory"]], color=colour, label=name)
    memory.set(ylabel="resident MiB", xlabel="seconds of overload", ylim=(0, None))
    for axis in (rates, times, memory):
        axis.grid(visible=True, linewidth=0.3)
        axis.legend(fontsize=8, loc="center right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of overload; the rest is in proportion")
    parser.add_argument("--set", nargs="*", default=[], metavar="VARIABLE=VALUE", help="other settings of the services")
    parser.add_argument("--output", type=Path, default=RESULTS / "overload.json", help="a plot is put beside it")
    arguments = parser.parse_args()
    arguments.settings = dict(setting.split("=", 1) for setting in arguments.set)
    console = Console(width=None if sys.stdout.isatty() else 120)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.overload", *sys.argv[1:]]),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**describe("cpu"), "load_average": os.getloadavg()[0]},
        "seconds": arguments.seconds,
        **run(arguments, console),
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    plot(result, arguments.output.with_suffix(".png"))
    for verdict in result["verdicts"]:
        console.print(f"{'held  ' if verdict['held'] else 'MISSED'}  {verdict['name']}: {verdict['figures']}")
    console.print(f"written: {arguments.output} and {arguments.output.with_suffix('.png').name}", highlight=False)
    sys.exit(not all(verdict["held"] for verdict in result["verdicts"]))


if __name__ == "__main__":
    main()
