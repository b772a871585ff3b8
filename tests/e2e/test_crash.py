"""A retriever that is killed while it is written to loses nothing that it acknowledged. `make crash` does more."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from retriever_svc.collection import Collection
from tests.crash import crashes
from tests.retriever_data import ENCODER
from tests.retriever_process import RetrieverProcess

pytestmark = pytest.mark.slow


def test_no_kill_loses_an_acknowledged_write_or_leaves_half_of_one(tmp_path: Path) -> None:
    with crashes(tmp_path, seed=0) as running:
        for what in ("all", "build", "service", "foreground", "all", "service"):
            running.kill(what)
        running.finish()
        assert running.killed.total() == 6
        assert running.acknowledged > 100


class Makers:
    """Make and remove collections, each with names of its own, until the service dies."""

    def __init__(self, url: str, known: dict[str, set[int]], *, n: int) -> None:
        """``known``: by name, the dimensions that it may have; 0: it may be absent."""
        self._url, self._known = url, known
        self.answered = 0
        self._threads = [threading.Thread(target=self._work, args=(i,)) for i in range(n)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _work(self, maker: int) -> None:
        dice = random.Random(maker)
        with httpx.Client(base_url=self._url, timeout=60) as http:
            try:
                while True:
                    name, dimension = f"c{maker}-{dice.randrange(3)}", dice.randrange(1, 9)
                    there = self._known.get(name, {0}) != {0}
                    self._known[name] = self._known.get(name, {0}) | {0 if there else dimension}
                    if there:
                        http.delete(f"/v1/collections/{name}").raise_for_status()
                    else:
                        new = {"name": name, "dimension": dimension, "encoder": ENCODER, "kind": "hnsw"}
                        http.post("/v1/collections", json=new).raise_for_status()
                    self._known[name] = {0 if there else dimension}
                    self.answered += 1
            except httpx.TransportError:
                return


def test_a_kill_leaves_a_new_collection_whole_or_not_at_all(tmp_path: Path) -> None:
    data, dice, known, answered = tmp_path / "data", random.Random(0), dict[str, set[int]](), 0
    service = RetrieverProcess(data, log_level="warning").start()
    try:
        for _ in range(6):
            makers = Makers(service.url, known, n=3)
            makers.start()
            enough = dice.randrange(4, 8)
            while makers.answered < enough and makers.alive:
                time.sleep(0.002)
            time.sleep(dice.uniform(0, 0.1))
            service.kill()
            makers.join()
            answered += makers.answered
            service.start()
            with httpx.Client(base_url=service.url, timeout=60) as http:
                listed = http.get("/v1/collections").raise_for_status().json()["collections"]
                assert "warnings" not in http.get("/readyz").json() or not listed
            found = {info["name"]: info["dimension"] for info in listed}
            for name, may_be in known.items():
                assert found.get(name, 0) in may_be, name
                known[name] = {found.get(name, 0)}
            assert set(found) <= set(known)
            assert {path.name for path in (data / "collections").iterdir()} >= set(found)
            assert not list((data / "collections").glob(".*"))
            for name, dimension in found.items():
                assert Collection.open(data / "collections" / name, device="cpu").manifest.dimension == dimension
        assert service.stop() == 0
        assert answered > 20
    finally:
        service.end()


@contextmanager
def building(service: RetrieverProcess, folder: Path) -> Iterator[int]:
    """A build that the service has begun: its process."""
    with httpx.Client(base_url=service.url, timeout=60) as http:
        http.post(f"/v1/collections/{folder.name}/generations", json={}).raise_for_status()
        while not (found := service.children("retriever_svc.rebuild", str(folder))):
            time.sleep(0.002)
    yield found[0]


def test_a_build_does_not_outlive_the_service_that_began_it(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "collections" / "news"
    service = RetrieverProcess(tmp_path / "data", log_level="warning").start()
    try:
        with httpx.Client(base_url=service.url, timeout=60) as http:
            new = {"name": "news", "dimension": 4, "encoder": ENCODER}
            http.post("/v1/collections", json=new).raise_for_status()
        before = (folder / "CURRENT").read_text()
        with building(service, folder) as build:
            service.kill(alone=True)
            until = time.monotonic() + 60
            while Path(f"/proc/{build}").exists() and _state(build) != "Z":
                assert time.monotonic() < until, "the build goes on"
                time.sleep(0.01)
        assert (folder / "CURRENT").read_text() == before
        service.start()
        assert service.stop() == 0
    finally:
        service.end()


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"
