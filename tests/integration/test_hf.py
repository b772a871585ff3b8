"""transformers' models over the retriever service, beside transformers' own retriever over the same passages."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RagConfig, RagRetriever, RagTokenForGeneration, RagTokenizer
from transformers.models.rag.retrieval_rag import CustomHFIndex

from generator_svc.checkpoint import load_checkpoint
from services.client import Unreachable
from services.hf import RemoteRagRetriever
from shared.errors import EncoderMismatch, InvalidRequest, NotFound, RagError, Unauthorized
from tests.retriever_data import passage_table, random_embeddings, text, title
from tests.retriever_process import RetrieverProcess
from tests.serving import free_port
from tests.tiny_checkpoint import save_tiny_checkpoint

QUESTIONS = ["How many people live in Paris", "who discovered oxygen", "Where is Reykjavík", "what", "a b c"]
EMBEDDINGS = random_embeddings(60, 16, seed=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=5)


@pytest.fixture(scope="module")
def service(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Takes three vectors at once, or twelve documents."""
    folder = tmp_path_factory.mktemp("retriever")
    pq.write_table(passage_table(EMBEDDINGS, encoder=load_checkpoint(checkpoint).encoder), folder / "seed.parquet")
    limits = {"max_batch_vectors": 3, "max_documents": 12}
    retriever = RetrieverProcess(folder / "data", seed=folder / "seed.parquet", api_key="key", **limits).start()
    yield retriever.url
    retriever.end()


@pytest.fixture(scope="module")
def remote(checkpoint: Path, service: str) -> Iterator[RemoteRagRetriever]:
    encoder = load_checkpoint(checkpoint).encoder
    with RemoteRagRetriever.from_pretrained(str(checkpoint), url=service, api_key="key", encoder=encoder) as retriever:
        yield retriever


@pytest.fixture(scope="module")
def local(checkpoint: Path) -> RagRetriever:
    columns = {"title": title, "text": text}
    passages = Dataset.from_dict({name: [of(i) for i in range(len(EMBEDDINGS))] for name, of in columns.items()})
    passages = passages.add_column("embeddings", list(EMBEDDINGS))
    passages.add_faiss_index("embeddings", metric_type=0)  # inner product
    config, tokenizer = RagConfig.from_pretrained(checkpoint), RagTokenizer.from_pretrained(checkpoint)
    index = CustomHFIndex(16, passages)
    return RagRetriever(config, tokenizer.question_encoder, tokenizer.generator, index=index)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_what_is_found_is_what_transformers_finds(
    remote: RemoteRagRetriever, local: RagRetriever, questions: int, n_docs: int, seed: int
) -> None:
    vectors = random_embeddings(questions, 16, seed=1000 + seed)
    embeds, ids, docs = remote.retrieve(vectors, n_docs)
    expected_embeds, expected_ids, expected_docs = local.retrieve(vectors, n_docs)
    assert ids.tolist() == expected_ids.tolist()
    assert ids.dtype == expected_ids.dtype
    assert embeds.dtype == expected_embeds.dtype
    np.testing.assert_array_equal(embeds, expected_embeds)
    for found, expected in zip(docs, expected_docs, strict=True):
        assert (found["title"], found["text"]) == (list(expected["title"]), list(expected["text"]))
        np.testing.assert_array_equal(found["embeddings"], expected["embeddings"])


