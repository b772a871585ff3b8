"""Answers as they are written: the events, what goes wrong before and after the first one, and who goes away."""

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from generator_svc.app import create_app
from generator_svc.settings import GeneratorSettings
from tests.serving import served
from tests.tiny_checkpoint import save_tiny_checkpoint

QUESTION = "How many people live in Paris?"
PASSAGES = [
    {"id": 7, "title": "Paris", "text": "Paris has 2138551 inhabitants.", "score": 1.5},
    {"title": "Seine", "text": "It lies on the Seine.", "score": 0.5},
]
# Many steps over many documents: decoding that lasts, after an instant of everything else.
LONG = {"passages": PASSAGES * 20, "min_new_tokens": 150, "max_new_tokens": 150}
NEVER_REACHED = "http://127.0.0.1:9"
Events = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3)


def settings(checkpoint: Path, **changes: Any) -> GeneratorSettings:
    made = {"retriever_retry_s": 0.2, "torch_threads": 1, **changes}
    return GeneratorSettings(checkpoint=str(checkpoint), retriever_url=NEVER_REACHED, **made)


@contextlib.asynccontextmanager
async def generator(checkpoint: Path, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(settings(checkpoint, **changes))
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


@pytest.fixture
async def http(checkpoint: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with generator(checkpoint) as made:
        yield made


def ask(**changes: Any) -> dict[str, Any]:
    most = {} if "choices" in changes else {"max_new_tokens": 12}
    return {"question": QUESTION, "passages": PASSAGES, **most, **changes}


def events_of(body: str) -> Events:
    """As the standard for server-sent events has it, as far as it is used here."""
    events = []
    for block in body.removesuffix("\n\n").split("\n\n"):
        event, data = block.split("\n")
        events.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


async def streamed(http: httpx.AsyncClient, **changes: Any) -> Events:
    response = await http.post("/v1/answer", json=ask(stream=True, **changes))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


async def metric(http: httpx.AsyncClient, name: str) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))


def without_times(response: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in response.items() if name != "timings_ms"}


async def test_openapi_names_every_event(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    content = document["paths"]["/v1/answer"]["post"]["responses"]["200"]["content"]
    told = content["text/event-stream"]["schema"]["properties"]
    names = {name for name, _ in await streamed(http, strategy="token")}
    assert {"documents", "token", "answer"} == names < set(told["event"]["enum"])
    assert set(told) == {"event", "data"}


# --- what is sent ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"min_new_tokens": 12}, *({"do_sample": True, "temperature": 1.5, "seed": seed} for seed in range(8))],
    ids=json.dumps,
)
async def test_the_pieces_make_up_the_answer(http: httpx.AsyncClient, options: dict[str, Any]) -> None:
    (first, documents), *pieces, (last, answer) = await streamed(http, strategy="token", **options)
    assert (first, last) == ("documents", "answer")
    assert {event for event, _ in pieces} == {"token"}
    text = answer["results"][0]["answers"][0]["text"]
    assert text
    assert "".join(piece["text"] for _, piece in pieces) == text
    assert documents["documents"] == answer["results"][0]["documents"]


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "token", "num_beams": 3},
        {"strategy": "token", "do_sample": True, "num_return_sequences": 2, "seed": 1},
        {"strategy": "sequence"},
        {"strategy": "sequence", "num_beams": 3, "decoding": "fast"},
    ],
    ids=json.dumps,
)
async def test_where_rows_compete_nothing_is_certain_before_the_answer(
    http: httpx.AsyncClient, options: dict[str, Any]
) -> None:
    events = await streamed(http, **options)
    assert [event for event, _ in events] == ["documents", "answer"]


async def test_choices_are_not_written_and_so_not_streamed_in_pieces(http: httpx.AsyncClient) -> None:
    events = await streamed(http, choices=["2138551", "the Seine"])
    assert [event for event, _ in events] == ["documents", "answer"]


@pytest.mark.parametrize(
    "options", [{}, {"strategy": "sequence", "num_beams": 3, "num_return_sequences": 2, "provenance": "token"}]
)
async def test_the_last_event_is_the_response_that_is_given_without_a_stream(
    http: httpx.AsyncClient, options: dict[str, Any]
) -> None:
    *_, (_, answer) = await streamed(http, **options)
    plain = await http.post("/v1/answer", json=ask(**options))
    assert without_times(answer) == without_times(plain.json())


