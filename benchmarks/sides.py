"""The two sides of the comparison, each in a process of its own, so that each one's memory is its own.

Both live as long as their cells are measured, and take turns: what else the machine does meets both alike.
"""

import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal, cast

import torch

from benchmarks.machine import peak_memory, reset_peak_memory, timed
from benchmarks.models import SHAPES, Inputs, random_inputs, random_rag
from benchmarks.rivals import transformers_generate
from generator_svc.checkpoint import Checkpoint
from generator_svc.engine import RagEngine
from shared.schemas import Strategy

SideName = Literal["transformers", "ours"]
NEW_TOKENS = 16
N_DOCS = 5
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
class Setup:
    """What a side is given once. ``dtype`` is torch's name for it; ``threads`` 0: as torch chooses."""

    name: SideName
    shape: str
    dtype: str
    device: str
    threads: int
    repeats: int


def engine_of(model: Any, device: str) -> RagEngine:
    """Our engine over a model in memory. Tokenizers belong to a checkpoint, and the engine reads none."""
    none = cast("Any", None)
    generator = model.generator
    return RagEngine(
        Checkpoint(
            name="random",
            model=model,
            question_tokenizer=none,
            generator_tokenizer=none,
            strategies=("token", "sequence"),
            encoder="",
            device=torch.device(device),
            dtype=generator.dtype,
        )
    )


class Side:
    """The near end of a side's process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def measure(self, cell: Cell) -> Measured:
        self._connection.send(cell)
        measured: Measured | BaseException = self._connection.recv()
        if isinstance(measured, BaseException):
            raise measured
        return measured


@contextmanager
def started(setup: Setup) -> Iterator[Side]:
    """A side in a process of its own, ended at the end."""
    context = multiprocessing.get_context("spawn")  # a forked torch keeps locks that nobody will release
    near, far = context.Pipe()
    process = context.Process(target=_live, args=(far, setup), daemon=True)
    process.start()
    far.close()
    try:
        yield Side(near)
    finally:
        near.close()
        process.join()


def _live(connection: Connection, setup: Setup) -> None:
    if setup.threads:
        torch.set_num_threads(setup.threads)
    generate = _generator(setup)
    while True:
        try:
            cell = connection.recv()
        except EOFError:
            return
        try:
            connection.send(_measure(generate, cell, setup))
        except Exception as error:  # noqa: BLE001  raised on the other end
            connection.send(error)


def _generator(setup: Setup) -> Callable[[Inputs, Cell], Any]:
    """What answers a batch: (B, 1 + T)."""
    model = random_rag(SHAPES[setup.shape], getattr(torch, setup.dtype), setup.device)
    if setup.name == "transformers":
        return lambda inputs, cell: transformers_generate(model, inputs, cell.strategy, cell.beams, NEW_TOKENS)
    engine = engine_of(model, setup.device)
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


def _measure(generate: Callable[[Inputs, Cell], Any], cell: Cell, setup: Setup) -> Measured:
    inputs = random_inputs(SHAPES[setup.shape], cell.batch, N_DOCS, setup.device)
    answers: list[Any] = []
    reset_peak_memory(setup.device)

    def run() -> None:
        answers[:] = generate(inputs, cell).tolist()

    times = [timed(run, setup.device)]
    if times[0] <= LONG_S:
        times = [timed(run, setup.device) for _ in range(setup.repeats)]  # the first one warmed up
    return Measured(statistics.median(times), len(times), peak_memory(setup.device), answers)
