"""`rag index` from the outside: corpora embedded, built, killed, served, grown, copied; formats of others imported."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import faiss
import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from retriever_svc.collection import Collection
from services.demo.build import CHECKPOINT, CONTEXT_ENCODER, PASSAGES
from tests.retriever_process import RetrieverProcess

ROOT = Path(__file__).parents[2]
ROWS = 600


def rag(*arguments: object, ok: bool = True) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", "index", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        check=False,
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def demo() -> dict[str, list]:
    return pq.read_table(PASSAGES).slice(0, ROWS).to_pydict()


@pytest.fixture(scope="module")
def tsv(tmp_path_factory: pytest.TempPathFactory, demo: dict[str, list]) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "psgs_w100.tsv"
    rows = zip(demo["id"], demo["text"], demo["title"], strict=True)
    quoted = (f'{i}\t"{text.replace(chr(34), chr(34) * 2)}"\t{title}' for i, text, title in rows)
    path.write_text("id\ttext\ttitle\n" + "\n".join(quoted) + "\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tsv: Path) -> Path:
    data = tmp_path_factory.mktemp("indexed") / "data"
    encoder = ["--encoder", CONTEXT_ENCODER, "--checkpoint", CHECKPOINT]
    said = rag("build", tsv, *encoder, "--kind", "hnsw", "--name", "news", "--data-dir", data)
    assert f"news: {ROWS} passages, HNSW128,SQ8" in said
    return data


def test_a_corpus_becomes_the_collection_that_the_demo_ships(data: Path, demo: dict[str, list]) -> None:
    collection = Collection.open(data / "collections" / "news", device="cpu")
    assert collection.manifest.encoder == pq.read_schema(PASSAGES).metadata[b"encoder"].decode()
    assert collection.passages.ids.tolist() == demo["id"]
    stored = np.array(demo["embedding"], np.float32)
    np.testing.assert_allclose(collection.index.embeddings(np.arange(ROWS)), stored, atol=0.03)
    assert not (data / "collections" / "news" / ".embedding").exists()


def test_a_build_that_is_killed_goes_on(tsv: Path, tmp_path: Path, demo: dict[str, list]) -> None:
    """Killed once it embeds; the same command finishes, and what it built is whole."""
    options = ["--encoder", CONTEXT_ENCODER, "--fingerprint", "e", "--split", 12, "--data-dir", tmp_path]
    command = [sys.executable, "-m", "services.cli", "index", "build", *map(str, [tsv, *options])]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    while not list(tmp_path.rglob("plan.json")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.rglob("CURRENT"))
    rag("build", tsv, *options)
    collection = Collection.open(tmp_path / "collections" / "default", device="cpu")
    assert collection.count == sum(-(-len(text.split()) // 12) for text in demo["text"])
    assert not list(tmp_path.rglob("*.arrow"))


def test_an_encoder_that_is_none_is_said(tsv: Path, tmp_path: Path) -> None:
    options = ["--fingerprint", "e", "--data-dir", tmp_path]
    assert "holds no embeddings" in rag("build", tsv, *options, ok=False)
    assert "whose space" in rag("build", tsv, "--encoder", CONTEXT_ENCODER, "--data-dir", tmp_path, ok=False)
    assert "cannot be loaded" in rag("build", tsv, "--encoder", tmp_path / "absent", *options, ok=False)
    assert "neither a preset" in rag("build", PASSAGES, "--kind", "hnws", "--data-dir", tmp_path, ok=False)
    wrong = ["--encoder", CONTEXT_ENCODER, "--kind", "IVF4,PQ3"]  # 128 is no multiple of 3
    assert "neither a preset" in rag("build", tsv, *wrong, *options, ok=False)
    assert not list(tmp_path.rglob("*.arrow"))  # said before anything was embedded
    assert "no name for a collection" in rag("build", PASSAGES, "--name", "A B", "--data-dir", tmp_path, ok=False)


@pytest.fixture(scope="module")
def service(data: Path) -> Iterator[RetrieverProcess]:
    service = RetrieverProcess(data).start()
    yield service
    assert service.stop() == 0


def test_a_collection_that_serves_grows_and_shrinks(
    service: RetrieverProcess, tmp_path: Path, demo: dict[str, list]
) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"title": f"New {i}", "text": f"Fresh news {i}."}) + "\n" for i in range(5)))
    address = ["--name", "news", "--retriever-url", service.url]
    said = rag("add", more, "--encoder", CONTEXT_ENCODER, "--new-ids", *address)
    assert "5 passages stored, 0 of them in place of others" in said
    first = max(demo["id"]) + 1
    url = f"{service.url}/v1/collections/news"
    assert httpx.get(f"{url}/passages/{first + 4}").json()["title"] == "New 4"
    assert "2 passages deleted" in rag("delete", first, first + 1, 999_999_999, *address)
    assert httpx.get(url).json()["count"] == ROWS + 3
    subset = tmp_path / "subset.parquet"
    pq.write_table(pq.read_table(PASSAGES).slice(10, 20), subset)
    assert "20 passages stored, 20 of them in place of others" in rag("add", subset, *address)


def test_columns_of_a_text_file_that_are_named_are_there_to_filter_by(
    service: RetrieverProcess, data: Path, tmp_path: Path
) -> None:
    def articles(name: str, years: range) -> Path:
        rows = [{"title": f"T{year}", "text": "all about it " * 9, "year": year, "lang": "en"} for year in years]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    encoder = ["--encoder", CONTEXT_ENCODER, "--split", 20]
    first, more = articles("first.jsonl", range(1990, 1995)), articles("more.jsonl", range(1995, 1998))
    build = ["build", first, *encoder, "--checkpoint", CHECKPOINT, "--name", "dated", "--data-dir", data]
    assert "there is no type 'int'" in rag(*build, "--metadata", "year=int", ok=False)
    assert "no line has the key `yeer`" in rag(*build, "--metadata", "yeer=integer", ok=False)
    rag(*build, "--metadata", "year=integer")
    rag("reload", "dated", "--retriever-url", service.url)
    rag("add", more, *encoder, "--new-ids", "--name", "dated", "--retriever-url", service.url)
    assert httpx.get(f"{service.url}/v1/collections/dated").json()["metadata"] == {"year": "integer"}
    asked = {"vectors": [[0.1] * 128], "collection": "dated", "n_docs": 20, "filter": "year >= 1994 AND year < 1997"}
    (docs,) = httpx.post(f"{service.url}/v1/retrieve", json=asked).json()["docs"]
    assert sorted(doc["title"] for doc in docs) == ["T1994", "T1994", "T1995", "T1995", "T1996", "T1996"]
    assert all(doc["metadata"] == {"year": int(doc["title"][1:])} for doc in docs)


def test_what_is_built_while_it_serves_is_served_after_reload(service: RetrieverProcess, data: Path) -> None:
    rag("build", PASSAGES, "--name", "demo", "--kind", "ivf-pq", "--data-dir", data)
    assert httpx.get(f"{service.url}/v1/collections/demo").status_code == 404
    assert "demo: 15,070 passages" in rag("reload", "demo", "--retriever-url", service.url)
    rag("build", PASSAGES, "--name", "demo", "--kind", "sq8", "--data-dir", data)
    assert httpx.get(f"{service.url}/v1/collections/demo").json()["kind"] == "ivf-pq"
    rag("reload", "demo", "--retriever-url", service.url)
    assert httpx.get(f"{service.url}/v1/collections/demo").json()["kind"] == "sq8"
    assert "(serves)" in rag("list", "--data-dir", data)


def test_a_snapshot_holds_what_was_acknowledged_and_comes_back(
    service: RetrieverProcess, data: Path, tmp_path: Path
) -> None:
    target = f"file://{tmp_path}/copy"
    body = {"passages": [{"id": 10**9, "title": "Last", "text": "word", "embedding": [0.5] * 128}]}
    assert httpx.post(f"{service.url}/v1/collections/news/passages", json=body).is_success
    assert "files copied" in rag("snapshot", "news", target, "--data-dir", data)
    assert "a snapshot already" in rag("snapshot", "news", target, "--data-dir", data, ok=False)
    assert "restored as `again`" in rag("restore", target, "again", "--data-dir", tmp_path / "data")
    assert Collection.open(tmp_path / "data" / "collections" / "again", device="cpu").passage(10**9).title == "Last"
    assert "again: sound" in rag("verify", "--data-dir", tmp_path / "data")
    assert "there is a collection" in rag("restore", target, "again", "--data-dir", tmp_path / "data", ok=False)
    index = next((tmp_path / "copy").rglob("index.faiss"))
    index.write_bytes(index.read_bytes()[:-1] + b"\x00")
    assert "is damaged" in rag("restore", target, "third", "--data-dir", tmp_path / "data", ok=False)
    assert [path.name for path in (tmp_path / "data" / "collections" / "third").iterdir()] == [".lock"]


def test_wiki_dpr_and_its_published_kind_of_index_are_served_as_they_are(tmp_path: Path, demo: dict[str, list]) -> None:
    embeddings = np.array(demo["embedding"], np.float32)
    rows = {"id": [str(i) for i in demo["id"]], "text": demo["text"], "title": demo["title"]}
    Dataset.from_dict({**rows, "embeddings": embeddings.tolist()}).to_parquet(tmp_path / "wiki" / "train-0.parquet")
    index = faiss.index_factory(128, "HNSW128,SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(embeddings)
    index.add(embeddings)
    faiss.write_index(index, str(tmp_path / "psgs_w100.nq.HNSW128_SQ8-IP-train.faiss"))
    options = ["--index", tmp_path / "psgs_w100.nq.HNSW128_SQ8-IP-train.faiss", "--kind", "hnsw", "--fingerprint", "e"]
    said = rag("import", tmp_path / "wiki", *options, "--name", "wiki", "--data-dir", tmp_path / "data")
    assert f"wiki: {ROWS} passages, IndexHNSWSQ as it was" in said
    assert "generation_built" not in said  # the log is for services
    collection = Collection.open(tmp_path / "data" / "collections" / "wiki", device="cpu")
    found = collection.search(embeddings[:50], [1] * 50)
    scores = embeddings[:50] @ embeddings.T
    best = [ranked.scores[0] for ranked in found]
    assert np.mean(np.isclose(best, scores.max(axis=1), rtol=1e-5)) >= 0.95
    np.testing.assert_array_equal(found[0].embeddings, embeddings[found[0].rows])
