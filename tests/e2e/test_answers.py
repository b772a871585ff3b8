"""A question to two real services on the demo: over HTTP, on the terminal, from Python."""

import json
import math

import httpx
import numpy as np
import pytest

from services.client import AsyncRagClient
from shared.errors import InvalidRequest
from tests.e2e.running import Up

pytestmark = pytest.mark.slow
QUESTION = "How many people live in Paris?"


def test_the_figure_of_the_corpus_comes_back_with_its_passage(up: Up, paris: str) -> None:
    response = httpx.post(f"{up.url}/v1/answer", json={"question": QUESTION}, timeout=60)
    assert response.status_code == 200
    (result,) = response.json()["results"]
    (answer,) = result["answers"]
    assert answer["text"] == paris
    assert 0.5 < answer["probability"] <= 1
    best = result["documents"][np.argmax(answer["doc_posterior"])]
    assert best["title"] == "Paris"
    assert paris in best["text"]


def test_prior_and_posterior_are_distributions_over_the_passages(up: Up) -> None:
    with up.client() as client:
        result = client.answer(QUESTION, n_docs=4, num_beams=3, num_return_sequences=3).results[0]
    assert len(result.documents) == 4
    assert math.isclose(sum(document.prior for document in result.documents), 1, abs_tol=1e-4)
    for answer in result.answers:
        assert answer.doc_posterior is not None
        assert math.isclose(sum(answer.doc_posterior), 1, abs_tol=1e-4)


@pytest.mark.parametrize("strategy", ["token", "sequence"])
def test_both_heads_answer_and_score_as_they_answer(up: Up, paris: str, strategy: str) -> None:
    with up.client() as client:
        answer = client.answer(QUESTION, strategy=strategy).results[0].answers[0]  # type: ignore[arg-type]
        scored = client.score(QUESTION, [answer.text], strategy=strategy).results[0].answers[0]  # type: ignore[arg-type]
    assert answer.text == paris
    assert math.isclose(answer.log_prob, scored.log_prob, abs_tol=1e-3)


def test_the_terminal_prints_the_figure_and_the_passage(up: Up, paris: str) -> None:
    ran = up.rag("ask", QUESTION)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(paris)
    assert "from Paris" in ran.stdout


def test_search_and_info_on_the_terminal(up: Up) -> None:
    found = json.loads(up.rag("search", QUESTION, "--n-docs", "3", "--json").stdout)
    assert len(found["results"][0]["documents"]) == 3
    shown = up.rag("info").stdout
    assert "generator" in shown
    assert "collection default" in shown
    assert shown.count("ready") >= 2


def test_a_question_below_the_least_probability_is_not_answered(up: Up) -> None:
    with up.client() as client:
        result = client.answer(QUESTION, min_probability=1.0).results[0]
    assert result.abstained
    assert result.documents


def test_batches_of_vectors_go_through_python_as_arrays(up: Up) -> None:
    questions = [QUESTION, "What is the symbol of gold?"]
    with up.client() as client:
        vectors = client.encode(questions).vectors
        found = client.retrieve(vectors, n_docs=5)
        searched = client.search(questions, n_docs=5)
        (collection,) = client.collections()
    assert found.doc_embeds is not None
    assert [ids.tolist() for ids in found.doc_ids] == [
        [document.id for document in result.documents] for result in searched.results
    ]
    for vector, embeds, scores in zip(np.asarray(vectors), found.doc_embeds, found.doc_scores, strict=True):
        np.testing.assert_allclose(embeds @ vector, scores, rtol=1e-4)
    assert collection.count > 10_000


async def test_the_async_client_answers_many_at_once(up: Up, paris: str) -> None:
    async with AsyncRagClient(up.url) as client:
        response = await client.answer([QUESTION, "how many people live in paris"])
    assert [result.answers[0].text for result in response.results] == [paris, paris]


def test_errors_arrive_as_their_class(up: Up) -> None:
    with up.client() as client, pytest.raises(InvalidRequest) as caught:
        client.answer(QUESTION, n_docs=10**9)
    assert caught.value.param == "n_docs"
    assert caught.value.request_id
