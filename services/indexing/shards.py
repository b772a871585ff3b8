"""Embeds a corpus in pieces, each on the disk before the next: a kill at any moment costs the pieces in progress.

    <work folder>/plan.json          what is embedded by what; another corpus or encoder is refused
    <work folder>/00000012.arrow     passages of piece 12 with their embeddings

Each process reads the corpus from its beginning and embeds every P-th piece; finished ones are passed over.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from retriever_svc.formats.split import split_words
from retriever_svc.formats.texts import read_passages
from retriever_svc.generation import flush
from retriever_svc.passages import passage_schema
from retriever_svc.source import Source
from shared.errors import InvalidRequest, StartupError

ROWS = 4096  # of a piece
SAMPLE_BYTES = 1 << 20
PLAN = "plan.json"
FAILED = "failed.txt"
POLL_S = 0.2

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Corpus:
    """What is embedded. ``words``: longer texts are split into passages of so many; None leaves them whole."""

    path: str
    encoder: str
    words: int | None = None
    dtype: Literal["float16", "float32"] = "float16"
    device: str = "auto"

    def batches(self) -> Iterator[pa.RecordBatch]:
        found = read_passages(Path(self.path)).batches
        yield from found if self.words is None else split_words(found, self.words)

    def pieces(self) -> Iterator[pa.Table]:
        """Passages by ``ROWS``, the last piece shorter."""
        waiting: list[pa.RecordBatch] = []
        for batch in self.batches():
            rest = batch
            while (have := sum(map(len, waiting))) + len(rest) >= ROWS:
                yield pa.Table.from_batches([*waiting, rest.slice(0, ROWS - have)])
                waiting, rest = [], rest.slice(ROWS - have)
            if len(rest):
                waiting.append(rest)
        if waiting:
            yield pa.Table.from_batches(waiting)


def embed(corpus: Corpus, work: Path, *, processes: int = 1, progress: Progress | None = None) -> int:
    """Embed what is not yet embedded; the number of pieces.

    Raises:
        InvalidRequest: the corpus cannot be read.
        StartupError: the folder holds pieces of something else, the encoder cannot be loaded, or a process died.
    """
    work.mkdir(parents=True, exist_ok=True)
    _check_plan(corpus, work)
    (work / FAILED).unlink(missing_ok=True)
    for abandoned in work.glob("*.tmp"):
        abandoned.unlink()
    count = None if corpus.words else read_passages(Path(corpus.path)).count
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(corpus, work, i, processes), daemon=True) for i in range(processes)]
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers):
            if any(worker.exitcode for worker in workers):
                break
            if progress is not None:
                done = len(_finished(work)) * ROWS
                progress(done if count is None else min(done, count), count)
            time.sleep(POLL_S)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
    if failed := next((worker for worker in workers if worker.exitcode), None):
        why = (work / FAILED).read_text() if (work / FAILED).exists() else f"exit code {failed.exitcode}"
        raise StartupError(f"embedding stopped: {why}; the same command goes on from there")
    return len(_finished(work))


def embedded(work: Path, encoder: str) -> Source:
    """The finished pieces as a source, in order; ``encoder`` is the question encoder's fingerprint."""
    paths = _finished(work)
    if not paths:
        raise InvalidRequest("the corpus has no passages", param="passages")
    with pa.memory_map(str(paths[0])) as file:
        schema = pa.ipc.open_file(file).schema

    def batches() -> Iterator[pa.RecordBatch]:
        for path in paths:
            with pa.memory_map(str(path)) as file:
                reader = pa.ipc.open_file(file)
                for i in range(reader.num_record_batches):
                    yield reader.get_batch(i)

    return Source(schema, batches(), encoder)


def _check_plan(corpus: Corpus, work: Path) -> None:
    plan = {**asdict(corpus), "device": None, "path": None, "corpus": _identity(Path(corpus.path)), "rows": ROWS}
    path = work / PLAN
    if path.exists():
        if json.loads(path.read_text()) != plan:
            raise StartupError(
                f"{work} holds embeddings of another corpus, or by another encoder: name another folder, or remove it"
            )
    else:
        fresh = path.with_suffix(".tmp")
        fresh.write_text(json.dumps(plan))
        flush(fresh)
        fresh.replace(path)


def _identity(path: Path) -> str:
    """Of the corpus's files: name, size, first and last bytes. A corpus of gigabytes is not read twice for it."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(SAMPLE_BYTES))
            stream.seek(max(0, size - SAMPLE_BYTES))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _finished(work: Path) -> list[Path]:
    return sorted(work.glob("*.arrow"))


def _work(corpus: Corpus, work: Path, worker: int, workers: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    try:
        _embed_every(corpus, work, worker, workers)
    except Exception as error:  # noqa: BLE001  the parent raises it
        (work / FAILED).write_text(str(error) or type(error).__name__)
        os._exit(1)


def _embed_every(corpus: Corpus, work: Path, worker: int, workers: int) -> None:
    import torch  # noqa: PLC0415  each process has its own

    from services.indexing.encoder import PassageEncoder  # noqa: PLC0415

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    encoder: PassageEncoder | None = None
    for number, piece in enumerate(corpus.pieces()):
        path = work / f"{number:08d}.arrow"
        if number % workers != worker or path.exists():
            continue
        encoder = encoder or PassageEncoder(corpus.encoder, device=corpus.device)
        texts = list(zip(piece["title"].to_pylist(), piece["text"].to_pylist(), strict=True))
        embeddings = encoder.encode(texts).astype(corpus.dtype)
        if not np.isfinite(embeddings).all():
            raise ValueError(f"an embedding of piece {number} is not finite in {corpus.dtype}: take float32")
        dimension = embeddings.shape[1]
        table = pa.table(
            [
                *(piece[name].combine_chunks() for name in ("id", "title", "text")),
                pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), dimension),
            ],
            schema=passage_schema(dimension, corpus.dtype),
        )
        fresh = path.with_suffix(".tmp")
        with pa.OSFile(str(fresh), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        flush(fresh)
        fresh.replace(path)
