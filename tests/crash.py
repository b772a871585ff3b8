"""Kills a retriever under concurrent writes and background builds, again and again, and looks for what is lost.

``python -m tests.crash 200 --seed 7`` kills so many times. What is killed:

    all            the service and whatever it started
    service        the service alone: a build that it started ends by itself
    build          the build alone: the service lives on, its job fails, the next one succeeds
    foreground     a build_collection that somebody runs

After each kill the service must start (which verifies every checksum) and hold every acknowledged write; a write that
was not answered is there as a whole or not at all. tests/e2e/test_crash.py runs a few.
"""

import argparse
import collections
import contextlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import structlog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from retriever_svc import generation as gen
from retriever_svc.build import TEMPORARY, Options, build_collection
from retriever_svc.collection import Collection
from retriever_svc.index import use_threads
from tests.retriever_data import passage_table, random_embeddings, source_of, text, title
from tests.retriever_process import ROOT, RetrieverProcess
from tests.writers import ALL, Ledger, Loss, Writers, read_all

D = 16
N = 500
KINDS = {"flat": ("flat", "float32"), "graph": ("hnsw", "float16"), "codes": ("ivf-pq", "float32")}
REBUILT = "rebuilt"  # the collection that foreground builds replace
WRITERS = 4
REBUILD_AFTER = 600
WHAT = ("all", "service", "build", "foreground")
WEIGHTS = (5, 2, 2, 1)
BUILD_WITHIN_S = 300.0  # where builds follow each other, one that is asked for waits for a gap

FOREGROUND = """
import sys
from pathlib import Path
from tests.crash import build_edition
print("begins", flush=True)
build_edition(Path(sys.argv[1]), int(sys.argv[2]))
"""


def build_edition(folder: Path, edition: int) -> None:
    """All passages of an edition have embeddings of its own."""
    embeddings = random_embeddings(N, D, seed=edition)
    build_collection(folder, source_of(passage_table(embeddings), batch_rows=50), options=Options("hnsw"))


