"""Collections that change while they serve: a state machine drives the real service over HTTP, beside a model of it."""

import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from retriever_svc.build import Options, build_collection
from retriever_svc.collection import Collection
from retriever_svc.index import PRESETS
from retriever_svc.ranking import inner_products
from shared.arrow import vector_array, write_stream
from shared.retrieval import RetrieveQuery
from shared.vectors import ARROW_TYPE, JSON_TYPE, Form, query_to_wire, result_from_wire
from tests.filters_data import Condition, Row, conditions, metadata_columns, random_metadata
from tests.retriever_data import ENCODER, clustered, passage_table, random_embeddings, source_of, text, title
from tests.retriever_process import RetrieverProcess

D = 8
N = 700
MADE = "made"  # the collection that is removed, and made again without passages
KINDS = {f"all-{kind}": kind for kind in PRESETS}
METADATA_TYPES = {
    "year": "integer",
    "lang": "string",
    "Score": "float",
    "ok": "boolean",
    "day": "date",
    "read at": "timestamp",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RetrieverProcess]:
    data = tmp_path_factory.mktemp("living") / "data"
    for name, kind in KINDS.items():
        table = passage_table(clustered(N, D).astype(np.float16))
        for column, values in metadata_columns(random_metadata(N, 0)).items():
            table = table.append_column(column, values)
        source = source_of(table, batch_rows=100)
        build_collection(data / "collections" / name, source, options=Options(kind=kind))
    service = RetrieverProcess(data, rebuild_after=400, canary_fraction=0.5).start()
    with httpx.Client(base_url=service.url, timeout=60) as http:
        http.post("/v1/collections", json=new_collection("flat")).raise_for_status()
        yield service
        compared = http.get("/metrics").text
    assert service.stop() == 0, service.log.read_text()[-4000:]
    assert not re.findall(r'.*_total\{.*outcome="failed"} [^0].*', compared)
    assert "request_crashed" not in service.log.read_text()
    for name in MODELS:  # every checksum holds, and the log can be read to its end
        Collection.open(data / "collections" / name, device="cpu")


def new_collection(kind: str) -> dict[str, Any]:
    return {"name": MADE, "dimension": D, "encoder": ENCODER, "kind": kind, "metadata": METADATA_TYPES}


class Model:
    """What a collection must hold: passages by id."""

    def __init__(self, kind: str, n: int) -> None:
        self.kind = kind
        embeddings = clustered(n, D).astype(np.float16).astype(np.float32)
        self.embeddings = dict(enumerate(embeddings))
        self.texts = {i: (title(i), text(i)) for i in range(n)}
        self.metadata = dict(enumerate(random_metadata(n, 0)))
        self.version = 0

    def upsert(self, passage_id: int, words: tuple[str, str], embedding: np.ndarray, metadata: Row) -> None:
        self.metadata[passage_id] = metadata
        self.embeddings[passage_id] = embedding.astype(np.float16).astype(np.float32)
        self.texts[passage_id] = words

    def selected(self, condition: Condition | None) -> list[int]:
        """Ids of the passages that fulfil it."""
        rows = {i: {**self.metadata[i], "id": i, "title": w[0], "text": w[1]} for i, w in self.texts.items()}
        return [i for i, row in rows.items() if condition is None or condition.holds(row) is True]

    def delete(self, ids: list[int]) -> int:
        found = [i for i in set(ids) if i in self.embeddings]
        for i in found:
            del self.embeddings[i], self.texts[i]
        return len(found)


MODELS = {name: Model(kind, N) for name, kind in KINDS.items()} | {MADE: Model("flat", 0)}


