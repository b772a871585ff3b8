"""`make bench`: questions answered by both services over HTTP, beside transformers' own RAG in one process.

Same checkpoint, passages, questions and torch threads (`benchmarks/demo.py`). Ours pays for two processes and two HTTP
hops. Medians of `--repeats` runs after a warm-up; greedy search, 5 documents.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.demo import MAX_NEW_TOKENS, both_services, demo_questions, transformers_rag

RESULTS = Path(__file__).parent / "results" / "answer.json"


def median_s(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    asked = demo_questions(max(arguments.batches))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, both_services(Path(folder)) as ours:
        rival = transformers_rag(Path(folder))
        for size in arguments.batches:
            questions = asked[:size]
            theirs_s = median_s(partial(rival, questions), arguments.repeats)
            ours_s = median_s(partial(ours.answer, questions, max_new_tokens=MAX_NEW_TOKENS), arguments.repeats)
            rows.append({"batch": size, "transformers_s": theirs_s, "ours_s": ours_s, "ratio": theirs_s / ours_s})
    table = Table(title=f"seconds a batch on {os.cpu_count()} cores, torch {torch.__version__}")
    for name in ("batch", "transformers_s", "ours_s", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" for value in row.values()))
    Console().print(table)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    RESULTS.write_text(json.dumps({"command": "make bench", "machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