@pytest.mark.parametrize("form", [None, "np", "pt"])
def test_inputs_of_a_model_are_transformers_less_its_padding(
    remote: RemoteRagRetriever, local: RagRetriever, form: str | None
) -> None:
    ids = remote.question_encoder_tokenizer(QUESTIONS, padding=True, return_tensors="np")["input_ids"]
    asked = {"n_docs": 2, "return_tensors": form}
    vectors = random_embeddings(len(QUESTIONS), 16, seed=8)
    found, expected = remote(ids, vectors, **asked), local(ids, vectors, **asked)
    assert found.keys() == expected.keys()
    longest = np.asarray(expected["context_attention_mask"]).sum(1).max()
    for name in found:
        assert type(found[name]) is type(expected[name])
        in_full = np.asarray(expected[name])
        kept = in_full[:, :longest] if name.startswith("context") else in_full
        np.testing.assert_array_equal(np.asarray(found[name]), kept)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_model_answers_and_learns_as_with_its_own_retriever(
    checkpoint: Path, remote: RemoteRagRetriever, local: RagRetriever, num_beams: int
) -> None:
    answers, losses, gradients = [], [], []
    for retriever in (remote, local):
        model = RagTokenForGeneration.from_pretrained(checkpoint, retriever=retriever)
        asked = retriever.question_encoder_tokenizer(QUESTIONS, padding=True, return_tensors="pt")
        inputs = {name: asked[name] for name in ("input_ids", "attention_mask")}
        answers.append(model.eval().generate(**inputs, num_beams=num_beams, max_length=8, n_docs=3).tolist())
        loss = model(**inputs, labels=torch.full((len(QUESTIONS), 4), 7)).loss.mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.question_encoder.question_encoder.bert_model.embeddings.word_embeddings.weight.grad)
    assert answers[0] == answers[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_a_question_is_cleaned_up_and_never_cut(remote: RemoteRagRetriever, local: RagRetriever) -> None:
    tokenizer, longest = remote.generator_tokenizer, remote.config.max_combined_length
    docs = [{"title": ["a"], "text": ["b " * 2 * longest]}]
    [ids], [mask] = remote.postprocess_docs(docs, ["who is paris ?"], None, 1)
    assert sum(mask) <= longest
    assert tokenizer.decode(ids, skip_special_tokens=True).endswith("// who is paris?")
    [cut], _ = local.postprocess_docs(docs, ["who is paris ?"], None, 1)
    assert "paris" not in tokenizer.decode(cut)
    [ids], _ = remote.postprocess_docs(docs, ["who"], "answer: ", 1)
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("answer: a")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"api_key": None}, Unauthorized, "key"),
        ({"collection": "absent"}, NotFound, "absent"),
        ({"encoder": "sha256-ffffffffffffffff"}, EncoderMismatch, "sha256-ffffffffffffffff"),
        ({"url": f"http://127.0.0.1:{free_port()}"}, Unreachable, "no retriever answers"),
        ({"filter": "absent = 1"}, InvalidRequest, "absent"),
        ({"indexed_dataset": Dataset.from_dict({})}, InvalidRequest, "rag index import"),
        ({"retrieval_vector_size": 17}, InvalidRequest, "17"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    checkpoint: Path, service: str, changed: dict[str, Any], error: type[RagError], message: str
) -> None:
    if "retrieval_vector_size" in changed:
        changed = {"config": RagConfig.from_pretrained(checkpoint, **changed)}
    with pytest.raises(error, match=message):
        RemoteRagRetriever.from_pretrained(str(checkpoint), **{"url": service, "api_key": "key", **changed})


def test_a_copy_asks_by_itself(remote: RemoteRagRetriever) -> None:
    copied = pickle.loads(pickle.dumps(remote))  # noqa: S301  as spawned workers do
    found = copied.retrieve(EMBEDDINGS[:2], 2)[1].tolist()
    copied.close()
    assert found == remote.retrieve(EMBEDDINGS[:2], 2)[1].tolist()
    assert copied.retrieve(EMBEDDINGS[:2], 2)[1].tolist() == found
    copied.close()


def test_a_question_with_fewer_documents_is_refused(checkpoint: Path, service: str) -> None:
    asked = {"url": service, "api_key": "key", "filter": "id < 2"}
    with RemoteRagRetriever.from_pretrained(str(checkpoint), **asked) as remote:
        _, ids, _ = remote.retrieve(EMBEDDINGS[:5], 2)
        assert sorted(map(sorted, ids.tolist())) == [[0, 1]] * 5
        with pytest.raises(InvalidRequest, match="has 2 documents for a question, fewer than the 3"):
            remote.retrieve(EMBEDDINGS[:5], 3)