class Living(RuleBasedStateMachine):
    """Every rule acts on the service and on the model; the search that follows must agree."""

    url: str

    def __init__(self) -> None:
        super().__init__()
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def teardown(self) -> None:
        self.http.close()

    def call(self, method: str, path: str, **options: Any) -> Any:
        response = self.http.request(method, path, **options)
        assert response.is_success, response.text
        return response.json()

    names = st.sampled_from(list(MODELS))
    seeds = st.integers(0, 2**32 - 1)

    @rule(name=names, seed=seeds, n=st.integers(1, 60), arrow=st.booleans())
    def upsert(self, name: str, seed: int, n: int, arrow: bool) -> None:
        dice, model = np.random.default_rng(seed), MODELS[name]
        ids: list[int | None] = [int(i) for i in dice.choice(2 * N, n, replace=False)]
        ids = [None if dice.random() < 0.2 else i for i in ids]
        embeddings = clustered(n, D, seed=seed)
        words = [(f"T{seed}-{i}", f"text {i} “é”") for i in range(n)]
        metadata = random_metadata(n, seed)
        path = f"/v1/collections/{name}/passages"
        if arrow:
            columns = {
                "id": pa.array(ids, pa.int64()),
                "title": pa.array([w[0] for w in words]),
                "text": pa.array([w[1] for w in words]),
                "embedding": vector_array(embeddings),
            }
            columns |= metadata_columns(metadata)
            body = write_stream(columns, {})
            written = self.call("POST", path, content=body, headers={"Content-Type": ARROW_TYPE})
        else:
            rows = zip(ids, words, embeddings.tolist(), strict=True)
            passages = [
                {"title": w[0], "text": w[1], "embedding": e} | ({} if i is None else {"id": i}) for i, w, e in rows
            ]
            passages = [one | {"metadata": more} for one, more in zip(passages, metadata, strict=True)]
            written = self.call("POST", path, json={"passages": passages})
        assert [a for a, b in zip(written["ids"], ids, strict=True) if b is not None] == [
            i for i in ids if i is not None
        ]
        fresh = [a for a, b in zip(written["ids"], ids, strict=True) if b is None]
        assert len(set(written["ids"])) == n
        assert not set(fresh) & set(model.embeddings)
        assert written["gone"] == sum(i in model.embeddings for i in written["ids"])
        assert written["version"] == model.version + 1
        model.version += 1
        for i, w, e, m in zip(written["ids"], words, embeddings, metadata, strict=True):
            model.upsert(i, w, e, m)

    @rule(name=names, seed=seeds, n=st.integers(1, 80))
    def delete(self, name: str, seed: int, n: int) -> None:
        dice, model = np.random.default_rng(seed), MODELS[name]
        ids = [int(i) for i in dice.integers(0, 2 * N, n)]
        written = self.call("POST", f"/v1/collections/{name}/passages/delete", json={"ids": ids})
        assert written["gone"] == model.delete(ids)
        model.version += 1

    @rule(name=names, seed=seeds)
    def delete_one(self, name: str, seed: int) -> None:
        model = MODELS[name]
        passage_id = int(np.random.default_rng(seed).integers(0, 2 * N))
        response = self.http.delete(f"/v1/collections/{name}/passages/{passage_id}")
        assert response.status_code == (200 if passage_id in model.embeddings else 404)
        model.delete([passage_id])
        model.version += 1

    @rule(name=names, now=st.sampled_from([True, False]))
    def build(self, name: str, now: bool) -> None:
        if not now:  # it takes as long as a hundred of the others
            return
        response = self.http.post(f"/v1/collections/{name}/generations", json={})
        assert response.status_code in {202, 409}, response.text
        if response.status_code == 202:
            job = self.finished(response.json()["id"])
            assert job["status"] == "done", job

    def finished(self, job_id: str) -> Any:
        for _ in range(600):
            job = self.call("GET", f"/v1/jobs/{job_id}")
            if job["status"] != "running":
                return job
            time.sleep(0.05)
        raise AssertionError("the job does not end")

    @rule(name=names)
    def roll_back(self, name: str) -> None:
        """Within a lineage, an earlier generation holds the same passages: the changes since are applied to it."""
        found = self.call("GET", f"/v1/collections/{name}/generations")["generations"]
        assert sum(one["current"] for one in found) == 1
        response = self.http.post(f"/v1/collections/{name}/rollback", json={"generation": found[-1]["generation"]})
        assert response.status_code in {200, 404, 409}  # the background may have removed it

    @rule(kind=st.sampled_from(list(PRESETS)), n=st.integers(0, 9))
    def make_anew(self, kind: str, n: int) -> None:
        """Remove the collection, and make one of the name without passages."""
        if n:  # now and then: it shall grow, too
            return
        response = self.http.delete(f"/v1/collections/{MADE}")
        assert response.status_code in {204, 409}, response.text  # a generation of it is being built
        if response.status_code == 204:
            self.call("POST", "/v1/collections", json=new_collection(kind))
            MODELS[MADE] = Model(kind, 0)

    @rule(
        name=names,
        seed=seeds,
        n_docs=st.integers(1, 30),
        n_queries=st.integers(1, 5),
        condition=st.none() | conditions(),
        form=st.sampled_from(["json", "arrow"]),
    )
    def search(
        self, name: str, *, seed: int, n_docs: int, n_queries: int, condition: Condition | None, form: Form
    ) -> None:
        model, queries = MODELS[name], random_embeddings(n_queries, D, seed=seed)
        query = RetrieveQuery(queries, n_docs=n_docs, collection=name, filter=condition and condition.sql)
        body, content_type = query_to_wire(query, form)
        headers = {"Content-Type": content_type, "Accept": ARROW_TYPE if form == "arrow" else JSON_TYPE}
        response = self.http.post("/v1/retrieve", content=body, headers=headers)
        assert response.is_success, response.text
        found = result_from_wire(response.content, response.headers["content-type"])
        ids = np.array(sorted(model.selected(condition)), np.int64)
        stored = np.array([model.embeddings[i] for i in ids.tolist()]).reshape(-1, D)
        assert found.doc_embeds is not None
        assert found.docs is not None
        for b, query_D in enumerate(queries):
            got = found.doc_ids[b].tolist()
            assert len(got) == len(set(got)) == min(n_docs, len(ids))
            assert set(got) <= set(ids.tolist())
            expected = np.array([model.embeddings[i] for i in got]).reshape(-1, D)
            if got:  # JSON tells no dimension where there are no documents
                np.testing.assert_array_equal(found.doc_embeds[b], expected)
            np.testing.assert_array_equal(found.doc_scores[b], inner_products(query_D, expected))
            assert [(p.id, p.title, p.text, p.metadata) for p in found.docs[b]] == [
                (i, *model.texts[i], model.metadata[i]) for i in got
            ]
            if model.kind == "flat":
                scores = inner_products(query_D, stored)
                assert got == ids[np.lexsort((ids, -scores))][:n_docs].tolist()

    @rule(name=names, seed=seeds)
    def read_one(self, name: str, seed: int) -> None:
        model, passage_id = MODELS[name], int(np.random.default_rng(seed).integers(0, 2 * N))
        response = self.http.get(f"/v1/collections/{name}/passages/{passage_id}")
        if passage_id in model.texts:
            assert (response.json()["title"], response.json()["text"]) == model.texts[passage_id]
            assert response.json()["metadata"] == model.metadata[passage_id]
        else:
            assert response.status_code == 404

    @invariant()
    def counts_and_versions_are_right(self) -> None:
        for info in self.call("GET", "/v1/collections")["collections"]:
            assert (info["count"], info["version"]) == (len(MODELS[info["name"]].texts), MODELS[info["name"]].version)


