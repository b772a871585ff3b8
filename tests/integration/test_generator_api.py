"""The generator's HTTP contract, in process, over a tiny checkpoint and a small retriever on a real socket."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from starlette.responses import JSONResponse
from transformers import RagTokenForGeneration, RagTokenizer

from generator_svc.app import create_app
from generator_svc.checkpoint import load_checkpoint
from generator_svc.contexts import question_form
from generator_svc.engine import int8
from generator_svc.settings import GeneratorSettings
from shared.vectors import ARROW_TYPE, vectors_from_wire
from tests.serving import free_port, served
from tests.small_retriever import SmallRetriever
from tests.tiny_checkpoint import save_tiny_checkpoint

QUESTION = "How many people live in Paris?"
PASSAGES = [
    {"id": 7, "title": "Paris", "text": "Paris has 2138551 inhabitants.", "score": 1.5},
    {"title": "Seine", "text": "It lies on the Seine.", "score": 0.5},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture
def retriever(checkpoint: Path) -> SmallRetriever:
    embeddings = np.random.default_rng(0).standard_normal((8, 16), dtype=np.float32)
    return SmallRetriever(embeddings, load_checkpoint(checkpoint).encoder)


@pytest.fixture
def retriever_url(retriever: SmallRetriever) -> Iterator[str]:
    with served(retriever.app) as url:
        yield url


@contextlib.asynccontextmanager
async def generator(
    checkpoint: Path, url: str = "http://127.0.0.1:9", **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    made = {"retriever_retry_s": 0.2, "readiness_interval_s": 0.2, "torch_threads": 1, "max_new_tokens": 40}
    # Many at once are no overload here: they wait for as long as a busy machine takes.
    made |= {"max_concurrent": 64, "client_share": 1.0, "shed_after_ms": 0, **settings}
    app = create_app(GeneratorSettings(checkpoint=str(checkpoint), retriever_url=url, **made))
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


@pytest.fixture
async def http(checkpoint: Path, retriever_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with generator(checkpoint, retriever_url) as made:
        yield made


@pytest.fixture
async def alone(checkpoint: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A generator without a retriever: enough for passages that the caller brings."""
    async with generator(checkpoint) as made:
        yield made


def ask(**changes: Any) -> dict[str, Any]:
    return {"question": QUESTION, "passages": PASSAGES, "max_new_tokens": 8, **changes}


# --- answering ---------------------------------------------------------------------------------------------


async def test_an_answer_comes_with_its_evidence(http: httpx.AsyncClient, retriever: SmallRetriever) -> None:
    response = await http.post("/v1/answer", json={"question": QUESTION, "n_docs": 4, "max_new_tokens": 8})
    assert response.status_code == 200
    body = response.json()
    assert body["strategy"] == "token"
    assert body["index"] == retriever.index.model_dump()
    assert list(body["timings_ms"]) == ["encode", "retrieve", "assemble", "generate", "total"]
    [result] = body["results"]
    [answer] = result["answers"]
    assert len(result["documents"]) == len(answer["doc_posterior"]) == 4
    assert sum(answer["doc_posterior"]) == pytest.approx(1, abs=1e-6)
    assert sum(document["prior"] for document in result["documents"]) == pytest.approx(1)
    assert answer["probability"] == pytest.approx(math.exp(answer["log_prob"]))
    assert not result["abstained"]


async def test_document_scores_are_the_inner_products(http: httpx.AsyncClient, retriever: SmallRetriever) -> None:
    questions = [QUESTION, "who discovered oxygen"]
    vectors = (await http.post("/v1/encode", json={"question": questions})).json()["vectors"]
    body = (await http.post("/v1/search", json={"question": questions, "n_docs": 8})).json()
    for vector, result in zip(vectors, body["results"], strict=True):
        expected = np.sort(retriever.embeddings.astype(np.float64) @ np.array(vector))[::-1]
        priors = np.exp(expected - expected.max())
        priors /= priors.sum()
        documents = result["documents"]
        assert [document["score"] for document in documents] == pytest.approx(list(expected), rel=1e-5, abs=1e-5)
        assert [document["prior"] for document in documents] == pytest.approx(list(priors), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.7},
        {"early_stopping": True, "length_penalty": 2.0},
        {"early_stopping": "never", "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    ],
    ids=str,
)
async def test_the_text_is_what_transformers_generates(
    checkpoint: Path, alone: httpx.AsyncClient, options: dict[str, Any]
) -> None:
    tokenizer = RagTokenizer.from_pretrained(checkpoint)
    question = question_form(QUESTION, tokenizer.question_encoder)
    texts = [f"{p['title']} / {p['text']} // {question}" for p in PASSAGES]
    contexts = tokenizer.generator(texts, padding="max_length", max_length=96, return_tensors="pt")
    generated = (
        RagTokenForGeneration.from_pretrained(checkpoint)
        .eval()
        .generate(
            context_input_ids=contexts["input_ids"],
            context_attention_mask=contexts["attention_mask"],
            doc_scores=torch.tensor([[1.5, 0.5]]),
            n_docs=2,
            num_beams=3,
            max_length=9,
            **options,
        )
    )
    expected = tokenizer.batch_decode(generated, skip_special_tokens=True)[0].strip()
    body = (await alone.post("/v1/answer", json=ask(num_beams=3, **options))).json()
    assert body["results"][0]["answers"][0]["text"] == expected
    assert body["index"] is None
    assert [d["id"] for d in body["results"][0]["documents"]] == [7, None]