# --- what goes wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"question": [QUESTION]}, 422, "stream"),
        ({"num_beams": 17}, 422, "num_beams"),
        ({"n_docs": 3}, 422, "n_docs"),
        ({"decoding": "fast"}, 422, "decoding"),
        ({"deduplicate": False}, 422, "deduplicate"),
        ({"choices": ["a", "b"], "num_beams": 2}, 422, "num_beams"),
        ({"choices": ["a", "b"], "max_new_tokens": 3}, 422, "max_new_tokens"),
        ({"choices": ["a", "a"]}, 422, "choices.1"),
        ({"choices": []}, 422, "choices"),
        ({"provenance": "tokens"}, 422, "provenance"),
        ({"seed": 3}, 422, "seed"),
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_refused_is_an_ordinary_error_that_names_the_field(
    http: httpx.AsyncClient, stream: bool, changes: dict[str, Any], status: int, param: str
) -> None:
    if not stream and changes == {"question": [QUESTION]}:
        pytest.skip("several questions are refused with stream=true only")
    request = {"question": QUESTION, "passages": PASSAGES, "strategy": "token", **changes, "stream": stream}
    response = await http.post("/v1/answer", json=request)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["param"] == param


async def test_a_failure_before_the_first_event_is_an_ordinary_error(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/answer", json={"question": QUESTION, "stream": True})
    assert response.status_code == 424
    assert response.json()["error"]["code"] == "upstream_failed"


async def test_a_failure_after_the_first_event_is_an_error_event(tmp_path: Path) -> None:
    broken = save_tiny_checkpoint(tmp_path)
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("final_logits_bias"))
    weights[name].fill_(float("nan"))  # as an overflow in float16 leaves it
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    async with generator(broken) as http:
        *_, (event, data) = await streamed(http)
        plain = await http.post("/v1/answer", json=ask())
    assert event == "error"
    assert plain.status_code == 500
    assert data["error"].keys() == plain.json()["error"].keys()
    assert data["error"]["code"] == plain.json()["error"]["code"]
    assert data["error"]["request_id"]


async def test_a_deadline_that_passes_while_decoding_is_a_504_or_an_error_event(http: httpx.AsyncClient) -> None:
    plain = await http.post("/v1/answer", json=ask(**LONG, num_beams=8, timeout_ms=250))
    assert (plain.status_code, plain.json()["error"]["code"]) == (504, "deadline_exceeded")
    (first, _), *_, (last, error) = await streamed(http, **LONG, num_beams=8, timeout_ms=250)
    assert (first, last) == ("documents", "error")
    assert error["error"]["code"] == "deadline_exceeded"
    await until_nothing_runs(http)


async def until_nothing_runs(http: httpx.AsyncClient, within_s: float = 5.0) -> None:
    until_s = time.monotonic() + within_s
    while await metric(http, "generator_running_questions"):
        assert time.monotonic() < until_s, "the question still runs"
        await asyncio.sleep(0.01)
    assert await metric(http, "generator_decode_tokens") == 0
    assert await metric(http, "worker_queue_depth") == 0


# --- over a real connection --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    with served(create_app(settings(checkpoint))) as made:
        yield made


async def test_pieces_arrive_while_the_rest_is_being_written(url: str) -> None:
    async with (
        httpx.AsyncClient(base_url=url) as http,
        http.stream("POST", "/v1/answer", json=ask(**LONG, stream=True)) as response,
    ):
        lines = response.aiter_lines()
        async for line in lines:
            if line == "event: token":
                break
        assert await metric(http, "generator_running_questions") == 1  # so the answer is not there yet
        events = [line async for line in lines if line.startswith("event: ")]
    assert events[-1] == "event: answer"
    assert events.count("event: token") > 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_its_place(url: str, stream: bool) -> None:
    async with httpx.AsyncClient(base_url=url) as http:
        asked = asyncio.create_task(_read_all(url, ask(**LONG, stream=stream)))
        until_s = time.monotonic() + 5
        while not await metric(http, "generator_running_questions"):
            assert time.monotonic() < until_s, "the question never ran"
            await asyncio.sleep(0.005)
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asked
        gone_s = time.monotonic()
        await until_nothing_runs(http)
        freed_s = time.monotonic() - gone_s
        began_s = time.monotonic()
        assert (await http.post("/v1/answer", json=ask(**LONG), timeout=60)).status_code == 200
        assert freed_s < (time.monotonic() - began_s) / 2  # long before the answer would have been there


