"""The two sides of the comparison, each in a process of its own, so that each one's memory is its own.

Both live as long as their cells are measured, and take turns run by run: what else the machine does meets both alike.
"""

import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Literal, cast

import torch

from benchmarks.machine import peak_memory, reset_peak_memory, timed
from benchmarks.models import SHAPES, Inputs, random_inputs, random_rag
from benchmarks.rivals import transformers_generate
from generator_svc.checkpoint import Checkpoint
from generator_svc.engine import RagEngine
from generator_svc.engine.int8 import states_dtype as int8_states_dtype
from shared.schemas import Strategy

SideName = Literal["transformers", "ours"]
NEW_TOKENS = 16
N_DOCS = 5
CUDA_WARM_UPS = 3  # at the second our steps are captured
LONG_S = 20.0  # a run that takes longer is not repeated


@dataclass(frozen=True)
class Cell:
    strategy: Strategy
    batch: int
    beams: int


@dataclass(frozen=True)
class Measured:
    """``seconds`` a batch, the median of ``runs``; ``peak_bytes`` of the process; ``sequences`` as they came out."""

    seconds: float
    runs: int
    peak_bytes: int
    sequences: list[list[int]]


@dataclass(frozen=True)
class Run:
    """One batch answered. ``peak_bytes``: of the process, since the cell began."""

    seconds: float
    peak_bytes: int
    sequences: list[list[int]]


@dataclass(frozen=True)
class Setup:
    """What a side is given once. ``threads`` 0: as torch chooses.

    ``dtype`` is torch's name for it. transformers has no int8: it computes in what surrounds our products of int8.
    """

    name: SideName
    shape: str
    dtype: str
    device: str
    threads: int


def states_dtype(dtype: str) -> torch.dtype:
    """What a model is made in: for int8 what the engine computes in between the products."""
    found: torch.dtype = int8_states_dtype() if dtype == "int8" else getattr(torch, dtype)
    return found


def random_engine(shape: str, dtype: str, device: str) -> RagEngine:
    """Our engine over random weights. Tokenizers belong to a checkpoint, and the engine reads none."""
    none = cast("Any", None)
    return RagEngine(
        Checkpoint(
            name="random",
            model=random_rag(SHAPES[shape], states_dtype(dtype), device),
            question_tokenizer=none,
            generator_tokenizer=none,
            strategies=("token", "sequence"),
            encoder="",
            device=torch.device(device),
            dtype=getattr(torch, dtype),
        )
    )


class KilledError(RuntimeError):
    """A side's process has ended in the middle of a run: as a rule the machine had no memory left for it."""

    def __init__(self, side: SideName, what: str) -> None:
        super().__init__(f"{side} {what}")
        self.side = side


class Side:
    """The near end of a side's process. ``warm_ups``: runs that are not counted."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self.warm_ups = setup, CUDA_WARM_UPS if setup.device.startswith("cuda") else 1
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked torch keeps locks that nobody will release
        self._connection, far = context.Pipe()
        self._process = context.Process(target=_live, args=(far, self._setup), daemon=True)
        self._process.start()
        far.close()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def run(self, cell: Cell) -> Run:
        """Raises: KilledError; another process is there for the next run."""
        try:
            self._connection.send(cell)
            done: Run | BaseException = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self.close()
            ended = f"ended with exit code {self._process.exitcode} at {cell}"
            self._start()
            raise KilledError(self._setup.name, ended) from error
        if isinstance(done, BaseException):
            raise done
        return done

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def measure_in_turns(sides: Sequence[Side], cell: Cell, repeats: int) -> list[Measured]:
    """Every side to warm up, then one after the other ``repeats`` times. A long first run is not repeated."""
    runs = [[side.run(cell)] for side in sides]
    short = [i for i, (first,) in enumerate(runs) if first.seconds <= LONG_S]
    for i in short:
        for _ in range(sides[i].warm_ups - 1):
            runs[i] = [sides[i].run(cell)]
    for _ in range(repeats):
        for i in short:
            runs[i].append(sides[i].run(cell))
    return [_measured(of_side[1:] or of_side) for of_side in runs]


def _measured(runs: Sequence[Run]) -> Measured:
    last = runs[-1]
    return Measured(statistics.median(run.seconds for run in runs), len(runs), last.peak_bytes, last.sequences)


@contextmanager
def started(setup: Setup) -> Iterator[Side]:
    """A side in a process of its own, ended at the end."""
    side = Side(setup)
    try:
        yield side
    finally:
        side.close()


def _live(connection: Connection, setup: Setup) -> None:
    if setup.threads:
        torch.set_num_threads(setup.threads)
    generate = _generator(setup)
    current: Cell | None = None
    while True:
        try:
            cell = connection.recv()
        except EOFError:
            return
        try:
            if cell != current:
                inputs = random_inputs(SHAPES[setup.shape], cell.batch, N_DOCS, setup.device)
                reset_peak_memory(setup.device)
                current = cell
            connection.send(_run(partial(generate, inputs, cell), setup.device))
        except Exception as error:  # noqa: BLE001  raised on the other end
            connection.send(error)


def _generator(setup: Setup) -> Callable[[Inputs, Cell], Any]:
    """What answers a batch: (B, 1 + T)."""
    if setup.name == "transformers":
        model = random_rag(SHAPES[setup.shape], states_dtype(setup.dtype), setup.device)
        return lambda inputs, cell: transformers_generate(model, inputs, cell.strategy, cell.beams, NEW_TOKENS)
    engine = random_engine(setup.shape, setup.dtype, setup.device)
    return lambda inputs, cell: (
        engine.generate(
            inputs.input_ids,
            inputs.mask,
            inputs.doc_scores,
            strategy=cell.strategy,
            num_beams=cell.beams,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
        ).sequences
    )


def _run(generate: Callable[[], Any], device: str) -> Run:
    answers: list[list[int]] = []

    def run() -> None:
        answers[:] = generate().tolist()

    seconds = timed(run, device)
    return Run(seconds, peak_memory(device), answers)
