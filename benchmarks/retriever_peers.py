"""The rivals of `make bench-retriever` that come from PyPI: each in an environment of its own in the work folder.

One that cannot be installed, filled or started is reported with the reason, and the others go on without it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from benchmarks.in_process import InProcess
from benchmarks.retriever_cells import System
from benchmarks.retriever_data import Corpus, Say
from benchmarks.retriever_http import Dialect, HttpSystem, chroma_dialect, our_dialect, txtai_dialect
from tests.retriever_process import RetrieverProcess

SCRIPTS = Path(__file__).parent / "peers"
CONSTRAINTS = "torch==2.13.0\n"  # as in constraints.txt: without it pip may choose a build for a GPU
REQUIREMENTS = {"txtai": "txtai[api]", "chroma": "chromadb"}
FILLED = "filled.id"  # holds the id of Chroma's collection, once it is whole
START_S = 180.0


class PeerMissing(Exception):
    """Says why a rival is not in the comparison."""


def python_of(name: str, work: Path, say: Say) -> Path:
    """The interpreter of a rival's environment, which is made where it is not there yet.

    Raises: PeerMissing.
    """
    requirement, environments = REQUIREMENTS[name], work / "peers"
    folder = environments / name
    if not (folder / ".installed").exists():
        say(f"installing {requirement} into {folder}, a few minutes")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        constraints = environments / "constraints.txt"
        constraints.write_text(CONSTRAINTS)
        _done(f"installing {requirement}", sys.executable, "-m", "venv", folder)
        _done(f"installing {requirement}", folder / "bin" / "pip", "install", "-q", "-c", constraints, requirement)
        (folder / ".installed").touch()
    return folder / "bin" / "python"


def _done(what: str, *command: object, environment: Mapping[str, str] | None = None) -> str:
    """What the command printed. Raises: PeerMissing: it failed."""
    result = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip() and "WARNING" not in line]
        raise PeerMissing(f"{what} failed: {' / '.join(lines[-3:]) or result.returncode}")
    return result.stdout


@contextmanager
def ours(corpus: Corpus, kind: str, threads: int) -> Iterator[HttpSystem]:
    """``python -m retriever_svc`` over the collection of a kind.

    Without the recall canary, which no rival has: what that costs, ``benchmarks.canary`` measures.
    """
    process = RetrieverProcess(corpus.data_dir(kind), faiss_threads=threads, max_queue=4096, canary_fraction=0)
    process.start()
    system = HttpSystem("ours", process.url, [process.pid], our_dialect(corpus.queries), len(corpus.queries))
    try:
        yield system
    finally:
        system.close()
        process.stop()


@contextmanager
def in_process(name: str, module: str, *arguments: object) -> Iterator[InProcess]:
    try:
        system = InProcess(name, module, *arguments)
    except RuntimeError as error:
        raise PeerMissing(str(error)) from error
    try:
        yield system
    finally:
        system.close()


@contextmanager
def raw_faiss(corpus: Corpus, kind: str, how: str, threads: int) -> Iterator[InProcess]:
    queries = corpus.folder / "queries.npy"
    arguments = (corpus.generation(kind), queries, how, threads)
    with in_process(f"raw faiss, {how}", "benchmarks.raw_faiss", *arguments) as system:
        yield system


PEERS = {"txtai": "flat", "transformers": "flat", "chroma": "hnsw"}
"""The kind of ours that each is nearest to."""


def prepare(name: str, corpus: Corpus, say: Say) -> None:
    """Install a rival and fill its index, where that is not done yet.

    Raises: PeerMissing.
    """
    if name == "txtai":
        python, index = python_of(name, corpus.folder.parent, say), _txtai_index(corpus)
        if not (index / "embeddings").exists():
            say("filling txtai")
            shutil.rmtree(index, ignore_errors=True)
            script, environment = SCRIPTS / "txtai_vectors.py", _txtai_environment(corpus)
            _done("filling txtai", python, script, _lines(corpus), index, environment=environment)
    elif name == "chroma":
        python, folder = python_of(name, corpus.folder.parent, say), _chroma_folder(corpus)
        if not (folder / FILLED).exists():
            say("filling Chroma")
            shutil.rmtree(folder, ignore_errors=True)
            vectors = corpus.folder / "vectors.npy"
            printed = _done("filling Chroma", python, SCRIPTS / "chroma_fill.py", _lines(corpus), vectors, folder)
            (folder / FILLED).write_text(printed.split()[-1])


@contextmanager
def peer(name: str, corpus: Corpus, threads: int, say: Say) -> Iterator[System]:
    """One of `PEERS`. Raises: PeerMissing."""
    prepare(name, corpus, say)
    with ExitStack() as stack:
        if name == "transformers":
            shape = (corpus.folder, corpus.count, corpus.dimension)
            yield stack.enter_context(in_process(name, "benchmarks.transformers_retriever", *shape, threads))
        elif name == "txtai":
            yield stack.enter_context(_txtai(corpus, python_of(name, corpus.folder.parent, say), threads))
        else:
            yield stack.enter_context(_chroma(corpus, python_of(name, corpus.folder.parent, say), threads))


@contextmanager
def _txtai(corpus: Corpus, python: Path, threads: int) -> Iterator[HttpSystem]:
    environment = {**_txtai_environment(corpus), "OMP_NUM_THREADS": str(threads)}
    Path(environment["CONFIG"]).write_text(f"path: {_txtai_index(corpus)}\nembeddings:\n  path: null\n")
    port = _free_port()
    command = [python, "-m", "uvicorn", "--port", port, "--log-level", "warning", "txtai.api:app"]
    with _server("txtai", command, port, "/count", environment, corpus=corpus, dialect=txtai_dialect()) as system:
        yield system


def _txtai_index(corpus: Corpus) -> Path:
    return corpus.folder / "txtai"


def _txtai_environment(corpus: Corpus) -> dict[str, str]:
    return {
        "BENCH_CORPUS": str(corpus.folder),
        "PYTHONPATH": str(SCRIPTS),
        "ALLOW_RESOLVE_TRANSFORM": "True",
        "CONFIG": str(corpus.folder / "txtai.yml"),
    }


@contextmanager
def _chroma(corpus: Corpus, python: Path, threads: int) -> Iterator[HttpSystem]:
    folder = _chroma_folder(corpus)
    port = _free_port()
    command = [python.parent / "chroma", "run", "--path", folder, "--port", port]
    threads_of = {"RAYON_NUM_THREADS": str(threads), "ANONYMIZED_TELEMETRY": "False"}
    dialect = chroma_dialect(corpus.queries, (folder / FILLED).read_text())
    with _server("chroma", command, port, "/api/v2/heartbeat", threads_of, corpus=corpus, dialect=dialect) as system:
        yield system


def _chroma_folder(corpus: Corpus) -> Path:
    return corpus.folder / "chroma"


@contextmanager
def _server(
    name: str,
    command: list[object],
    port: int,
    ready: str,
    environment: Mapping[str, str],
    *,
    corpus: Corpus,
    dialect: Dialect,
) -> Iterator[HttpSystem]:
    log = corpus.folder / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen([*map(str, command)], stdout=file, stderr=file, env={**os.environ, **environment})
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(name, process, f"{url}{ready}", log)
        system = HttpSystem(name, url, [process.pid], dialect, len(corpus.queries))
        yield system
        system.close()
    finally:
        process.terminate()
        process.wait()


def _wait(name: str, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and process.poll() is None:
        try:
            if httpx.get(url, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise PeerMissing(f"{name} does not start: {' / '.join(log.read_text().splitlines()[-3:])}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _lines(corpus: Corpus) -> Path:
    """The passages as JSON lines, for environments without our code."""
    path = corpus.folder / "passages.jsonl"
    if not path.exists():
        with path.open("w") as file:
            for first, titles, texts in corpus.passages():
                for i, (title, text) in enumerate(zip(titles, texts, strict=True)):
                    file.write(json.dumps([first + i, title, text]) + "\n")
    return path