async def test_merged_requests_get_the_answers_they_would_get_alone(alone: httpx.AsyncClient) -> None:
    requests = [
        ask(question=f"{word} {i}", strategy=strategy, num_beams=beams, num_return_sequences=beams)
        for i, word in enumerate(["how many?", "who discovered oxygen and when was it", "tungsten", "where is it?"])
        for strategy in ("token", "sequence")
        for beams in (1, 2)
    ]

    async def answer(request: dict[str, Any]) -> dict[str, Any]:
        response = await alone.post("/v1/answer", json=request)
        assert response.status_code == 200
        return response.json()["results"][0]

    one_by_one = [await answer(request) for request in requests]
    together = await asyncio.gather(*map(answer, requests))
    for by_itself, merged in zip(one_by_one, together, strict=True):
        assert merged["question"] == by_itself["question"]
        assert [a["text"] for a in merged["answers"]] == [a["text"] for a in by_itself["answers"]]
        for ours, theirs in zip(merged["answers"], by_itself["answers"], strict=True):
            assert ours["log_prob"] == pytest.approx(theirs["log_prob"], abs=1e-3)
            assert ours["doc_posterior"] == pytest.approx(theirs["doc_posterior"], abs=1e-3)


@pytest.mark.parametrize("strategy", ["token", "sequence"])
async def test_a_seed_repeats_its_samples_whatever_runs_beside_it(alone: httpx.AsyncClient, strategy: str) -> None:
    def sampling(seed: int | None, question: str | list[str] = QUESTION) -> dict[str, Any]:
        return ask(question=question, strategy=strategy, do_sample=True, num_return_sequences=2, seed=seed)

    async def texts(request: dict[str, Any]) -> list[list[str]]:
        body = (await alone.post("/v1/answer", json=request)).json()
        return [[answer["text"] for answer in result["answers"]] for result in body["results"]]

    [quiet] = await texts(sampling(5))
    crowd = await asyncio.gather(*(texts(sampling(seed)) for seed in (5, 6, None)), texts(ask(strategy=strategy)))
    assert crowd[0] == [quiet]
    assert crowd[1] != [quiet]
    # The other questions of the same request have no part in it either.
    assert (await texts(sampling(5, ["who?", QUESTION])))[1] == quiet


async def test_several_questions_are_answered_in_order(http: httpx.AsyncClient) -> None:
    questions = ["how many?", "who discovered oxygen", QUESTION]
    body = (await http.post("/v1/answer", json={"question": questions, "max_new_tokens": 8})).json()
    assert [result["question"] for result in body["results"]] == questions


async def test_a_question_with_fewer_documents_has_its_prior_over_these(
    http: httpx.AsyncClient, retriever: SmallRetriever
) -> None:
    questions = ["how many?", "who discovered oxygen"]
    retriever.n_found = [1, 3]
    ragged = (await http.post("/v1/answer", json={"question": questions, "n_docs": 3, "max_new_tokens": 8})).json()
    retriever.n_found = [1]
    single = (await http.post("/v1/answer", json={"question": questions[0], "n_docs": 3, "max_new_tokens": 8})).json()
    assert [len(result["documents"]) for result in ragged["results"]] == [1, 3]
    assert ragged["results"][0]["documents"][0]["prior"] == 1
    assert ragged["results"][0]["answers"][0]["doc_posterior"] == [1]
    assert ragged["results"][0]["answers"][0]["text"] == single["results"][0]["answers"][0]["text"]