async def _read_all(url: str, request: dict[str, Any]) -> None:
    async with httpx.AsyncClient(base_url=url) as http, http.stream("POST", "/v1/answer", json=request) as response:
        async for _ in response.aiter_bytes():
            pass


# --- what the model knows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "token"},
        {"strategy": "token", "num_beams": 3, "num_return_sequences": 3},
        {"strategy": "sequence", "num_beams": 3, "num_return_sequences": 2},
        {"strategy": "sequence", "do_sample": True, "num_return_sequences": 2, "seed": 5},
    ],
    ids=json.dumps,
)
async def test_shares_of_tokens_sum_to_the_answers_and_posteriors_to_one(
    http: httpx.AsyncClient, options: dict[str, Any]
) -> None:
    body = (await http.post("/v1/answer", json=ask(provenance="token", **options))).json()
    for answer in body["results"][0]["answers"]:
        tokens = answer["tokens"]
        assert sum(token["log_prob"] for token in tokens) == pytest.approx(answer["log_prob"], abs=1e-4)
        for token in tokens:
            assert sum(token["doc_posterior"]) == pytest.approx(1, abs=1e-5)
        assert tokens[-1]["doc_posterior"] == pytest.approx(answer["doc_posterior"], abs=1e-6)
        text = "".join(token["text"] for token in tokens if token["text"] not in {"<s>", "</s>", "<pad>", "<unk>"})
        if "\N{REPLACEMENT CHARACTER}" not in text:
            assert text.strip() == answer["text"]


CHOICES = ["2138551", "the Seine", "it is not known", "Carl Wilhelm Scheele"]


@pytest.mark.parametrize("strategy", ["token", "sequence"])
async def test_choice_probabilities_are_the_softmax_of_the_scores(http: httpx.AsyncClient, strategy: str) -> None:
    scored = await http.post(
        "/v1/score", json={"question": QUESTION, "passages": PASSAGES, "answers": CHOICES, "strategy": strategy}
    )
    log_probs = {answer["text"]: answer["log_prob"] for answer in scored.json()["results"][0]["answers"]}
    weights = {text: math.exp(log_prob - max(log_probs.values())) for text, log_prob in log_probs.items()}
    request = {"question": QUESTION, "passages": PASSAGES, "choices": CHOICES, "strategy": strategy}
    [result] = (await http.post("/v1/answer", json=request)).json()["results"]
    chosen = [answer["choice_probability"] for answer in result["answers"]]
    assert sum(chosen) == pytest.approx(1)
    assert chosen == sorted(chosen, reverse=True)
    for answer in result["answers"]:
        expected = weights[answer["text"]] / sum(weights.values())
        assert answer["choice_probability"] == pytest.approx(expected, rel=1e-4)
        assert answer["log_prob"] == pytest.approx(log_probs[answer["text"]], abs=1e-4)


async def test_min_probability_is_held_to_the_share_among_the_choices(http: httpx.AsyncClient) -> None:
    request = {"question": QUESTION, "passages": PASSAGES, "choices": CHOICES}
    [every] = (await http.post("/v1/answer", json=request)).json()["results"]
    best, second = (answer["choice_probability"] for answer in every["answers"][:2])
    between = (best + second) / 2
    [kept] = (await http.post("/v1/answer", json={**request, "min_probability": between})).json()["results"]
    assert [answer["text"] for answer in kept["answers"]] == [every["answers"][0]["text"]]
    assert every["answers"][0]["probability"] < between  # among all that could be said, it is improbable
    above = min(1.0, best + 1e-6)
    [none] = (await http.post("/v1/answer", json={**request, "min_probability": above})).json()["results"]
    assert none["abstained"]
    assert none["answers"] == []
