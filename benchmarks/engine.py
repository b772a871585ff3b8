"""`make bench-engine`: the decode engine beside transformers' own generation.

Same weights (random, fixed seed), same inputs, same threads, run by run in turns: five documents a question, contexts
of 212 tokens on average (transformers gets them padded to 300, as its RagRetriever pads them), sixteen new tokens.
Medians after a warm-up (three on CUDA, where steps are captured); a run that takes more than 20 seconds is done once.
bfloat16 is compared with transformers in float32, which is what it replaces, and with transformers in bfloat16; int8
with the same two. Memory is the peak of a process that holds one side only.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.device_share import DeviceShare, device_share
from benchmarks.machine import describe
from benchmarks.models import SHAPES
from benchmarks.precision import Precision, precisions
from benchmarks.sides import N_DOCS, NEW_TOKENS, Cell, KilledError, Measured, Setup, Side, measure_in_turns, started
from generator_svc.engine import int8

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
KILLED = "killed"
DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Row:
    """One cell, both sides. ``ratio`` is transformers' time over ours in the same dtype (`Setup`); the ``…_equal`` are
    the shares of answers with the token ids of transformers in float32. What there is of transformers is None where its
    process was killed, as a machine does that has no memory left for it."""

    shape: str
    dtype: str
    strategy: str
    batch: int
    beams: int
    transformers_s: float | None
    transformers_runs: int
    ours_s: float
    ours_runs: int
    ratio: float | None
    ratio_to_float32: float | None
    transformers_peak_mib: float | None
    ours_peak_mib: float
    transformers_equal: float | None
    ours_equal: float | None


def row_of(
    shape: str, dtype: str, cell: Cell, *, theirs: Measured | None, ours: Measured, float32: Measured | None
) -> Row:
    return Row(
        shape=shape,
        dtype=dtype,
        strategy=cell.strategy,
        batch=cell.batch,
        beams=cell.beams,
        transformers_s=None if theirs is None else theirs.seconds,
        transformers_runs=0 if theirs is None else theirs.runs,
        ours_s=ours.seconds,
        ours_runs=ours.runs,
        ratio=None if theirs is None else theirs.seconds / ours.seconds,
        ratio_to_float32=None if float32 is None else float32.seconds / ours.seconds,
        transformers_peak_mib=None if theirs is None else theirs.peak_bytes / MIB,
        ours_peak_mib=ours.peak_bytes / MIB,
        transformers_equal=equal_share(theirs, float32),
        ours_equal=equal_share(ours, float32),
    )


def equal_share(measured: Measured | None, float32: Measured | None) -> float | None:
    if measured is None or float32 is None:
        return None
    pairs = zip(measured.sequences, float32.sequences, strict=True)
    return sum(left == right for left, right in pairs) / len(float32.sequences)


def measured_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Cell by cell; float32 first, since the other dtypes are compared with it."""
    cells = [
        Cell(strategy, batch, beams)
        for batch in arguments.batch
        for beams in arguments.beams
        for strategy in arguments.strategy
    ]
    for shape in arguments.shape:
        float32: dict[Cell, Measured] = {}
        for dtype in sorted(arguments.dtype, key=DTYPES.index):
            common = (shape, dtype, arguments.device, arguments.threads)
            with started(Setup("transformers", *common)) as rival, started(Setup("ours", *common)) as engine:
                for cell in cells:
                    theirs, ours = measured_cell(rival, engine, cell, arguments.repeats)
                    if dtype == "float32" and theirs is not None:
                        float32[cell] = theirs
                    yield row_of(shape, dtype, cell, theirs=theirs, ours=ours, float32=float32.get(cell))


def measured_cell(rival: Side, engine: Side, cell: Cell, repeats: int) -> tuple[Measured | None, Measured]:
    """Both; none of the rival where it was killed.

    Raises: KilledError: ours was.
    """
    try:
        theirs, ours = measure_in_turns((rival, engine), cell, repeats)
    except KilledError as error:
        if error.side == "ours":
            raise
        print(f"{error}: is there memory enough?", file=sys.stderr)
        (ours,) = measure_in_turns((engine,), cell, repeats)
        return None, ours
    return theirs, ours


def table_of(rows: Sequence[Row]) -> Table:
    table = Table(
        title=f"seconds a batch; {N_DOCS} documents a question, {NEW_TOKENS} new tokens",
        caption="x fp32: against transformers in float32; equal: answers with its token ids. *: run once. "
        "MiB: peak memory of the process. killed: by the machine, as a rule for want of memory.",
    )
    names = ("shape", "dtype", "head", "batch", "beams", "transformers", "ours", "ratio", "x fp32", "MiB", "equal")
    for name in names:
        table.add_column(name, justify="left" if name in {"shape", "dtype", "head"} else "right")
    for row in rows:
        table.add_row(
            row.shape,
            row.dtype,
            row.strategy,
            str(row.batch),
            str(row.beams),
            f"{shown(row.transformers_s, '.3g')}{'*' if row.transformers_runs == 1 else ''}",
            f"{row.ours_s:.3g}{'*' if row.ours_runs == 1 else ''}",
            shown(row.ratio, ".1f"),
            "" if row.ratio_to_float32 is None else f"{row.ratio_to_float32:.1f}",
            f"{shown(row.transformers_peak_mib, '.0f')} → {row.ours_peak_mib:.0f}",
            "" if row.ours_equal is None else f"{shown(row.transformers_equal, '.0%')} → {row.ours_equal:.0%}",
        )
    return table