async def test_no_document_at_all_is_an_upstream_error(http: httpx.AsyncClient, retriever: SmallRetriever) -> None:
    retriever.n_found = [0]
    response = await http.post("/v1/answer", json={"question": QUESTION})
    assert (response.status_code, response.json()["error"]["code"]) == (424, "upstream_failed")
    found = await http.post("/v1/search", json={"question": QUESTION})
    assert found.json()["results"] == [{"question": QUESTION, "documents": []}]


async def test_provenance_none_leaves_the_posterior_out(alone: httpx.AsyncClient) -> None:
    body = (await alone.post("/v1/answer", json=ask(provenance="none"))).json()
    assert body["results"][0]["answers"][0]["doc_posterior"] is None


async def test_min_probability_withholds_what_is_less_probable(alone: httpx.AsyncClient) -> None:
    beams = {"num_beams": 4, "num_return_sequences": 4}
    every = (await alone.post("/v1/answer", json=ask(**beams))).json()["results"][0]["answers"]
    threshold = sorted(answer["probability"] for answer in every)[1]
    kept = (await alone.post("/v1/answer", json=ask(**beams, min_probability=threshold))).json()["results"][0]
    assert [a["text"] for a in kept["answers"]] == [a["text"] for a in every if a["probability"] >= threshold]
    assert len(kept["answers"]) == 3
    assert not kept["abstained"]
    none = (await alone.post("/v1/answer", json=ask(**beams, min_probability=1))).json()["results"][0]
    assert none["answers"] == []
    assert none["abstained"]


async def test_a_cut_passage_says_so(alone: httpx.AsyncClient) -> None:
    passages = [{"title": "long", "text": "Seine " * 300}, {"title": "short", "text": "Seine"}]
    body = (await alone.post("/v1/answer", json=ask(passages=passages))).json()
    assert [document["truncated"] for document in body["results"][0]["documents"]] == [True, False]


# --- scoring, encoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["token", "sequence"])
async def test_scoring_a_generated_answer_gives_its_probability_again(
    alone: httpx.AsyncClient, checkpoint: Path, strategy: str
) -> None:
    made = (await alone.post("/v1/answer", json=ask(strategy=strategy, max_new_tokens=2))).json()["results"][0]
    request = {"question": QUESTION, "passages": PASSAGES, "strategy": strategy}
    texts = [made["answers"][0]["text"], "no", "no"]
    scored = (await alone.post("/v1/score", json={**request, "answers": texts})).json()["results"][0]
    assert [answer["text"] for answer in scored["answers"]] == texts
    assert scored["answers"][1] == scored["answers"][2]
    assert scored["documents"] == made["documents"]
    assert all(sum(a["doc_posterior"]) == pytest.approx(1, abs=1e-6) for a in scored["answers"])


async def test_each_question_is_scored_with_its_own_answers(alone: httpx.AsyncClient) -> None:
    questions, answers = ["how many?", "who discovered oxygen"], [["2138551", "Scheele"], ["Joseph Priestley"]]

    async def score(question: Any, given: Any) -> list[list[float]]:
        request = {"question": question, "answers": given, "passages": PASSAGES}
        body = (await alone.post("/v1/score", json=request)).json()
        return [[answer["log_prob"] for answer in result["answers"]] for result in body["results"]]

    together = await score(questions, answers)
    for question, given, log_probs in zip(questions, answers, together, strict=True):
        [by_itself] = await score(question, given)
        assert log_probs == pytest.approx(by_itself, abs=1e-3)


