"""A build gives a whole generation or none, and what it gave is verified before it serves."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retriever_svc import generation as gen
from retriever_svc.build import TEMPORARY, build_collection
from retriever_svc.collection import Collection
from retriever_svc.index import INDEX
from shared.errors import InvalidRequest, NotFound, StartupError
from tests.retriever_data import passage_table, random_embeddings, source_of, text, title, write_seed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A collection of 30 passages with ids 100 to 129."""
    folder = tmp_path / "collections" / "mine"
    build_collection(folder, source_of(passage_table(random_embeddings(30, 8), range(100, 130))))
    return folder


def generations(folder: Path) -> set[str]:
    return {path.name for path in (folder / gen.GENERATIONS).iterdir()}


# --- what a build gives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_collection_holds_what_its_source_held(tmp_path: Path, dtype: str) -> None:
    embeddings_ND = random_embeddings(30, 8, dtype=dtype)
    name = build_collection(tmp_path / "mine", source_of(passage_table(embeddings_ND, range(100, 130))))
    collection = Collection.open(tmp_path / "mine", device="cpu")

    assert collection.generation == name
    assert (collection.info.count, collection.info.dimension, collection.info.dtype) == (30, 8, dtype)
    assert collection.passages.ids.tolist() == list(range(100, 130))
    np.testing.assert_array_equal(collection.index.embeddings(np.arange(30)), embeddings_ND.astype(np.float32))
    assert collection.passage(117).model_dump() == {"id": 117, "title": title(117), "text": text(117)}


def test_passages_are_found_by_id_whatever_the_order_of_ids(tmp_path: Path) -> None:
    ids = np.random.default_rng(3).permutation(1000)[:50].tolist()
    build_collection(tmp_path / "mine", source_of(passage_table(random_embeddings(50, 4), ids)))
    collection = Collection.open(tmp_path / "mine", device="cpu")
    assert [collection.passage(i).id for i in ids] == ids
    for absent in (set(range(1000)) - set(ids)).union({1000, 2**63 - 1}):
        with pytest.raises(NotFound):
            collection.passage(absent)


def test_rows_are_taken_in_one_go_with_repeats_and_in_any_order(folder: Path) -> None:
    taken = Collection.open(folder, device="cpu").passages.take(np.array([7, 3, 7, 29]))
    assert taken.field("id").to_pylist() == [107, 103, 107, 129]