def test_every_kind_stays_true_whatever_is_done_to_it(service: RetrieverProcess) -> None:
    Living.url = service.url
    run_state_machine_as_test(
        Living,
        # not made shorter where it fails: the collections stay from one run to the next
        settings=settings(max_examples=6, stateful_step_count=50, phases=(Phase.generate,)),
    )
    for name, model in MODELS.items():
        if len(model.embeddings) >= 5 and name != MADE:
            assert recall_at_5(service, name, model) >= PRESETS[model.kind].recall_floor, name


def recall_at_5(service: RetrieverProcess, name: str, model: Model) -> float:
    """Of queries that are near what was there in the beginning."""
    queries_BD = clustered(N, D) + 0.05 * random_embeddings(N, D, seed=5)
    ids, stored_ND = np.array(list(model.embeddings)), np.array(list(model.embeddings.values()))
    best_BK = np.array([ids[np.lexsort((ids, -inner_products(query_D, stored_ND)))][:5] for query_D in queries_BD])
    with httpx.Client(base_url=service.url, timeout=60) as http:
        hits = 0
        for first in range(0, len(queries_BD), 200):
            query = RetrieveQuery(queries_BD[first : first + 200], n_docs=5, collection=name)
            body, content_type = query_to_wire(query, "arrow")
            response = http.post("/v1/retrieve", content=body, headers={"Content-Type": content_type})
            found = result_from_wire(response.raise_for_status().content, response.headers["content-type"])
            best = best_BK[first : first + 200].tolist()
            hits += sum(len(set(got.tolist()) & set(b)) for got, b in zip(found.doc_ids, best, strict=True))
    return hits / best_BK.size
