"""Generators that are not BART and question encoders that are not DPR, behind the same interface: T5, mBART and BERT.

They run through transformers' own classes, which are the oracle as well: a search by transformers over the same model,
and probabilities in float64 from its forward pass.
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from tokenizers import processors
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedTokenizerFast,
    RagConfig,
    RagSequenceForGeneration,
    RagTokenForGeneration,
    RagTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from generator_svc.app import create_app
from generator_svc.checkpoint import load_checkpoint
from generator_svc.engine import RagEngine
from generator_svc.engine.transformers_backend import TransformersBackend
from generator_svc.question_encoder import QuestionEncoder
from generator_svc.settings import GeneratorSettings
from shared.errors import InvalidRequest, StartupError
from tests.tiny_checkpoint import generator_tokenizer, question_tokenizer

START, EOS, PAD = 1, 2, 1


def t5() -> T5ForConditionalGeneration:
    """Without a beginning-of-sequence token, and its padding opens its answers, as T5's does."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(generator_tokenizer()), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1,
            num_heads=3, initializer_factor=2.0, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=START,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def mbart() -> MBartForConditionalGeneration:
    return MBartForConditionalGeneration(
        MBartConfig(
            vocab_size=len(generator_tokenizer()), d_model=24, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
            max_position_embeddings=160, init_std=0.4, decoder_start_token_id=START,
        )
    )  # fmt: skip


def save(folder: Path, generator: Any, pooling: str | None) -> Path:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertConfig(vocab_size=len(question_tokenizer()), max_position_embeddings=48, initializer_range=0.3, **sizes)
    if pooling is not None:
        bert.pooling = pooling
    config = RagConfig.from_question_encoder_generator_configs(
        bert, generator.config, n_docs=3, max_combined_length=96, retrieval_vector_size=16
    )
    model = RagTokenForGeneration(config=config, question_encoder=BertModel(bert), generator=generator)
    model.save_pretrained(folder)
    model.config.architectures = ["RagTokenForGeneration", "RagSequenceForGeneration"]
    model.config.save_pretrained(folder)
    RagTokenizer(question_tokenizer(), _without_bos(generator)).save_pretrained(folder)
    return folder


def _without_bos(generator: Any) -> PreTrainedTokenizerFast:
    """T5's tokenizers put an end behind the text and nothing in front of it."""
    tokenizer = generator_tokenizer()
    if generator.config.model_type != "t5":
        return tokenizer
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        pad_token="<pad>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
    )
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    return made


@pytest.fixture(scope="module", params=[t5, mbart], ids=["t5", "mbart"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    make: Callable[[], Any] = request.param
    return save(tmp_path_factory.mktemp("other"), make(), "mean")


@pytest.fixture(scope="module")
def engine(folder: Path) -> RagEngine:
    return RagEngine.from_pretrained(folder)


def contexts(seed: int, n_questions: int = 2, n_docs: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = n_questions * n_docs
    ids = torch.randint(5, 300, (rows, 12), generator=generator)
    mask = (torch.arange(12) < torch.randint(4, 13, (rows, 1), generator=generator)).long()
    return ids.masked_fill(mask == 0, PAD), mask, torch.randn(n_questions, n_docs, generator=generator)


def cut(row: list[int]) -> list[int]:
    return row[: row.index(EOS, 1) + 1] if EOS in row[1:] else row


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "no_repeat_ngram_size": 1}], ids=str)
def test_rag_token_writes_what_transformers_writes(engine: RagEngine, folder: Path, options: dict[str, Any]) -> None:
    rules = {"suppress_tokens": [PAD], "max_length": 9, **options}
    for seed in range(4):
        ids, mask, scores = contexts(seed)
        model = RagTokenForGeneration.from_pretrained(folder).eval()
        theirs = model.generate(context_input_ids=ids, context_attention_mask=mask, doc_scores=scores, **rules)
        made = engine.generate(ids, mask, scores, strategy="token", **rules)
        assert [cut(row) for row in made.sequences.tolist()] == [cut(row) for row in theirs.tolist()]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_rag_sequence_takes_the_best_candidate_of_all_documents(
    engine: RagEngine, folder: Path, num_beams: int
) -> None:
    ids, mask, scores = contexts(5, n_questions=1)
    rules = {"suppress_tokens": [PAD], "max_length": 9, "num_beams": num_beams}
    generator = RagTokenForGeneration.from_pretrained(folder).eval().generator
    found = generator.generate(ids, attention_mask=mask, num_return_sequences=num_beams, **rules)
    candidates = {tuple(cut(row)) for row in found.tolist()}
    expected = max(exact(folder, "sequence", (ids, mask, scores), list(answer))[0] for answer in candidates)
    made = engine.generate(ids, mask, scores, strategy="sequence", **rules)
    assert tuple(cut(made.sequences[0].tolist())) in candidates
    assert made.log_probs[0].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("strategy", ["token", "sequence"])