class Crashes:
    """One service that is killed, and what its collections must hold."""

    def __init__(self, folder: Path, seed: int) -> None:
        use_threads(1)
        self.dice = random.Random(seed)
        self.seed = seed
        self.killed: collections.Counter[str] = collections.Counter()
        self.acknowledged = self.whole = self.absent = self.builds = 0
        self.edition = 0
        self._data = folder / "data"
        self._ledgers = []
        for name, (kind, dtype) in KINDS.items():
            embeddings = random_embeddings(N, D, dtype=dtype, seed=seed)
            build_collection(self._folder(name), source_of(passage_table(embeddings), 100), options=Options(kind))
            rows = enumerate(embeddings.astype(np.float32))
            self._ledgers.append(Ledger(name, dtype, {i: (title(i), text(i), row.tobytes()) for i, row in rows}))
        build_edition(self._folder(REBUILT), self.edition)
        self.service = RetrieverProcess(
            self._data, rebuild_after=REBUILD_AFTER, faiss_threads=1, max_n_docs=ALL, log_level="warning"
        ).start()
        self._http = httpx.Client(base_url=self.service.url, timeout=120)

    def _folder(self, name: str) -> Path:
        return self._data / "collections" / name

    def round(self) -> str:
        """One kill, and the look at what is there. What was killed. Raises: Loss."""
        (what,) = self.dice.choices(WHAT, WEIGHTS)
        return self.kill(what)

    def kill(self, what: str) -> str:
        tag = f"s{self.seed}k{self.killed.total()}"
        writers = Writers(self.service.url, self._ledgers, n=WRITERS, n_ids=N, dimension=D, tag=tag).start()
        try:
            {"build": self._kill_build, "foreground": self._kill_foreground}.get(what, self._kill_service)(what)
        finally:
            writers.stop()
        self.killed[what] += 1
        if what in {"all", "service"}:
            self._http.close()  # its connections lead nowhere
            self.service.start()
            self._http = httpx.Client(base_url=self.service.url, timeout=120)
        self.check()
        return what

    # --- kills ---------------------------------------------------------------------------------------------

    def _kill_service(self, what: str) -> None:
        if self.dice.random() < 0.5:
            self._http.post(f"/v1/collections/{self.dice.choice(self._ledgers).name}/generations", json={})
        self._wait_for_a_moment()
        self.service.kill(alone=what == "service")

    def _wait_for_a_moment(self) -> None:
        """Anything, or just after something that a kill might catch half done."""
        aimed: list[Callable[[], object]] = [
            lambda: set(self._data.glob(f"collections/*/{gen.GENERATIONS}/{TEMPORARY}*")),
            lambda: [path.stat().st_mtime_ns for path in self._data.glob(f"collections/*/{gen.CURRENT}")],
            lambda: set(self._data.glob("collections/*/changes/*/*.log")),
        ]
        if self.dice.random() < 0.4:
            time.sleep(self.dice.uniform(0, 2))
            return
        look = self.dice.choice(aimed)
        with contextlib.suppress(FileNotFoundError):  # it changes while we look
            before, until = look(), time.monotonic() + 4
            while look() == before and time.monotonic() < until:
                time.sleep(0.001)
        time.sleep(self.dice.choice([0, 0.002, 0.02, 0.2]) * self.dice.random())

    def _kill_build(self, _: str) -> None:
        name = self.dice.choice(self._ledgers).name
        while True:
            job = self._begin_build(name)
            until = time.monotonic() + BUILD_WITHIN_S
            while not (builds := self._builds(name)) and time.monotonic() < until:
                time.sleep(0.005)
            if self.dice.random() < 0.7:  # else while it imports
                building = self._folder(name) / gen.GENERATIONS
                while not any(building.glob(f"{TEMPORARY}*")) and self._job(job)["status"] == "running":
                    time.sleep(0.002)
            time.sleep(self.dice.uniform(0, 0.1))
            for pid in builds:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ended = self._finished(job)
            if ended["status"] == "failed":
                break  # else it was done before the kill
        if ended["error"] != "the build was killed by signal 9":
            raise Loss(f"{name}: the killed build ended as {ended}")
        ended = self._finished(self._begin_build(name))
        if ended["status"] != "done":
            raise Loss(f"{name}: the build after the killed one ended as {ended}")
        self.builds += 1

    def _builds(self, name: str) -> list[int]:
        """Processes in which the service builds this collection."""
        return self.service.children("retriever_svc.rebuild", str(self._folder(name)))

    def _begin_build(self, name: str) -> str:
        """A job's id, once no other build of the collection runs."""
        until = time.monotonic() + BUILD_WITHIN_S
        while time.monotonic() < until:
            response = self._http.post(f"/v1/collections/{name}/generations", json={})
            if response.status_code == 202:
                return str(response.json()["id"])
            assert response.status_code == 409, response.text
            time.sleep(0.01)
        raise Loss(f"{name}: another build does not end")

    def _job(self, job: str) -> Any:
        return self._http.get(f"/v1/jobs/{job}").raise_for_status().json()

    def _finished(self, job: str) -> Any:
        until = time.monotonic() + BUILD_WITHIN_S
        while (found := self._job(job))["status"] == "running":
            if time.monotonic() > until:
                raise Loss(f"the job does not end: {found}")
            time.sleep(0.01)
        return found

    def _kill_foreground(self, _: str) -> None:
        folder = self._folder(REBUILT)
        command = [sys.executable, "-c", FOREGROUND, str(folder), str(self.edition + 1)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as build:
            assert build.stdout is not None
            assert build.stdout.readline() == b"begins\n"
            time.sleep(self.dice.uniform(0, 0.3))
            build.kill()
        collection = Collection.open(folder, device="cpu")
        found = collection.index.embeddings(np.arange(N))
        editions = [e for e in (self.edition, self.edition + 1) if (random_embeddings(N, D, seed=e) == found).all()]
        if len(editions) != 1 or collection.count != N:
            raise Loss(f"{REBUILT}: edition {self.edition} or the next was expected")
        self.edition = editions[0]
        if self.dice.random() < 0.3:
            self.edition += 1
            build_edition(folder, self.edition)
            if left := list((folder / gen.GENERATIONS).glob(f"{TEMPORARY}*")):
                raise Loss(f"{REBUILT}: a killed build left {left[0].name} behind the next one")

    # --- checks --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Nobody writes: the service and the ledgers agree. Raises: Loss."""
        for ledger in self._ledgers:
            version, found = read_all(self._http, ledger.name, D)
            acknowledged, whole, absent = ledger.settle(version, found)
            self.acknowledged += acknowledged
            self.whole += whole
            self.absent += absent
            for passage_id in self.dice.sample(range(N), 2):
                response = self._http.get(f"/v1/collections/{ledger.name}/passages/{passage_id}")
                stored = ledger.state.get(passage_id)
                if stored is None and response.status_code == 404:
                    continue
                if stored is None or (response.json()["title"], response.json()["text"]) != stored[:2]:
                    raise Loss(f"{ledger.name}: passage {passage_id} should be {stored}, is {response.text}")

    def finish(self) -> None:
        """Stop it, and read everything from the disk once more. Raises: Loss."""
        try:
            self._http.close()
            code = self.service.stop()
            if code:
                raise Loss(f"the service ended with code {code}")
            for ledger in self._ledgers:
                self._check_folder(Collection.open(self._folder(ledger.name), device="cpu"), ledger)
        finally:
            self.service.end()

    def _check_folder(self, collection: Collection, ledger: Ledger) -> None:
        if (collection.applied, collection.count) != (ledger.version, len(ledger.state)):
            raise Loss(f"{ledger.name}: the disk has {collection.count} passages at change {collection.applied}")
        for passage_id, stored in ledger.state.items():
            passage = collection.passage(passage_id)
            if (passage.title, passage.text) != stored[:2]:
                raise Loss(f"{ledger.name}: passage {passage_id} on the disk is {passage.title!r}, not {stored[0]!r}")

    @property
    def report(self) -> str:
        kills = ", ".join(f"{self.killed[what]} {what}" for what in WHAT)
        return (
            f"seed {self.seed}: {self.killed.total()} kills ({kills}); {self.acknowledged} writes acknowledged; "
            f"without an answer {self.whole} whole, {self.absent} absent"
        )


@contextlib.contextmanager
def crashes(folder: Path, seed: int) -> Iterator[Crashes]:
    """Leaves no process behind."""
    running = Crashes(folder, seed)
    try:
        yield running
    finally:
        running.service.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    asked = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    console, losses = Console(), 0
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with crashes(folder, asked.seed) as running, Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=asked.kills)
        try:
            for _ in range(asked.kills):
                running.round()
                progress.update(bar, advance=1, description=running.report)
            running.finish()
        except Loss as loss:
            losses = 1
            console.print(f"LOST: {loss}\nthe data is kept in {folder}", highlight=False)
    sys.stdout.write(f"{running.report}; {losses} losses\n")
    if not losses:
        shutil.rmtree(folder)
    return losses


if __name__ == "__main__":
    sys.exit(main())