@pytest.mark.parametrize("accept", ["application/json", "application/json;vectors=base64", ARROW_TYPE])
async def test_vectors_come_in_three_forms(alone: httpx.AsyncClient, checkpoint: Path, accept: str) -> None:
    response = await alone.post("/v1/encode", json={"question": [QUESTION, "who"]}, headers={"Accept": accept})
    vectors, metadata = vectors_from_wire(response.content, response.headers["content-type"])
    loaded = load_checkpoint(checkpoint)
    batch = loaded.question_tokenizer([QUESTION, "who"], padding=True, return_tensors="pt")
    expected = loaded.model.question_encoder(**batch).pooler_output.detach().numpy()
    assert vectors == pytest.approx(expected, abs=1e-5)
    assert metadata["encoder"] == loaded.encoder
    assert metadata["dimension"] == 16


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "request_", "status", "param"),
    [
        ("/v1/answer", ask(question="  "), 422, "question"),
        ("/v1/answer", ask(question="how many? " * 90), 422, "question"),
        ("/v1/answer", ask(question=["who?", "how many? " * 90]), 422, "question.1"),
        ("/v1/answer", ask(question=["who?"] * 33), 422, "question"),
        ("/v1/answer", ask(num_beams=17), 422, "num_beams"),
        ("/v1/answer", ask(max_new_tokens=41), 422, "max_new_tokens"),
        ("/v1/answer", {"question": QUESTION, "passages": PASSAGES, "min_new_tokens": 41}, 422, "min_new_tokens"),
        ("/v1/answer", {"question": QUESTION, "passages": PASSAGES}, 200, None),  # the default is lowered to the limit
        ("/v1/answer", ask(do_sample=True, num_return_sequences=33), 422, "num_return_sequences"),
        ("/v1/answer", ask(num_beams=2, num_return_sequences=3), 422, "num_return_sequences"),
        ("/v1/answer", ask(temperature=2.0), 422, "temperature"),
        ("/v1/answer", ask(length_penalty=2.0), 422, "length_penalty"),
        ("/v1/answer", ask(early_stopping="never"), 422, "early_stopping"),
        ("/v1/answer", ask(early_stopping=False), 200, None),
        ("/v1/answer", ask(early_stopping="always", num_beams=2), 422, "early_stopping"),
        ("/v1/answer", ask(early_stopping=0, num_beams=2), 422, "early_stopping"),
        ("/v1/answer", ask(repetition_penalty=0), 422, "repetition_penalty"),
        ("/v1/answer", ask(deduplicate=False), 422, "deduplicate"),
        ("/v1/answer", ask(n_docs=3), 422, "n_docs"),
        ("/v1/answer", ask(collection="other"), 422, "collection"),
        ("/v1/answer", ask(filter="id > 3"), 422, "filter"),
        ("/v1/answer", ask(search_params={"nprobe": 3}), 422, "search_params"),
        ("/v1/answer", {"question": QUESTION, "filter": "x" * 4001}, 422, "filter"),
        ("/v1/search", {"question": QUESTION, "filter": ""}, 422, "filter"),
        ("/v1/search", {"question": QUESTION, "search_params": {"nprobe": 0}}, 422, "search_params.nprobe"),
        (
            "/v1/score",
            {"question": QUESTION, "answers": ["a"], "passages": PASSAGES, "filter": "id > 3"},
            422,
            "filter",
        ),
        ("/v1/answer", ask(passages=PASSAGES * 26), 422, "passages"),
        ("/v1/answer", ask(passages=[]), 422, "passages"),
        ("/v1/answer", ask(passages=[{"text": "t", "score": 1e39}]), 422, "passages.0.score"),
        ("/v1/answer", ask(strategy="both"), 422, "strategy"),
        ("/v1/answer", ask(stop="."), 422, "stop"),
        ("/v1/answer", ask(timeout_ms=600_000), 200, None),
        ("/v1/answer", {"question": QUESTION, "n_docs": 51}, 422, "n_docs"),
        ("/v1/search", {"question": QUESTION, "n_docs": 51}, 422, "n_docs"),
        ("/v1/score", {"question": QUESTION, "answers": ["a"] * 33, "passages": PASSAGES}, 422, "answers"),
        ("/v1/score", {"question": QUESTION, "answers": ["x " * 400], "passages": PASSAGES}, 422, "answers"),
        ("/v1/score", {"question": [QUESTION], "answers": ["a"], "passages": PASSAGES}, 422, "answers"),
    ],
)
async def test_a_request_is_honoured_or_the_field_at_fault_is_named(
    alone: httpx.AsyncClient, path: str, request_: dict[str, Any], status: int, param: str | None
) -> None:
    response = await alone.post(path, json=request_)
    assert response.status_code == status
    if status != 200:
        assert response.json()["error"]["param"] == param


async def test_an_unknown_collection_is_the_callers_error(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/answer", json={"question": QUESTION, "collection": "nowhere"})
    assert (response.status_code, response.json()["error"]["param"]) == (404, "collection")


async def test_the_head_that_a_checkpoint_was_not_trained_for_is_refused(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, architectures=["RagSequenceForGeneration"])
    async with generator(tmp_path) as http:
        refused = await http.post("/v1/answer", json=ask(strategy="token"))
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "strategy")
        assert (await http.post("/v1/answer", json=ask())).json()["strategy"] == "sequence"
    async with generator(tmp_path, any_strategy=True) as http:
        assert (await http.post("/v1/answer", json=ask(strategy="token"))).json()["strategy"] == "token"