def test_a_configuration_that_asks_for_tuples_changes_nothing(
    engine: RagEngine, folder: Path, tmp_path: Path, strategy: Any
) -> None:
    """As those of 2020 do (``return_dict`` false)."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for part in (config, config["question_encoder"], config["generator"]):
        part["return_dict"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    of_tuples = RagEngine.from_pretrained(tmp_path)
    made, expected = (
        of.generate(*contexts(3), strategy=strategy, num_beams=2, max_length=9) for of in (of_tuples, engine)
    )
    assert torch.equal(made.sequences, expected.sequences)
    assert torch.equal(made.doc_posterior, expected.doc_posterior)


def exact(
    folder: Path, strategy: str, batch: tuple[Tensor, Tensor, Tensor], answer: list[int]
) -> tuple[float, np.ndarray]:
    """log p(y|x) and p(z|x,y) of one question's answer, in float64."""
    ids, mask, scores = batch
    model = RagTokenForGeneration.from_pretrained(folder).double().eval()
    with torch.no_grad():
        logits = model.generator(
            input_ids=ids, attention_mask=mask, decoder_input_ids=torch.tensor([answer[:-1]] * len(ids))
        ).logits.numpy()
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    tokens = np.stack([log_p[:, at, token] for at, token in enumerate(answer[1:])])  # (T, N)
    prior = scores[0].double().log_softmax(0).numpy()
    joint = prior + tokens.sum(axis=0)
    marginal = np.logaddexp.reduce(prior + tokens, axis=1).sum() if strategy == "token" else np.logaddexp.reduce(joint)
    return float(marginal), np.exp(joint - np.logaddexp.reduce(joint))


@pytest.mark.parametrize("strategy", ["token", "sequence"])
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "seed": 1}], ids=["beams", "sampling"])
def test_probabilities_and_posteriors_agree_with_float64(
    engine: RagEngine, folder: Path, strategy: str, options: dict[str, Any]
) -> None:
    ids, mask, scores = contexts(8)
    rules = {"suppress_tokens": [PAD], "max_length": 8, "num_return_sequences": 2, **options}
    made = engine.generate(ids, mask, scores, strategy=strategy, **rules)
    scored = engine.score(ids, mask, scores, made.sequences, question=made.question, strategy=strategy)
    for row, answer in enumerate(made.sequences.tolist()):
        b = int(made.question[row])
        batch = (ids[3 * b : 3 * b + 3], mask[3 * b : 3 * b + 3], scores[b : b + 1])
        log_prob, posterior = exact(folder, strategy, batch, cut(answer))
        for result in (made, scored):
            assert result.log_probs[row].item() == pytest.approx(log_prob, abs=1e-4)
            assert result.doc_posterior[row].numpy() == pytest.approx(posterior, abs=1e-4)


def test_rag_sequence_cannot_score_without_a_beginning_token_in_transformers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    path = save(tmp_path, t5(), "mean")
    ids, mask, scores = contexts(3)
    model = RagSequenceForGeneration.from_pretrained(path).eval()
    with pytest.raises(AttributeError, match="bos_token_id"):
        model.generate(context_input_ids=ids, context_attention_mask=mask, doc_scores=scores, max_length=6)
    made = RagEngine.from_pretrained(path).generate(ids, mask, scores, strategy="sequence", max_length=6)
    assert made.question.tolist() == [0, 1]


def test_they_run_through_transformers_classes_and_refuse_what_these_lack(engine: RagEngine) -> None:
    assert isinstance(engine._backend, TransformersBackend)
    with pytest.raises(InvalidRequest, match="fast decoding needs a BART generator"):
        engine.generate(*contexts(1), strategy="sequence", decoding="fast", max_length=6)


def test_they_do_not_multiply_in_int8(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"is for BART, and the generator of .* is t5"):
        RagEngine.from_pretrained(save(tmp_path, t5(), "mean"), dtype=torch.int8)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_bert_pools_as_its_configuration_says(tmp_path: Path, pooling: str) -> None:
    checkpoint = load_checkpoint(save(tmp_path, mbart(), pooling))
    transformers = copy.deepcopy(checkpoint.model.question_encoder)
    encoder = QuestionEncoder(checkpoint)
    questions = ["who", "How many people live in Paris?"]
    vectors = encoder.encode(questions)
    assert vectors.shape == (2, encoder.dimension) == (2, 16)
    for question, vector in zip(questions, vectors, strict=True):
        states = transformers(**checkpoint.question_tokenizer(question, return_tensors="pt")).last_hidden_state[0]
        expected = states[0] if pooling == "cls" else states.mean(0)
        assert vector == pytest.approx(expected.detach().numpy(), abs=1e-5)


def test_pooling_is_part_of_the_embedding_space(tmp_path: Path) -> None:
    prints = set()
    for pooling in ("cls", "mean"):
        torch.manual_seed(0)
        prints.add(load_checkpoint(save(tmp_path / pooling, mbart(), pooling)).encoder)
    assert len(prints) == 2


def test_an_unknown_pooling_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"pooling of .* is 'max'"):
        QuestionEncoder(load_checkpoint(save(tmp_path, mbart(), "max")))


@pytest.mark.parametrize("strategy", ["token", "sequence"])
async def test_the_service_answers_with_them(folder: Path, strategy: str) -> None:
    settings = GeneratorSettings(
        checkpoint=str(folder), retriever_url="http://127.0.0.1:9", retriever_retry_s=0.1, torch_threads=1,
        max_new_tokens=12,
    )  # fmt: skip
    app = create_app(settings)
    passages = [
        {"title": "Paris", "text": "Paris has 2138551 inhabitants.", "score": 1.5},
        {"title": "Seine", "text": "It lies on the Seine.", "score": 0.5},
    ]
    asked = {"question": "How many people live in Paris?", "passages": passages, "strategy": strategy}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http,
    ):
        answered = await http.post("/v1/answer", json={**asked, "num_beams": 2, "max_new_tokens": 6})
        vector = await http.post("/v1/encode", json={"question": asked["question"]})
        scored = await http.post("/v1/score", json={**asked, "answers": ["2138551"]})
    assert answered.status_code == 200, answered.text
    [answer] = answered.json()["results"][0]["answers"]
    assert answer["log_prob"] < 0
    assert sum(answer["doc_posterior"]) == pytest.approx(1, abs=1e-4)
    assert scored.status_code == 200, scored.text
    assert vector.status_code == 200, vector.text
    assert vector.json()["dimension"] == 16