def test_progress_tells_the_rows_taken(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    source = source_of(passage_table(random_embeddings(30, 8)), batch_rows=12)
    build_collection(tmp_path / "mine", source, progress=lambda *at: seen.append(at))
    assert seen[:4] == [("storing", rows, None) for rows in (0, 12, 24, 30)]
    assert seen[4:] == [("indexing", 0, 30), ("indexing", 30, 30)]


def test_a_second_build_takes_over_and_leaves_the_first_in_place(folder: Path) -> None:
    first = Collection.open(folder, device="cpu")
    second = build_collection(folder, source_of(passage_table(random_embeddings(5, 8, seed=9))))
    assert Collection.open(folder, device="cpu").generation == second
    assert first.passage(100).id == 100
    assert generations(folder) == {first.generation, second}


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (passage_table(random_embeddings(0, 8)), "no passages"),
        (passage_table(random_embeddings(4, 8), [5, 6, 7, 6]), "id 6 stands in rows 1 and 3"),
        (passage_table(random_embeddings(4, 8) * np.float32(np.nan)), "NaN"),
    ],
)
def test_a_refused_source_leaves_nothing_behind(tmp_path: Path, table: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        build_collection(tmp_path / "mine", source_of(table))
    assert generations(tmp_path / "mine") == set()
    assert not (tmp_path / "mine" / gen.CURRENT).exists()


# --- a build that dies ---------------------------------------------------------------------------------------


def test_a_build_that_fails_leaves_the_old_generation_serving(folder: Path) -> None:
    before = generations(folder)

    def full_disk(stage: str, done: int, total: int | None) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        build_collection(folder, source_of(passage_table(random_embeddings(9, 8))), progress=full_disk)
    assert generations(folder) == before
    assert Collection.open(folder, device="cpu").info.count == 30


BUILD_AND_HANG = """
import sys, time
from pathlib import Path
from retriever_svc.build import build_collection
from retriever_svc.source import from_parquet

def hang(stage, done, total):
    print("half way", flush=True)
    time.sleep(60)

build_collection(Path(sys.argv[1]), from_parquet(Path(sys.argv[2])), progress=hang)
"""


def test_a_killed_build_leaves_the_old_generation_serving_and_the_next_build_clears_up(
    folder: Path, tmp_path: Path
) -> None:
    seed = write_seed(tmp_path / "seed.parquet")
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", BUILD_AND_HANG, str(folder), str(seed)],
        stdout=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half way\n"
        process.send_signal(signal.SIGKILL)
    assert any(name.startswith(TEMPORARY) for name in generations(folder))
    assert Collection.open(folder, device="cpu").info.count == 30

    fresh = build_collection(folder, source_of(passage_table(random_embeddings(9, 8))))
    assert not any(name.startswith(TEMPORARY) for name in generations(folder))
    assert Collection.open(folder, device="cpu").generation == fresh


def test_builds_of_one_collection_take_turns(tmp_path: Path) -> None:
    running: list[int] = []
    most: list[int] = []

    def build(seed: int) -> None:
        def enter(stage: str, done: int, total: int | None) -> None:
            if seed not in running:
                running.append(seed)
            most.append(len(running))
            if (stage, done) == ("indexing", 30):
                running.remove(seed)

        build_collection(
            tmp_path / "mine", source_of(passage_table(random_embeddings(30, 8, seed=seed))), progress=enter
        )

    threads = [threading.Thread(target=build, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert len(generations(tmp_path / "mine")) == 4
    Collection.open(tmp_path / "mine", device="cpu")


# --- damage --------------------------------------------------------------------------------------------------


def current(folder: Path) -> Path:
    return gen.current_generation(folder)


def sealed_files(folder: Path) -> list[str]:
    return sorted(gen.read_manifest(current(folder)).files)


def test_every_file_of_a_generation_is_sealed(folder: Path) -> None:
    there = {str(p.relative_to(current(folder))) for p in current(folder).rglob("*") if p.is_file()}
    assert set(sealed_files(folder)) == there - {gen.MANIFEST}
    assert INDEX in there


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip_a_bit, "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes where its manifest says"),
        (Path.unlink, "is missing"),
    ],
    ids=["flipped bit", "truncated", "missing"],
)
def test_damage_to_any_file_is_named_at_the_start(folder: Path, damage: Callable[[Path], Any], says: str) -> None:
    sound = folder.with_name("sound")
    shutil.copytree(folder, sound)
    for name in sealed_files(folder):
        damage(current(folder) / name)
        with pytest.raises(StartupError, match=f"{re.escape(name)} .*{says}.*build it anew"):
            Collection.open(folder, device="cpu")
        shutil.copy(current(sound) / name, current(folder) / name)
    Collection.open(folder, device="cpu")


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = current(folder) / gen.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 3}, "has format 3, this version reads format 2"),
        ({"format": None}, "has format None"),
        ({"dimension": 9}, r"holds 30 x 8 float32 where .* says 30 x 9"),
        ({"count": 31}, r"holds 30 x 8 float32 where .* says 31 x 8"),
        ({"dtype": "float16"}, r"passages\.lance holds 30 x 8 float32 where .* says 30 x 8 float16"),
        ({"kind": None}, "damaged at `kind`"),
        ({"files": {"index.faiss": {}}}, r"damaged at `files\.index\.faiss"),
        ({"unknown": 1}, "damaged at `unknown`"),
    ],
)
def test_a_manifest_that_contradicts_is_refused(folder: Path, changes: dict[str, Any], says: str) -> None:
    edit_manifest(folder, **changes)
    with pytest.raises(StartupError, match=says):
        Collection.open(folder, device="cpu")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_manifest_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (current(folder) / gen.MANIFEST).write_bytes(content)
    with pytest.raises(StartupError, match=r"manifest\.json"):
        Collection.open(folder, device="cpu")


@pytest.mark.parametrize("name", ["", "nowhere", "../generations", "..", "\0"])
def test_a_pointer_to_no_generation_is_refused(folder: Path, name: str) -> None:
    (folder / gen.CURRENT).write_text(name)
    with pytest.raises(StartupError, match="CURRENT"):
        Collection.open(folder, device="cpu")


def test_a_collection_without_a_pointer_is_refused(folder: Path) -> None:
    (folder / gen.CURRENT).unlink()
    with pytest.raises(StartupError, match="CURRENT cannot be read"):
        Collection.open(folder, device="cpu")


def test_nothing_is_written_to_serve(folder: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}

    before = state()
    collection = Collection.open(folder, device="cpu")
    collection.search(random_embeddings(2, 8), [5, 5])
    collection.passage(100)
    assert state() == before
