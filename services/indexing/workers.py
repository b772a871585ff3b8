"""Who embeds: this process, or several that take one shard after the other.

Each worker has one pipe and one shard at a time, so that a worker that dies blocks nobody, and the memory is bounded.
What goes over a pipe: from the worker its `EncoderRecipe`, then the rows embedded, batch by batch, `Finished` after
each shard, or the error that ended it; to the worker the `Plan`, then the shards. A pipe that closes ends the worker.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from retriever_svc.formats.passages import with_metadata
from retriever_svc.metadata import schema_of
from services.indexing.options import EncoderOptions, EncoderRecipe
from services.indexing.plan import Plan
from services.indexing.shards import write_shard
from shared.errors import InferenceError, RagError

if TYPE_CHECKING:
    from services.indexing.encoder import PassageEncoder

STOP_WITHIN_S = 5.0

Shard = tuple[int, pa.RecordBatch]


@dataclass(frozen=True)
class Finished:
    """A shard is on the disk."""

    shard: int


class InProcess:
    """Embeds in this process."""

    def __init__(self, options: EncoderOptions, folder: Path) -> None:
        from services.indexing.encoder import PassageEncoder  # noqa: PLC0415  torch, only where it is needed

        self._encoder, self._folder = PassageEncoder(options), folder
        self.recipe = self._encoder.recipe

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def embed(self, plan: Plan, shards: Iterable[Shard]) -> Iterator[int]:
        """Embed and write the shards; gives the number of passages of each batch as it is done."""
        for shard, passages in shards:
            yield from _embed_shard(self._encoder, self._folder, plan, shard, passages)


class WorkerPool:
    """Spawned processes. Leaving the context ends them: at their leisure, or at once after an error."""

    recipe: EncoderRecipe

    def __init__(self, options: EncoderOptions, count: int, folder: Path) -> None:
        self._options, self._count, self._folder = options, count, folder
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        try:
            with _ctrl_c_ignored():  # inherited: Ctrl-C reaches the whole group, and only this process acts on it
                for number in range(self._count):
                    self._workers.append(_Worker(number, self._count, self._options, self._folder))
            recipes = [worker.receive() for worker in self._workers]
            if any(recipe != recipes[0] for recipe in recipes):
                raise InferenceError("the workers loaded different encoders: its files changed while they started")
        except BaseException:
            self._stop(at_once=True)
            raise
        self.recipe = recipes[0]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop(at_once=error is not None)

    def embed(self, plan: Plan, shards: Iterable[Shard]) -> Iterator[int]:
        """Embed and write the shards; gives the number of passages of each batch as it is done.

        Raises: InferenceError: a worker failed or died.
        """
        for worker in self._workers:
            worker.send(plan)
        waiting, idle = iter(shards), list(self._workers)
        busy: dict[Connection, _Worker] = {}
        while True:
            while idle and (task := next(waiting, None)) is not None:
                worker = idle.pop()
                worker.embed(*task)
                busy[worker.pipe] = worker
            if not busy:
                return
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]  # what waits are the connections given
                message = worker.receive()
                if isinstance(message, Finished):
                    idle.append(busy.pop(worker.pipe))
                else:
                    yield int(message)

    def _stop(self, *, at_once: bool) -> None:
        for worker in self._workers:
            worker.pipe.close()
            if at_once:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(STOP_WITHIN_S)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()


class _Worker:
    """A process as the pool sees it."""

    def __init__(self, number: int, count: int, options: EncoderOptions, folder: Path) -> None:
        context = get_context("spawn")  # a fork would copy the threads' locks, and CUDA does not survive it
        self.number = number
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=work, args=(theirs, options, number, count, folder), name=f"embed-{number}", daemon=True
        )
        self.process.start()
        theirs.close()  # so that the pipe ends with the worker
        self._at = "while it loaded the encoder"

    def embed(self, shard: int, passages: pa.RecordBatch) -> None:
        self._at = f"in shard {shard}"
        self.send((shard, passages.serialize().to_pybytes()))

    def send(self, message: object) -> None:
        try:
            self.pipe.send(message)
        except OSError as error:
            raise self._died() from error

    def receive(self) -> Any:
        try:
            message = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(message, RagError):
            raise message
        return message

    def _died(self) -> InferenceError:
        self.process.join(STOP_WITHIN_S)
        code = self.process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
            if -code == signal.SIGKILL:
                how += ", which is how Linux ends a process when memory runs out: try fewer workers or smaller batches"
        return InferenceError(
            f"worker {self.number} died {self._at} ({how}). The finished shards stay; run again to go on"
        )


def work(pipe: Connection, options: EncoderOptions, number: int, count: int, folder: Path) -> None:
    """The life of a worker process, from loading the encoder to the end of its pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        encoder = _load_encoder(options, number, count)
        pipe.send(encoder.recipe)
        plan: Plan = pipe.recv()
        schema = with_metadata(schema_of(plan.metadata))
        while True:
            shard, data = pipe.recv()
            passages = pa.ipc.read_record_batch(pa.py_buffer(data), schema)
            for rows in _embed_shard(encoder, folder, plan, shard, passages):
                pipe.send(rows)
            pipe.send(Finished(shard))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # no more shards
    except RagError as error:
        pipe.send(error)
    except Exception as error:  # noqa: BLE001  whatever it is, the run has to hear of it
        pipe.send(InferenceError(f"worker {number} failed: {type(error).__name__}: {error}"))


def _load_encoder(options: EncoderOptions, number: int, count: int) -> "PassageEncoder":
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = max(1, cores // count)
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the tokenizer, which reads it at its first use
    import torch  # noqa: PLC0415  torch, only where it is needed
    from transformers.utils import logging  # noqa: PLC0415

    from services.indexing.encoder import PassageEncoder  # noqa: PLC0415

    torch.set_num_threads(threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return PassageEncoder(_on_device(options, number, torch.cuda.device_count()))


def _on_device(options: EncoderOptions, number: int, gpus: int) -> EncoderOptions:
    """The GPUs are dealt out in turn, unless one is named."""
    if gpus and options.device in {None, "cuda"}:
        return replace(options, device=f"cuda:{number % gpus}")
    return options


def _embed_shard(
    encoder: "PassageEncoder", folder: Path, plan: Plan, shard: int, passages: pa.RecordBatch
) -> Iterator[int]:
    titles, texts = passages.column("title").to_pylist(), passages.column("text").to_pylist()
    embeddings_BD = np.empty((len(passages), plan.encoder.dimension), plan.dtype)
    for rows, vectors in encoder.batches(titles, texts):
        with np.errstate(over="ignore"):  # found below
            embeddings_BD[rows] = vectors
        finite = np.isfinite(embeddings_BD[rows]).all(axis=1)
        if not finite.all():
            passage = passages.column("id")[int(rows[np.argmin(finite)])].as_py()
            raise InferenceError(
                f"the embedding of passage {passage} holds NaN or infinity as {plan.dtype}, computed in "
                f"{plan.encoder.dtype}: use float32 for both in another folder"
            )
        yield len(rows)
    write_shard(folder, plan, shard, passages, embeddings_BD)


def _end_with_parent() -> None:
    """A parent killed by SIGKILL closes the pipe, which a worker in the middle of a shard would see minutes later."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may, and only it gets the KeyboardInterrupt
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
