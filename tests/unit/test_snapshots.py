"""Snapshots to a folder and to URLs, and what becomes of damage on the way."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.fs
import pytest

from retriever_svc.build import Options, build_collection
from retriever_svc.changes import Delete, Upsert
from retriever_svc.collection import Collection
from retriever_svc.snapshots import CONTENTS, restore_snapshot, save_snapshot
from shared.errors import Conflict, InvalidRequest, StartupError
from tests.retriever_data import passage_table, random_embeddings, source_of

N, D = 30, 4


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """A collection with changes since its generation was built."""
    folder = tmp_path / "collections" / "news"
    build_collection(folder, source_of(passage_table(random_embeddings(N, D))), options=Options("hnsw"))
    log = Collection.open(folder, device="cpu").open_log()
    log.append([Upsert(np.array([99]), ["new"], ["text"], random_embeddings(1, D)), Delete(np.array([3]))])
    log.close()
    return folder


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where to copy to. S3: a bucket of one's own, as ``s3://bucket?endpoint_override=127.0.0.1:5000&scheme=http``."""
    if request.param == "s3":
        if not (bucket := os.environ.get("RAG_TEST_S3")):
            pytest.skip("RAG_TEST_S3 names no bucket to try")
        base, _, query = bucket.partition("?")
        yield f"{base}/{tmp_path.name}?{query}"
        return
    yield {"folder": str(tmp_path / "copy"), "file": f"file://{tmp_path}/copy", "memory": "memory://copy"}[
        request.param
    ]
    if request.param == "memory":
        fsspec.filesystem("memory").rm("/copy", recursive=True)


def files_at(target: str) -> tuple[pyarrow.fs.FileSystem, str]:
    if target.startswith("memory"):
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fsspec.filesystem("memory"))), "/copy"
    return pyarrow.fs.FileSystem.from_uri(target)


def test_a_collection_comes_back_with_its_changes(collection: Path, target: str, tmp_path: Path) -> None:
    copied = save_snapshot(collection, target)
    assert restore_snapshot(target, tmp_path / "collections" / "again") == copied
    before, after = (Collection.open(collection.with_name(name), device="cpu") for name in ("news", "again"))
    assert (after.count, after.applied) == (before.count, before.applied) == (N, 2)
    query = random_embeddings(1, D, seed=1)
    assert after.search(query, [N])[0].ids.tolist() == before.search(query, [N])[0].ids.tolist()
    assert after.passage(99).title == "new"


def test_a_snapshot_is_not_written_over(collection: Path, target: str) -> None:
    save_snapshot(collection, target)
    with pytest.raises(InvalidRequest, match="holds a snapshot already"):
        save_snapshot(collection, target)


def test_a_file_that_was_damaged_on_the_way_is_named_and_nothing_is_made(
    collection: Path, target: str, tmp_path: Path
) -> None:
    save_snapshot(collection, target)
    system, base = files_at(target)
    with system.open_input_stream(f"{base}/{CONTENTS}") as file:
        name = next(name for name in json.loads(file.read())["files"] if name.endswith("embeddings.bin"))
    with system.open_output_stream(f"{base}/{name}") as file:
        file.write(b"other bytes")
    with pytest.raises(StartupError, match=r"embeddings\.bin is damaged"):
        restore_snapshot(target, tmp_path / "collections" / "again")
    assert not (tmp_path / "collections" / "again" / "CURRENT").exists()


def test_a_copy_that_was_not_finished_is_no_snapshot(collection: Path, target: str, tmp_path: Path) -> None:
    save_snapshot(collection, target)
    system, base = files_at(target)
    system.delete_file(f"{base}/{CONTENTS}")
    with pytest.raises(InvalidRequest, match="holds no snapshot"):
        restore_snapshot(target, tmp_path / "collections" / "again")


def test_a_collection_that_is_there_is_not_restored_over(collection: Path, target: str) -> None:
    save_snapshot(collection, target)
    with pytest.raises(Conflict, match="restore under another name"):
        restore_snapshot(target, collection)


@pytest.mark.parametrize("url", ["nowhere://bucket/x", "s3://bucket/x?colour=red"])
def test_a_url_that_nobody_opens_is_refused(collection: Path, url: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be written") as refused:
        save_snapshot(collection, url)
    assert refused.value.param == "target"
