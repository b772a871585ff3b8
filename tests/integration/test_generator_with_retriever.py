"""Both services together: what crosses HTTP is what one process would compute."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import RagRetriever, RagTokenForGeneration, RagTokenizer

from generator_svc.app import create_app
from generator_svc.checkpoint import load_checkpoint
from generator_svc.contexts import question_form
from generator_svc.settings import GeneratorSettings
from retriever_svc.app import create_app as create_retriever
from retriever_svc.settings import RetrieverSettings
from tests.retriever_data import passage_table, random_embeddings, text, title
from tests.serving import served
from tests.tiny_checkpoint import save_tiny_checkpoint

QUESTIONS = ["How many people live in Paris?", "who discovered oxygen", "Where is Reykjavík?"]
EMBEDDINGS = random_embeddings(200, 16, dtype="float16", seed=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=5)


@pytest.fixture
async def http(checkpoint: Path, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    seed = tmp_path / "seed.parquet"
    pq.write_table(passage_table(EMBEDDINGS, encoder=load_checkpoint(checkpoint).encoder), seed)
    retriever = create_retriever(RetrieverSettings(data_dir=tmp_path / "data", seed=seed, device="cpu"))
    with served(retriever) as url:
        app = create_app(GeneratorSettings(checkpoint=str(checkpoint), retriever_url=url, torch_threads=1))
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://g") as http,
        ):
            assert (await http.get("/readyz")).json() == {"status": "ok", "reasons": []}
            yield http


async def test_scores_and_order_are_those_of_one_process(http: httpx.AsyncClient, checkpoint: Path) -> None:
    vectors = np.array((await http.post("/v1/encode", json={"question": QUESTIONS})).json()["vectors"])
    found = (await http.post("/v1/search", json={"question": QUESTIONS, "n_docs": 7})).json()
    for vector, result in zip(vectors, found["results"], strict=True):
        exact = EMBEDDINGS.astype(np.float64) @ vector
        best = np.argsort(-exact)[:7]
        assert [document["id"] for document in result["documents"]] == best.tolist()
        assert [document["score"] for document in result["documents"]] == pytest.approx(exact[best], rel=1e-6, abs=1e-6)
        assert [document["text"] for document in result["documents"]] == [text(i) for i in best]


@pytest.mark.parametrize("num_beams", [1, 3])
async def test_answers_are_those_of_transformers_in_one_process(
    http: httpx.AsyncClient, checkpoint: Path, num_beams: int
) -> None:
    request = {"question": QUESTIONS, "num_beams": num_beams, "max_new_tokens": 10, "strategy": "token"}
    results = (await http.post("/v1/answer", json=request)).json()["results"]

    model, tokenizer = (
        RagTokenForGeneration.from_pretrained(checkpoint).eval(),
        RagTokenizer.from_pretrained(checkpoint),
    )
    batch = tokenizer.question_encoder(QUESTIONS, padding=True, return_tensors="pt")
    vectors = model.question_encoder(**batch).pooler_output
    scores, best = (vectors @ torch.from_numpy(EMBEDDINGS.astype(np.float32)).T).topk(3)
    # transformers' retriever after its index search; questions in the form that transformers 4 gave them.
    retriever = RagRetriever.__new__(RagRetriever)
    retriever.config, retriever.generator_tokenizer = model.config, tokenizer.generator
    docs = [{"title": [title(i) for i in row], "text": [text(i) for i in row]} for row in best.tolist()]
    forms = [question_form(question, tokenizer.question_encoder) for question in QUESTIONS]
    ids, mask = retriever.postprocess_docs(docs, forms, None, 3, return_tensors="pt")
    generated = model.generate(
        context_input_ids=ids,
        context_attention_mask=mask,
        doc_scores=scores.detach(),
        num_beams=num_beams,
        max_length=11,
    )
    expected = [answer.strip() for answer in tokenizer.batch_decode(generated, skip_special_tokens=True)]
    assert [result["answers"][0]["text"] for result in results] == expected


@pytest.mark.parametrize(
    ("path", "more"),
    [("/v1/search", {}), ("/v1/answer", {"max_new_tokens": 4}), ("/v1/score", {"answers": [["a"], ["b"], ["c"]]})],
)
async def test_every_document_fulfils_the_filter(http: httpx.AsyncClient, path: str, more: dict[str, Any]) -> None:
    condition = f"id >= 150 AND title != '{title(170)}'"
    asked = {"question": QUESTIONS, "n_docs": 5, "filter": condition, **more}
    vectors = np.array((await http.post("/v1/encode", json={"question": QUESTIONS})).json()["vectors"])
    response = await http.post(path, json=asked)
    assert response.status_code == 200, response.text
    allowed = np.array([i for i in range(150, 200) if i != 170])
    for vector, result in zip(vectors, response.json()["results"], strict=True):
        best = allowed[np.argsort(-(EMBEDDINGS[allowed].astype(np.float64) @ vector))[:5]]
        assert [document["id"] for document in result["documents"]] == best.tolist()


@pytest.mark.parametrize(
    ("options", "param", "said"),
    [
        ({"filter": "yaer > 3"}, "filter", "yaer"),
        ({"filter": "id >"}, "filter", ""),
        ({"search_params": {"nprobe": 8}}, "search_params.nprobe", "has no nprobe"),
    ],
)
async def test_what_the_retriever_refuses_is_refused_by_the_name_of_the_field(
    http: httpx.AsyncClient, options: dict[str, Any], param: str, said: str
) -> None:
    for path, more in (("/v1/search", {}), ("/v1/answer", {}), ("/v1/score", {"answers": ["a"]})):
        response = await http.post(path, json={"question": QUESTIONS[0], **options, **more})
        assert response.status_code == 422, response.text
        assert response.json()["error"]["param"] == param
        assert said in response.json()["error"]["message"]


async def test_where_no_passage_fulfils_the_filter_a_search_is_empty_and_an_answer_refused(
    http: httpx.AsyncClient,
) -> None:
    asked = {"question": QUESTIONS[0], "filter": "id < 0"}
    found = await http.post("/v1/search", json=asked)
    assert found.json()["results"][0]["documents"] == []
    answered = await http.post("/v1/answer", json=asked)
    assert (answered.status_code, answered.json()["error"]["param"]) == (422, "filter")
