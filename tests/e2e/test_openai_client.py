"""The official `openai` client, as it stands in people's code, against both services: without keys and with them."""

import base64
import math
import shutil
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.e2e.running import Up

pytestmark = pytest.mark.slow

KEY = "reader-1234"
KEYS = {
    "GENERATOR_API_KEY": KEY,
    "GENERATOR_ADMIN_KEY": "admin-1234",
    "GENERATOR_MODEL_NAME": "acme/rag",  # as of a hub id: a slash in the path
    "RETRIEVER_API_KEY": "reader-5678",
    "RETRIEVER_ADMIN_KEY": "admin-5678",
    "GENERATOR_RETRIEVER_API_KEY": "reader-5678",
}
QUESTION = "How many people live in Paris?"


@pytest.fixture(scope="module")
def locked_up(up: Up, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Both services with keys, and the model under another name."""
    running = Up.start(shutil.copytree(data_dir, tmp_path_factory.mktemp("locked") / "data"), **KEYS)
    try:
        yield running.wait_until_ready()
    finally:
        running.stop()


@pytest.fixture(params=["open", "locked"])
def base_url(request: pytest.FixtureRequest) -> str:
    running: Up = request.getfixturevalue("up" if request.param == "open" else "locked_up")
    return f"{running.url}/v1"


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture
async def async_client(base_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=base_url, api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def ask(client: openai.OpenAI, model: str, question: str = QUESTION, **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], **options)


def extension(of: Any) -> dict[str, Any]:
    found = (of.model_extra or {})["rag"]
    assert isinstance(found, dict)
    return found


# --- chat --------------------------------------------------------------------------------------------------


def test_it_answers_and_cites(client: openai.OpenAI, model: str, paris: str) -> None:
    completion = ask(client, model, extra_body={"rag": {"n_docs": 3}})
    assert isinstance(completion, ChatCompletion)
    [choice] = completion.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", paris, "stop")
    evidence = extension(choice)
    assert math.exp(evidence["log_prob"]) == pytest.approx(evidence["probability"])
    documents = evidence["documents"]
    assert len(documents) == 3
    assert documents[0]["title"] == "Paris"
    assert isinstance(documents[0]["id"], int)
    assert paris in documents[0]["text"]
    for share in ("prior", "posterior"):
        assert sum(document[share] for document in documents) == pytest.approx(1, abs=1e-4)
    assert extension(completion)["index"]["collection"] == "default"


def test_the_last_message_of_the_user_is_the_question(client: openai.OpenAI, model: str, paris: str) -> None:
    first = ask(client, model, "What is the symbol of gold?")
    messages: list[Any] = [
        {"role": "system", "content": "You are a geographer."},
        {"role": "user", "content": "What is the symbol of gold?"},
        first.choices[0].message,  # as people send it back
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ]
    completion = client.chat.completions.create(model=model, messages=messages)
    assert completion.choices[0].message.content == paris
    assert extension(completion)["messages_not_read"] == 3


def test_usage_counts_what_was_read_and_written(client: openai.OpenAI, model: str) -> None:
    one, two = (ask(client, model, extra_body={"rag": {"n_docs": n, "provenance": "token"}}) for n in (1, 2))
    assert two.usage.prompt_tokens > one.usage.prompt_tokens > len(QUESTION.split())
    for completion in (one, two):
        assert completion.usage.completion_tokens == len(extension(completion.choices[0])["tokens"])
        assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


def test_token_probabilities_belong_to_the_text(client: openai.OpenAI, model: str, paris: str) -> None:
    [choice] = ask(client, model, logprobs=True).choices
    content = choice.logprobs.content
    assert "".join(token.token for token in content).strip() == paris
    assert bytes(byte for token in content for byte in token.bytes).decode().strip() == paris
    # the end of the answer has a share of its own
    assert sum(token.logprob for token in content) >= extension(choice)["log_prob"] - 1e-5


def test_n_answers_come_best_first(client: openai.OpenAI, model: str) -> None:
    completion = ask(client, model, n=3)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in completion.choices}) == 3
    log_probs = [extension(choice)["log_prob"] for choice in completion.choices]
    assert log_probs == sorted(log_probs, reverse=True)


def test_a_seed_makes_what_is_drawn_repeatable(client: openai.OpenAI, model: str) -> None:
    drawn = [
        [c.message.content for c in ask(client, model, "Who lives in Narnia?", n=4, temperature=2, seed=seed).choices]
        for seed in (-5, -5, 6)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_answer_that_is_cut_says_so(client: openai.OpenAI, model: str) -> None:
    completion = ask(client, model, max_tokens=2)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens <= 2


def test_it_can_refuse_to_answer(client: openai.OpenAI, model: str) -> None:
    unsure = {"rag": {"min_probability": 1.0}}
    [choice] = ask(client, model, "How many people live in Narnia?", extra_body=unsure).choices
    assert choice.message.content is None
    assert "do not know" in choice.message.refusal
    streamed = list(ask(client, model, "How many people live in Narnia?", extra_body=unsure, stream=True))
    assert "".join(c.delta.content or "" for chunk in streamed for c in chunk.choices) == ""
    assert "".join(c.delta.refusal or "" for chunk in streamed for c in chunk.choices) == choice.message.refusal


def test_own_passages_are_answered_from(client: openai.OpenAI, model: str) -> None:
    passages = [{"title": "Narnia", "text": "Narnia is a city. The population of the place is 4,711."}]
    completion = ask(client, model, "How many people live in Narnia?", extra_body={"rag": {"passages": passages}})
    assert completion.choices[0].message.content == "4,711"
    assert extension(completion)["index"] is None


def test_values_that_change_nothing_are_taken(client: openai.OpenAI, model: str, paris: str) -> None:
    nothing: dict[str, Any] = {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "tools": [], "n": 1}
    nothing |= {"response_format": {"type": "text"}, "store": False, "user": "u-1", "top_p": 1, "temperature": 0}
    assert ask(client, model, **nothing).choices[0].message.content == paris


# --- streaming ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"n": 2}, {"logprobs": True}, {"temperature": 0.5, "seed": 1}], ids=str)
def test_a_stream_makes_up_the_completion(client: openai.OpenAI, model: str, options: dict[str, Any]) -> None:
    whole = ask(client, model, **options)
    chunks: list[ChatCompletionChunk] = list(
        ask(client, model, stream=True, stream_options={"include_usage": True}, **options)
    )
    assert {(chunk.object, chunk.id, chunk.model) for chunk in chunks} == {
        ("chat.completion.chunk", chunks[0].id, whole.model)
    }
    assert extension(chunks[0])["documents"][0]["title"] == "Paris"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        assert extension(parts[-1])["log_prob"] == pytest.approx(extension(choice)["log_prob"], abs=1e-4)
        assert (parts[-1].logprobs is None) == (choice.logprobs is None)


def test_the_text_comes_as_it_is_written(client: openai.OpenAI, model: str, paris: str) -> None:
    chunks = list(ask(client, model, stream=True))
    pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert len(pieces) > 1
    assert "".join(pieces) == paris


def test_the_streaming_helper_of_the_client_works(client: openai.OpenAI, model: str, paris: str) -> None:
    with client.chat.completions.stream(model=model, messages=[{"role": "user", "content": QUESTION}]) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == paris


async def test_the_asynchronous_client(async_client: openai.AsyncOpenAI, paris: str) -> None:
    model = (await async_client.models.list()).data[0].id
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    assert (await async_client.chat.completions.create(model=model, messages=messages)).choices[0].message.content == (
        paris
    )
    stream = await async_client.chat.completions.create(model=model, messages=messages, stream=True)
    pieces = [choice.delta.content or "" async for chunk in stream for choice in chunk.choices]
    assert "".join(pieces) == paris
    assert len((await async_client.embeddings.create(model=model, input=[QUESTION, "?"])).data) == 2
    with pytest.raises(openai.BadRequestError):
        await async_client.chat.completions.create(model=model, messages=messages, stop="x")


# --- embeddings and models ---------------------------------------------------------------------------------


def test_embeddings_are_the_question_vectors(client: openai.OpenAI, model: str, base_url: str, up: Up) -> None:
    texts = [QUESTION, "What is the symbol of gold?"]
    response = client.embeddings.create(model=model, input=texts)  # base64 on the wire: the client's default
    floats = client.embeddings.create(model=model, input=texts, encoding_format="float")
    with up.client() as rag:
        expected = rag.encode(texts)
    for ours, same, vector in zip(response.data, floats.data, expected.vectors, strict=True):
        assert ours.embedding == pytest.approx(vector, abs=1e-6)
        assert same.embedding == pytest.approx(vector, abs=1e-6)
    assert [embedding.index for embedding in response.data] == [0, 1]
    assert response.usage == floats.usage
    assert extension(response) == {"encoder": expected.encoder, "dimension": expected.dimension}
    assert client.embeddings.create(model=model, input=QUESTION, dimensions=expected.dimension).data[0].index == 0


def test_base64_is_of_little_endian_float32(client: openai.OpenAI, model: str) -> None:
    raw = client.embeddings.with_raw_response.create(model=model, input=QUESTION, encoding_format="base64")
    encoded = raw.http_response.json()["data"][0]["embedding"]
    vector = client.embeddings.create(model=model, input=QUESTION, encoding_format="float").data[0].embedding
    data = base64.b64decode(encoded)
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == pytest.approx(vector, abs=1e-6)


def test_usage_of_embeddings_counts_tokens(client: openai.OpenAI, model: str) -> None:
    def tokens(given: str | list[str]) -> int:
        return client.embeddings.create(model=model, input=given).usage.prompt_tokens

    assert tokens([QUESTION, "?"]) == tokens(QUESTION) + tokens("?")
    assert tokens("?") == 3  # [CLS] ? [SEP]


def test_the_model_is_listed_and_described(client: openai.OpenAI, model: str) -> None:
    described = client.models.retrieve(model)
    assert described == client.models.list().data[0]
    assert (described.id, described.object) == (model, "model")
    assert extension(described)["strategies"]


# --- errors ------------------------------------------------------------------------------------------------

PASSAGES = [{"text": "x"}]
TOOL_RESULT = {"role": "tool", "content": "x", "tool_call_id": "1"}
AUDIO = {"role": "user", "content": [{"type": "input_audio"}]}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
    ({"stop": ["\n"]}, "stop", "unsupported_parameter"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"logprobs": True, "top_logprobs": 3}, "top_logprobs", "unsupported_parameter"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
    ({"extra_body": {"typo": 1}}, "typo", "unsupported_parameter"),
    ({"extra_body": {"rag": {"typo": 1}}}, "rag.typo", "unsupported_parameter"),
    ({"extra_body": {"rag": {"n_docs": 10_000}}}, "rag.n_docs", "bad_request"),
    ({"extra_body": {"rag": {"n_docs": "5"}}}, "rag.n_docs", "bad_request"),
    ({"extra_body": {"rag": {"top_k": 5}}, "temperature": 0}, "rag.top_k", "bad_request"),
    ({"extra_body": {"rag": {"num_beams": 4}}, "temperature": 1}, "rag.num_beams", "bad_request"),
    ({"extra_body": {"rag": {"passages": PASSAGES, "n_docs": 2}}}, "rag.n_docs", "bad_request"),
    ({"extra_body": {"rag": {"timeout_ms": 600_001}}}, "rag.timeout_ms", "bad_request"),
    ({"max_tokens": 100_000}, "max_tokens", "bad_request"),
    ({"max_completion_tokens": 100_000}, "max_completion_tokens", "bad_request"),
    ({"temperature": 2.5}, "temperature", "bad_request"),
    ({"n": 100}, "n", "bad_request"),
    ({"messages": [{"role": "user", "content": " "}]}, "messages", "bad_request"),
    ({"messages": [TOOL_RESULT]}, "messages.0.tool_call_id", "unsupported_parameter"),
    ({"messages": [AUDIO]}, "messages.0.content.0.type", "bad_request"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "param", "code"), REFUSED, ids=[str(case[0])[:50] for case in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_name(
    client: openai.OpenAI, model: str, options: dict[str, Any], param: str, code: str
) -> None:
    request: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": QUESTION}], **options}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**request, stream=stream)
        error = refused.value
        assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
        assert param in error.message
        assert error.request_id


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"input": [[1, 2], [3]]}, "input", "unsupported_parameter"),
        ({"input": [1, 2]}, "input", "unsupported_parameter"),
        ({"input": ""}, "input", "bad_request"),
        ({"input": []}, "input", "bad_request"),
        ({"input": ["?"] * 33}, "input", "bad_request"),
        ({"input": "?", "dimensions": 7}, "dimensions", "bad_request"),
        ({"input": "?", "extra_body": {"typo": 1}}, "typo", "unsupported_parameter"),
    ],
    ids=str,
)
def test_embeddings_refuse_by_name(
    client: openai.OpenAI, model: str, options: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model=model, **options)
    assert (refused.value.param, refused.value.code) == (param, code)


def test_another_model_is_not_found(client: openai.OpenAI, model: str) -> None:
    for call in (
        lambda: ask(client, "gpt-4o"),
        lambda: ask(client, "gpt-4o", stream=True),
        lambda: client.embeddings.create(model="gpt-4o", input="?"),
        lambda: client.models.retrieve("gpt-4o"),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            call()
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
        assert model in refused.value.message  # what is served instead


def test_a_collection_that_is_not_there_is_not_found(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        ask(client, model, extra_body={"rag": {"collection": "nowhere"}})
    assert (refused.value.code, refused.value.param) == ("not_found", "rag.collection")


@pytest.mark.parametrize("key", ["wrong", "admin-5678"])
def test_a_wrong_key_is_an_authentication_error(locked_up: Up, key: str) -> None:
    with openai.OpenAI(base_url=f"{locked_up.url}/v1", api_key=key, max_retries=0) as client:
        for call in (
            lambda: ask(client, "acme/rag"),
            lambda: ask(client, "acme/rag", stream=True),
            lambda: client.embeddings.create(model="acme/rag", input="?"),
            client.models.list,
        ):
            with pytest.raises(openai.AuthenticationError) as refused:
                call()
            assert refused.value.code == "unauthorized"
            assert "Bearer" in refused.value.message
