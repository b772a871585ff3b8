"""`make bench-pauses`: how long a streamed answer pauses while the service works on somebody else's large request.

A BART of BART-base's size with random weights (`benchmarks/models.py`) in the demo's place, on a CPU. One client reads
a greedy answer token by token, another sends one request of each kind below; what is printed is the median and the
longest time between two tokens, and the longest beside nothing else. Encoding and scoring go in parts
(`generator_svc/engine/scheduler.py`), so that a pause is one part's, however long the whole takes.
"""

import argparse
import asyncio
import itertools
import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.demo import PORT, both_services, demo_questions
from benchmarks.machine import describe
from benchmarks.models import SHAPES, write_checkpoint

RESULTS = Path(__file__).parent / "results" / "pauses.json"
URL = f"http://127.0.0.1:{PORT}"
TOKENS = 200
BEGUN = 8  # tokens of the stream before the other request is sent
TIMEOUT_MS = 600_000
QUESTIONS = demo_questions(32)
ANSWERS = [f"answer number {7919 * number}" for number in range(32)]

Request = tuple[str, dict[str, Any]]
LARGE: dict[str, Request | None] = {
    "nothing": None,
    "25 questions": ("/v1/answer", {"question": QUESTIONS[:25], "max_new_tokens": 4}),
    "50 documents": ("/v1/answer", {"question": QUESTIONS[0], "n_docs": 50, "max_new_tokens": 4}),
    "RAG-Sequence, 20 documents, 8 beams": (
        "/v1/answer",
        {"question": QUESTIONS[0], "n_docs": 20, "num_beams": 8, "max_new_tokens": 16, "strategy": "sequence"},
    ),
    "8 questions, 20 documents, 8 beams": (
        "/v1/answer",
        {"question": QUESTIONS[:8], "n_docs": 20, "num_beams": 8, "max_new_tokens": 8, "strategy": "token"},
    ),
    "32 answers scored under 20 documents": (
        "/v1/score",
        {"question": QUESTIONS[0], "n_docs": 20, "answers": ANSWERS, "strategy": "sequence"},
    ),
}


@dataclass(frozen=True)
class Pauses:
    """Seconds between two tokens of the stream, and how long the request beside it took."""

    beside: str
    median_s: float
    longest_s: float
    request_s: float


async def measured(name: str, request: Request | None) -> Pauses:
    begun = asyncio.Event()

    async def stream(http: httpx.AsyncClient) -> list[float]:
        body = {"question": QUESTIONS[-1], "stream": True, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
        arrived = []
        async with http.stream("POST", f"{URL}/v1/answer", json=body | {"timeout_ms": TIMEOUT_MS}) as response:
            async for line in response.aiter_lines():
                if line.startswith("data:") and "text" in json.loads(line.removeprefix("data:")):
                    arrived.append(time.perf_counter())
                    if len(arrived) == BEGUN:
                        begun.set()
        return arrived[BEGUN - 1 :]

    async def large(http: httpx.AsyncClient) -> float:
        await begun.wait()
        began_s = time.perf_counter()
        if request is not None:
            path, body = request
            (await http.post(URL + path, json=body | {"timeout_ms": TIMEOUT_MS})).raise_for_status()
        return time.perf_counter() - began_s

    async with httpx.AsyncClient(timeout=TIMEOUT_MS / 1000) as http:
        arrived, request_s = await asyncio.gather(stream(http), large(http))
    pauses = [after - before for before, after in itertools.pairwise(arrived)]
    return Pauses(name, statistics.median(pauses), max(pauses), request_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        write_checkpoint(SHAPES[arguments.shape], checkpoint)
        settings = {"GENERATOR_CHECKPOINT": str(checkpoint), "GENERATOR_DTYPE": arguments.dtype}
        with both_services(Path(folder), **settings):
            found = [asyncio.run(measured(name, request)) for name, request in LARGE.items()]
    table = Table(title=f"a stream of {TOKENS} tokens, milliseconds between two")
    for name in ("beside", "median", "longest", "the other request, s"):
        table.add_column(name, justify="left" if name == "beside" else "right")
    for row in found:
        table.add_row(row.beside, f"{row.median_s * 1e3:.0f}", f"{row.longest_s * 1e3:.0f}", f"{row.request_s:.2f}")
    Console().print(table)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.pauses", *sys.argv[1:]]),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe("cpu"),
        "dtype": arguments.dtype,
        "pauses": [asdict(row) for row in found],
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
