"""A build that is killed goes on where it was, to the same result; and never with files of another."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retriever_svc import checkpoint, record
from retriever_svc import generation as gen
from retriever_svc.build import TEMPORARY, Options, build_collection
from retriever_svc.checkpoint import CHECKPOINT, Checkpoint
from retriever_svc.collection import Collection
from retriever_svc.index import INDEX, building
from retriever_svc.index.kinds import empty_index
from retriever_svc.index.vectors import VectorsFile
from retriever_svc.source import Source
from shared.errors import InvalidRequest
from tests.retriever_data import passage_table, random_embeddings, source_of, write_seed

ROOT = Path(__file__).parents[2]
ROWS, D = 1200, 24
GRAPH, CODES = "HNSW8,SQ8", "IVF4_HNSW8,PQ4x4"
KINDS = ["flat", "sq8", GRAPH, CODES]
KILLS = 12


class StopError(BaseException):
    """In place of a kill."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many checkpoints in a small build."""
    pieces(monkeypatch)


def pieces(patch: Any) -> None:
    patch.setattr(record, "PIECE_ROWS", 250)
    patch.setattr(building, "ADD_ROWS", 100)
    patch.setattr(building, "SAVE_EVERY_S", 0.0)
    patch.setattr(building, "SAVING_SHARE", 1e9)


def source(seed: int = 0, rows: int = ROWS, identity: str | None = "mine") -> Source:
    found = source_of(passage_table(random_embeddings(rows, D, dtype="float16", seed=seed)), batch_rows=60)
    return Source(**{**found.__dict__, "identity": identity and f"{identity} {seed}"})


def unfinished(folder: Path) -> list[Path]:
    return list((folder / gen.GENERATIONS).glob(f"{TEMPORARY}*"))


def stopped(folder: Path, kind: str, at: int, made: Source | None = None) -> list[tuple[str, int]]:
    """Begin a build and stop it at its ``at``-th report; the reports."""
    seen: list[tuple[str, int]] = []

    def report(stage: str, done: int, _: int | None) -> None:
        seen.append((stage, done))
        if len(seen) == at:
            raise StopError

    with pytest.raises(StopError):
        build_collection(folder, made or source(), options=Options(kind), progress=report)
    return seen