# --- the retriever's state ---------------------------------------------------------------------------------


async def test_an_index_of_another_encoder_is_refused_and_shows_in_readyz(
    checkpoint: Path, retriever: SmallRetriever, retriever_url: str
) -> None:
    retriever.index = retriever.index.model_copy(update={"encoder": "sha256-theirs"})
    async with generator(checkpoint, retriever_url) as http:
        response = await http.post("/v1/answer", json={"question": QUESTION})
        assert (response.status_code, response.json()["error"]["code"]) == (424, "encoder_mismatch")
        ready = await http.get("/readyz")
        assert ready.status_code == 503
        assert "sha256-theirs" in ready.json()["reasons"][0]
    async with generator(checkpoint, retriever_url, index_encoder="sha256-theirs") as http:
        assert (await http.post("/v1/answer", json={"question": QUESTION})).status_code == 200
        assert (await http.get("/readyz")).status_code == 200


async def test_readyz_says_why_and_recovers_by_itself(checkpoint: Path, retriever: SmallRetriever) -> None:
    port = free_port()

    async def readiness(http: httpx.AsyncClient, status: int) -> list[str]:
        for _ in range(50):
            ready = await http.get("/readyz")
            if ready.status_code == status:
                break
            await asyncio.sleep(0.1)
        assert ready.status_code == status
        return ready.json()["reasons"]

    async with generator(checkpoint, f"http://127.0.0.1:{port}") as http:
        assert "cannot be reached" in (await readiness(http, 503))[0]
        # Started and stopped off the event loop, which goes on asking meanwhile.
        server = served(retriever.app, port)
        await asyncio.to_thread(server.__enter__)
        assert await readiness(http, 200) == []
        retriever.not_ready = ["loading the index"]
        assert "loading the index" in (await readiness(http, 503))[0]
        retriever.not_ready = []
        assert await readiness(http, 200) == []
        await asyncio.to_thread(server.__exit__, None, None, None)
        assert "cannot be reached" in (await readiness(http, 503))[0]


async def test_readyz_says_when_something_else_listens_there(checkpoint: Path) -> None:
    async def anything(scope: Any, receive: Any, send: Any) -> None:
        await JSONResponse({"hello": "world"})(scope, receive, send)

    with served(anything) as url:
        async with generator(checkpoint, url) as http:
            assert "does not speak like a retriever" in (await http.get("/readyz")).json()["reasons"][0]


async def test_metrics_count_stages_outcomes_and_cut_passages(alone: httpx.AsyncClient) -> None:
    await alone.post("/v1/answer", json=ask(passages=[{"text": "Seine " * 300}]))
    await alone.post("/v1/answer", json=ask(min_probability=1))
    metrics = (await alone.get("/metrics")).text.splitlines()
    assert 'generator_stage_duration_seconds_count{stage="generate"} 2.0' in metrics
    assert 'generator_questions_total{outcome="answered"} 1.0' in metrics
    assert 'generator_questions_total{outcome="abstained"} 1.0' in metrics
    assert "generator_truncated_passages_total 1.0" in metrics


@pytest.mark.skipif(not int8.supported(), reason="this CPU has no instructions for products of int8")
async def test_a_generator_in_int8_answers_much_like_one_in_float32(checkpoint: Path, alone: httpx.AsyncClient) -> None:
    body = {"question": QUESTION, "passages": PASSAGES, "choices": ["Paris", "Lyon", "oxygen"]}
    async with generator(checkpoint, dtype="int8") as http:
        assert (await http.get("/info")).json()["model"]["dtype"] == "int8"
        found = (await http.post("/v1/answer", json=body)).json()["results"][0]["answers"]
    expected = (await alone.post("/v1/answer", json=body)).json()["results"][0]["answers"]
    exact = {answer["text"]: answer["log_prob"] for answer in expected}
    assert [answer["log_prob"] for answer in found] == pytest.approx([exact[a["text"]] for a in found], abs=0.5)


async def test_info_names_the_model_and_every_limit(alone: httpx.AsyncClient, checkpoint: Path) -> None:
    info = (await alone.get("/info")).json()
    assert info["service"] == "generator"
    assert info["device"] == "cpu"
    assert info["model"]["strategies"] == ["token", "sequence"]
    assert info["model"]["encoder"] == load_checkpoint(checkpoint).encoder
    assert info["limits"]["max_source_tokens"] == 96
    limits = {name for name in GeneratorSettings.model_fields if name.startswith("max_")}
    assert limits <= info["limits"].keys()
