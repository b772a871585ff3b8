"""OpenAI's shapes where something goes wrong, driven by the official client over a real socket; and their fields."""

import asyncio
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import EmbeddingCreateParams
from openai.types.chat.completion_create_params import CompletionCreateParamsBase, CompletionCreateParamsStreaming

from generator_svc.app import create_app
from generator_svc.openai.chat import read_chat
from generator_svc.openai.schemas import ChatRequest, EmbeddingRequest, RagOptions
from generator_svc.settings import GeneratorSettings
from shared.schemas import AnswerRequest
from tests.serving import free_port, served
from tests.tiny_checkpoint import save_tiny_checkpoint

PASSAGES = [{"title": "Paris", "text": "Paris has 2138551 inhabitants."}]
OWN = {"rag": {"passages": PASSAGES}}
LONG = {"rag": {"passages": PASSAGES * 20, "min_new_tokens": 150}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture
def url(checkpoint: Path) -> Iterator[str]:
    """A generator that lets one request wait, without a retriever."""
    settings = GeneratorSettings(
        checkpoint=str(checkpoint),
        model_name="tiny",
        retriever_url=f"http://127.0.0.1:{free_port()}",
        retriever_retry_s=0.1,
        torch_threads=1,
        max_queue=1,
        max_questions=1,
        max_decode_tokens=1,  # one answer at a time
    )
    with served(create_app(settings)) as found:
        yield f"{found}/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="-", max_retries=0) as made:
        yield made


def ask(client: Any, **options: Any) -> Any:
    messages = [{"role": "user", "content": "How many people live in Paris?"}]
    return client.chat.completions.create(model="tiny", messages=messages, **options)


async def test_a_full_queue_is_a_rate_limit(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0) as client:
        asked = [ask(client, max_tokens=150, extra_body=LONG) for _ in range(12)]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
    limited = [outcome for outcome in outcomes if isinstance(outcome, openai.RateLimitError)]
    assert limited
    assert {error.code for error in limited} == {"overloaded"}
    assert all(int(error.response.headers["Retry-After"]) >= 1 for error in limited)
    assert any(not isinstance(outcome, BaseException) for outcome in outcomes)


def test_a_missed_deadline_is_a_server_error(client: openai.OpenAI) -> None:
    hurried = {"rag": {**LONG["rag"], "timeout_ms": 1}}
    with pytest.raises(openai.InternalServerError) as late:
        ask(client, max_tokens=150, extra_body=hurried)
    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")


@pytest.mark.parametrize("stream", [False, True])
def test_a_retriever_out_of_reach_says_so(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.APIStatusError, match="cannot be reached") as failed:
        ask(client, stream=stream)
    assert (failed.value.status_code, failed.value.code) == (424, "upstream_failed")


def test_what_fails_under_way_is_raised_by_the_stream(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("generator_svc.engine.engine.RagEngine.step", broken)
    stream = ask(client, stream=True, extra_body=OWN)
    with pytest.raises(openai.APIError, match="the log has the trace") as failed:
        list(stream)
    assert failed.value.code == "inference_failed"


def test_a_stream_is_events_of_data_that_end_with_done(url: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "stream": True, **OWN}
    response = httpx.post(f"{url}/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events[-1] == "data: [DONE]"


def test_a_body_that_is_no_json_is_refused_as_everywhere(url: str) -> None:
    assert httpx.post(f"{url}/chat/completions", content=b"{", headers={"Content-Type": "application/json"}).json()[
        "error"
    ]["code"] == ("bad_request")
    assert httpx.post(f"{url}/embeddings", content=b"x", headers={"Content-Type": "text/plain"}).status_code == 415


# --- fields ------------------------------------------------------------------------------------------------


def fields_of(*params: Any) -> set[str]:
    return {name for kind in params for name in typing.get_type_hints(kind)} | {
        name for kind in params for name in inspect.get_annotations(kind)
    }


def test_every_field_of_the_official_client_is_known() -> None:
    assert fields_of(CompletionCreateParamsBase, CompletionCreateParamsStreaming) <= ChatRequest.model_fields.keys()
    assert fields_of(EmbeddingCreateParams) <= EmbeddingRequest.model_fields.keys()


def test_every_option_of_an_answer_can_be_given() -> None:
    """Of `AnswerRequest`, OpenAI's fields stand for some; `choices` are a matter of `/v1/answer`."""
    through_openai = {"question", "stream", "num_return_sequences", "max_new_tokens", "do_sample"}
    through_openai |= {"temperature", "top_p", "seed", "choices"}
    assert AnswerRequest.model_fields.keys() - through_openai == RagOptions.model_fields.keys()


def test_options_mean_the_same_as_in_an_answer() -> None:
    rag = {"strategy": "sequence", "n_docs": 3, "num_beams": 4, "length_penalty": 0.5, "min_probability": 0.1}
    rag |= {"early_stopping": "never", "repetition_penalty": 1.2}
    rag |= {"no_repeat_ngram_size": 2, "min_new_tokens": 2, "deduplicate": False, "decoding": "fast"}
    asked = {"model": "m", "messages": [{"role": "user", "content": "Who?"}], "n": 2, "max_tokens": 9, "rag": rag}
    question = read_chat(ChatRequest.model_validate(asked)).question
    expected = {"question": "Who?", "num_return_sequences": 2, "max_new_tokens": 9, "provenance": "token", **rag}
    assert question == AnswerRequest.model_validate(expected)
    assert question.model_fields_set == expected.keys()


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, {"do_sample": False}),
        ({"temperature": 0, "top_p": 0.5, "seed": 3}, {"do_sample": False}),
        ({"temperature": 1}, {"do_sample": True, "temperature": 1.0}),
        ({"top_p": 0.5, "seed": -1}, {"do_sample": True, "top_p": 0.5, "seed": 2**63 - 1}),
        ({"rag": {"top_k": 7}}, {"do_sample": True, "top_k": 7}),
        ({"temperature": 0.2, "n": 3}, {"do_sample": True, "num_return_sequences": 3, "num_beams": 1}),
        ({"n": 3}, {"do_sample": False, "num_return_sequences": 3, "num_beams": 3}),
        ({"n": 3, "rag": {"num_beams": 5}}, {"num_return_sequences": 3, "num_beams": 5}),
    ],
    ids=str,
)
def test_nothing_is_drawn_unless_it_is_asked_for(options: dict[str, Any], sampling: dict[str, Any]) -> None:
    asked = {"model": "m", "messages": [{"role": "user", "content": "Who?"}], **options}
    question = read_chat(ChatRequest.model_validate(asked)).question
    assert {name: getattr(question, name) for name in sampling} == sampling