def content(folder: Path) -> dict[str, bytes]:
    """Of the files that decide what is found."""
    generation = gen.current_generation(folder)
    gen.verify_files(generation, gen.read_manifest(generation))
    found = {
        path.name: path.read_bytes() for path in generation.iterdir() if path.is_file() and path.name != gen.MANIFEST
    }
    passages = Collection.open(folder, device="cpu").passages
    rows = pa.Table.from_batches(list(passages.batches(500)))
    return {**found, "rows": repr(rows.to_pydict()).encode()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What a build that nobody stops gives, by kind."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        pieces(patch)
        faiss.omp_set_num_threads(1)
        for kind in KINDS:
            folder = tmp_path_factory.mktemp(kind)
            build_collection(folder, source(), options=Options(kind))
            made[kind] = content(folder)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stops", [(2,), (24,), (26, 9, 12)])
def test_a_stopped_build_goes_on_to_the_same_bytes(
    kind: str, stops: tuple[int, ...], whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    faiss.omp_set_num_threads(1)  # several link a graph in another order each time
    for at in stops:
        stopped(tmp_path, kind, at)
    assert len(unfinished(tmp_path)) == 1
    build_collection(tmp_path, source(), options=Options(kind))
    assert content(tmp_path) == whole[kind]
    assert not unfinished(tmp_path)


def test_it_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    assert stopped(tmp_path, GRAPH, 12)[-1] == ("storing", 660)
    saved = Checkpoint.model_validate_json((unfinished(tmp_path)[0] / CHECKPOINT).read_bytes())
    assert saved.rows == 600  # whole batches of at least 250
    seen = stopped(tmp_path, GRAPH, 24)
    stages = dict(reversed(seen))  # where each of them begins
    assert (stages["checking files"], stages["storing"], stages["training"], stages["indexing"]) == (1, 600, 0, 0)
    assert seen[-1][0] == "indexing"
    saved = Checkpoint.model_validate_json((unfinished(tmp_path)[0] / CHECKPOINT).read_bytes())
    assert 0 < saved.added < ROWS
    seen = stopped(tmp_path, GRAPH, len(saved.files) + 1)
    assert seen[-1] == ("indexing", saved.added)


KILLED = """
import sys
from pathlib import Path
from retriever_svc.build import Options, build_collection
from retriever_svc.source import from_parquet
from tests.unit import test_build_resumes as here
import faiss, retriever_svc.index, retriever_svc.record

class Patch:
    setattr = staticmethod(setattr)

here.pieces(Patch)
faiss.omp_set_num_threads(1)
print("begins", flush=True)
options = Options(sys.argv[3])
build_collection(Path(sys.argv[1]), from_parquet(Path(sys.argv[2])), options=options)
"""


def test_sigkill_at_any_moment_loses_nothing_and_the_end_is_the_same(tmp_path: Path) -> None:
    seed, dice = write_seed(tmp_path / "seed.parquet", 3000, D), random.Random(5)
    for kind in (GRAPH, CODES):
        times = []
        for name in ("whole", "killed"):
            folder = tmp_path / f"{kind} {name}"
            command = [sys.executable, "-c", KILLED, str(folder), str(seed), kind]
            kills = KILLS if name == "killed" else 0
            for kill in range(kills + 1):
                with subprocess.Popen(
                    command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
                ) as process:
                    assert process.stdout is not None
                    assert process.stdout.readline() == b"begins\n"
                    began = time.monotonic()
                    if kill < kills:
                        time.sleep(dice.uniform(0, times[0] * 0.7))
                        process.kill()
                    process.wait()
                    times.append(time.monotonic() - began)
                if (folder / gen.CURRENT).exists():
                    break
            assert process.returncode in {0, -9}
        assert content(tmp_path / f"{kind} killed") == content(tmp_path / f"{kind} whole")
        assert not unfinished(tmp_path / f"{kind} killed")


# --- what is not mixed, and what is removed ------------------------------------------------------------------


@pytest.mark.parametrize("other", [("sq8", 0), ("flat", 1)])
def test_another_source_or_kind_begins_anew_and_removes_what_nobody_will_finish(
    other: tuple[str, int], tmp_path: Path
) -> None:
    stopped(tmp_path, "flat", 30)
    before = unfinished(tmp_path)
    seen = stopped(tmp_path, other[0], 3, source(other[1]))
    assert seen[0] == ("storing", 0)
    assert unfinished(tmp_path) != before
    assert len(unfinished(tmp_path)) == 1


def test_a_build_in_the_background_leaves_what_somebody_began_by_hand_for_a_week(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path, "flat", 30)
    background = Options("flat", lineage="a" * 32)
    build_collection(tmp_path, source(7), options=background)
    assert len(unfinished(tmp_path)) == 1
    monkeypatch.setattr(checkpoint, "KEPT_S", 0.0)
    build_collection(tmp_path, source(8), options=background)
    assert not unfinished(tmp_path)


def test_a_source_that_cannot_be_read_anew_leaves_nothing(tmp_path: Path) -> None:
    stopped(tmp_path, "flat", 30, source(identity=None))
    assert not unfinished(tmp_path)


def test_a_source_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    embeddings = random_embeddings(300, D)
    embeddings[299] = np.nan
    bad = source_of(passage_table(embeddings))
    with pytest.raises(InvalidRequest, match="NaN"):
        build_collection(tmp_path, Source(**{**bad.__dict__, "identity": "bad"}))
    assert not unfinished(tmp_path)


@pytest.mark.parametrize("name", ["generation/embeddings.bin", "checkpoint.json"])
def test_a_damaged_file_is_noticed_and_the_build_begins_anew(
    name: str, whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    stopped(tmp_path, "sq8", 24)
    damaged = unfinished(tmp_path)[0] / name
    damaged.write_bytes(b"\xff" + damaged.read_bytes()[1:])
    seen = []
    build_collection(tmp_path, source(), options=Options("sq8"), progress=lambda *at: seen.append(at))
    assert ("storing", 0, None) in seen
    assert content(tmp_path) == whole["sq8"]


def test_killed_after_it_has_its_name_it_takes_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(gen, "set_current", stop)
        with pytest.raises(StopError):
            build_collection(tmp_path, source())
    made = [path.name for path in (tmp_path / gen.GENERATIONS).iterdir() if not path.name.startswith(".")]
    assert [build_collection(tmp_path, source())] == made
    assert gen.current_generation(tmp_path).name == made[0]
    assert not unfinished(tmp_path)


# --- files as faiss writes them ------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "SQ8", "SQ4", "SQbf16"])
def test_codes_are_written_as_faiss_would(factory: str, tmp_path: Path) -> None:
    embeddings = random_embeddings(730, D).astype(np.float16).astype(np.float32)
    made = source_of(passage_table(embeddings))
    build_collection(tmp_path, made, options=Options("flat" if factory == "Flat" else factory))
    index = empty_index(factory, D)
    embeddings.tofile(tmp_path / "embeddings.bin")
    building.train(index, VectorsFile(tmp_path / "embeddings.bin", D, "float32"))
    index.add(embeddings)
    assert (gen.current_generation(tmp_path) / INDEX).read_bytes() == faiss.serialize_index(index).tobytes()


# --- memory --------------------------------------------------------------------------------------------------

WATCHED = """
import sys, threading, time
from pathlib import Path
from retriever_svc.build import Options, build_collection
from retriever_svc.source import from_parquet

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while True:
        peaks.append(anonymous())
        time.sleep(0.005)

peaks = []
threading.Thread(target=watch, daemon=True).start()
build_collection(Path(sys.argv[1]), from_parquet(Path(sys.argv[2])), options=Options(sys.argv[3]))
print(max(peaks))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["flat", "sq8"])
def test_memory_does_not_grow_with_the_corpus(kind: str, tmp_path: Path) -> None:
    peaks = []
    for rows in (60_000, 500_000):
        path = tmp_path / f"{rows}.parquet"
        # One row group, as others write them: 512 MB of vectors in float32, where the small one has 61.
        pq.write_table(passage_table(random_embeddings(rows, 256)), path, row_group_size=rows)
        command = [sys.executable, "-c", WATCHED, str(tmp_path / f"{rows}"), str(path), kind]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 200e6  # what is read ahead and buffered; the vectors of the large one are 451 MB more