def shown(value: float | None, form: str) -> str:
    return KILLED if value is None else format(value, form)


def share_table(shares: Sequence[DeviceShare]) -> Table:
    table = Table(
        title=f"our engine and the device, batch {shares[0].batch}",
        caption="Prefill: the encoder and the cross-attention's keys and values. Decode: a step of RAG-Token with 4 "
        "beams, and the decoder's part of it, without the search; the floor is the time in which what it reads can be "
        "read.",
    )
    for name in (
        "shape",
        "dtype",
        "peak GFLOP/s",
        "prefill GFLOP/s",
        "share",
        "GB/s",
        "step ms",
        "decoder ms",
        "floor ms",
        "decoder/floor",
    ):
        table.add_column(name, justify="left" if name in {"shape", "dtype"} else "right")
    for share in shares:
        table.add_row(
            share.shape,
            share.dtype,
            f"{share.peak_flops / 1e9:.0f}",
            f"{share.prefill_flops / 1e9:.0f}",
            f"{share.prefill_flops / share.peak_flops:.0%}",
            f"{share.bandwidth / 1e9:.1f}",
            f"{share.step_s * 1e3:.2f}",
            f"{share.decoder_s * 1e3:.2f}",
            f"{share.floor_s * 1e3:.2f}",
            f"{share.decoder_s / share.floor_s:.1f}",
        )
    return table


def precision_table(rows: Sequence[Precision]) -> Table:
    table = Table(
        title=f"the demo's {rows[0].questions} held-out questions in each precision",
        caption="equal: the text of float32's answer; gap: mean difference of its log-probability.",
    )
    for name in ("dtype", "head", "exact match", "equal", "gap", "seconds"):
        table.add_column(name, justify="left" if name in {"dtype", "head"} else "right")
    for row in rows:
        shares = (f"{row.exact_match:.1%}", f"{row.equal:.1%}", f"{row.log_prob_gap:.4f}", f"{row.seconds:.1f}")
        table.add_row(row.dtype, row.strategy, *shares)
    return table


def parsed(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="base shape and batch 4 only: a quarter of an hour")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["base", "large"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 8], help="questions together")
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--strategy", nargs="+", choices=["token", "sequence"], default=["token", "sequence"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: all, int8 where it can be")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of both sides; 0: as torch chooses")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/engine_<device>_<time>.json")
    arguments = parser.parse_args(given)
    if arguments.dtype is None:
        can_int8 = arguments.device == "cpu" and int8.supported()
        arguments.dtype = [dtype for dtype in DTYPES if dtype != "int8" or can_int8]
    if arguments.quick:
        arguments.shape, arguments.batch = ["base"], [4]
    return arguments


def write(output: Path, result: dict[str, Any]) -> None:
    """The result so far, cell by cell: a run that is cut short keeps what it has."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(output)


def main() -> None:
    given = sys.argv[1:]
    arguments = parsed(given)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    shares = [
        device_share(shape, dtype, arguments.device, max(arguments.batch))
        for shape in arguments.shape
        for dtype in arguments.dtype
    ]
    made = datetime.now(UTC)
    kind = arguments.device.partition(":")[0]
    output = arguments.output or RESULTS / f"engine_{kind}_{made:%Y%m%d-%H%M}.json"
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.engine", *given]),
        "made_at": made.isoformat(timespec="seconds"),
        "machine": describe(arguments.device),
        "n_docs": N_DOCS,
        "new_tokens": NEW_TOKENS,
        "complete": False,
        "rows": [],
        "device_share": [asdict(share) for share in shares],
        "precision": [],
    }
    write(output, result)
    rows: list[Row] = []
    for row in measured_rows(arguments):
        rows.append(row)
        result["rows"].append(asdict(row))
        write(output, result)
        console.print(
            f"{row.shape} {row.dtype} {row.strategy} batch {row.batch} beams {row.beams}: "
            f"{shown(row.transformers_s, '.2f')} → {row.ours_s:.2f} s, ratio {shown(row.ratio, '.1f')}",
            highlight=False,
        )
    of_demo = precisions(arguments.dtype, arguments.device)
    console.print(table_of(rows), share_table(shares), precision_table(of_demo))
    write(output, result | {"complete": True, "precision": [asdict(row) for row in of_demo]})
    console.print(f"written: {output}", highlight=False)


if __name__ == "__main__":
    main()
