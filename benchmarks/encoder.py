"""Questions and passages through a DPR encoder of BERT-base's size: transformers' own, and ours over the same weights.

    python -m benchmarks.encoder

The weights are random; vectors are compared all the same. Times are medians, with the same threads.
"""

import argparse
import copy
import json
import shlex
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DPRConfig, DPRQuestionEncoder

from benchmarks.machine import describe, median_time
from generator_svc.engine.affine import use_onednn

RESULTS = Path(__file__).parent / "results"
FORMS = ((1, 16), (4, 16), (16, 16), (64, 128))  # texts of so many tokens each: questions, and a batch of passages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "encoder_cpu.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        theirs: Any = DPRQuestionEncoder(DPRConfig())
        theirs.eval().to(dtype)
        ours = copy.deepcopy(theirs)
        use_onednn(ours)
        for texts, tokens in FORMS:
            ids = torch.randint(1000, 20_000, (texts, tokens))
            with torch.inference_mode():
                gap = (theirs(ids).pooler_output - ours(ids).pooler_output).abs().max().item()
                seconds = [median_time(partial(m, ids), "cpu", arguments.repeats) for m in (theirs, ours)]
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "texts": texts,
                    "tokens": tokens,
                    "transformers_s": seconds[0],
                    "ours_s": seconds[1],
                    "ratio": seconds[0] / seconds[1],
                    "largest_difference": gap,
                }
            )
    table = Table("dtype", "texts", "tokens", "transformers ms", "ours ms", "ratio", "largest difference")
    for row in rows:
        times = [f"{row[side] * 1e3:.1f}" for side in ("transformers_s", "ours_s")]
        last = [f"{row['ratio']:.2f}", f"{row['largest_difference']:.1e}"]
        table.add_row(row["dtype"], str(row["texts"]), str(row["tokens"]), *times, *last)
    Console().print(table)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.encoder", *sys.argv[1:]]),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe("cpu"),
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
