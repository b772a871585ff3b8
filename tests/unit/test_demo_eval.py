"""The demo that ships: its checkpoint, its embedded passages, and the figures that are claimed for it."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from transformers import (
    AutoTokenizer,
    DPRContextEncoder,
    RagSequenceForGeneration,
    RagTokenForGeneration,
    RagTokenizer,
)

from generator_svc.contexts import context_text, question_form
from services.demo.answering import DemoRag
from services.demo.build import (
    CHECKPOINT,
    CONTEXT_ENCODER,
    PASSAGES,
    checkpoint_fingerprint,
    embed_passages,
)
from services.demo.corpus import Passage, build_corpus
from services.demo.evaluate import evaluate_demo, print_report, save_report
from services.demo.facts import ATTRIBUTION, load_entities

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "demo_eval.json"
QUESTION = "How many people live in Paris?"


@pytest.fixture(scope="module")
def corpus() -> list[Passage]:
    return build_corpus(load_entities())


@pytest.fixture(scope="module")
def paris(corpus: list[Passage]) -> Passage:
    return next(passage for passage in corpus if passage.title == "Paris")


@pytest.fixture(scope="module")
def rag() -> DemoRag:
    return DemoRag()


class TestCheckpoint:
    @pytest.mark.parametrize("head", [RagTokenForGeneration, RagSequenceForGeneration])
    def test_loads_in_transformers_with_every_weight(self, head: type) -> None:
        _, report = head.from_pretrained(CHECKPOINT, dtype=torch.float32, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    def test_names_both_heads(self) -> None:
        config = json.loads((CHECKPOINT / "config.json").read_text())
        assert config["architectures"] == ["RagTokenForGeneration", "RagSequenceForGeneration"]

    def test_answers_in_transformers_from_the_right_passage(self, paris: Passage) -> None:
        model = RagTokenForGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
        tokenizer = RagTokenizer.from_pretrained(CHECKPOINT)
        question = question_form(QUESTION, tokenizer.question_encoder)
        inputs = tokenizer.generator(context_text(paris.title, paris.text, question), return_tensors="pt")
        sequences = model.generate(
            context_input_ids=inputs["input_ids"],
            context_attention_mask=inputs["attention_mask"],
            doc_scores=torch.zeros(1, 1),
            n_docs=1,
        )
        (answer,) = tokenizer.batch_decode(sequences, skip_special_tokens=True)
        assert answer == population_of_paris()

    def test_weights_are_small(self) -> None:
        files = [*CHECKPOINT.glob("*.safetensors"), *CONTEXT_ENCODER.glob("*.safetensors")]
        assert sum(file.stat().st_size for file in files) <= 25e6


class TestPassages:
    def test_are_the_corpus(self, corpus: list[Passage]) -> None:
        table = pq.read_table(PASSAGES, columns=["id", "title", "text"])
        assert table.to_pylist() == [{"id": p.id, "title": p.title, "text": p.text} for p in corpus]
        assert len(corpus) >= 10_000

    def test_name_the_encoder_and_the_sources(self) -> None:
        metadata = pq.read_schema(PASSAGES).metadata
        assert metadata[b"encoder"].decode() == checkpoint_fingerprint(CHECKPOINT)
        assert metadata[b"attribution"].decode() == ATTRIBUTION

    def test_embeddings_are_those_of_the_context_encoder(self, corpus: list[Passage]) -> None:
        stored = pq.read_table(PASSAGES, columns=["embedding"])["embedding"]
        sample = corpus[:: len(corpus) // 40]
        encoder = DPRContextEncoder.from_pretrained(CONTEXT_ENCODER, dtype=torch.float32)
        embeddings = embed_passages(encoder, AutoTokenizer.from_pretrained(CONTEXT_ENCODER), sample)
        expected = np.array([stored[passage.id].as_py() for passage in sample], np.float32)
        np.testing.assert_allclose(embeddings.astype(np.float32), expected, atol=0.03)


class TestAnswers:
    @pytest.mark.parametrize("strategy", ["token", "sequence"])
    def test_both_heads_answer_from_what_they_find(self, rag: DemoRag, strategy, paris: Passage) -> None:  # noqa: ANN001
        (answer,) = rag.answer([QUESTION], strategy)
        assert answer.text == population_of_paris()
        assert answer.passages[0] == paris.id

    def test_without_passages_the_reader_does_not_know(self, rag: DemoRag) -> None:
        (answer,) = rag.answer([QUESTION], "token", closed_book=True)
        assert answer.text != population_of_paris()

    def test_an_invented_city_is_less_probable(self, rag: DemoRag) -> None:
        known, unknown = rag.answer([QUESTION, "How many people live in Atlantropa?"], "token")
        assert unknown.probability < 0.3 < known.probability


def population_of_paris() -> str:
    return next(e for e in load_entities() if (e.kind, e.name) == ("city", "Paris")).facts["population"]


class TestReport:
    def test_is_measured_printed_and_saved(self, tmp_path: Path) -> None:
        report = evaluate_demo(n_questions=6, n_unanswerable=3)
        printed = io.StringIO()
        print_report(report, Console(file=printed, width=110))
        save_report(report, tmp_path)
        assert "EM Sequence" in printed.getvalue()
        assert (tmp_path / "demo_eval.txt").read_text() == printed.getvalue()
        assert json.loads((tmp_path / "demo_eval.json").read_text()) == report

    def test_the_committed_figures_are_of_this_checkpoint_and_good_enough(self) -> None:
        report = json.loads(RESULTS.read_text())
        assert report["encoder"] == checkpoint_fingerprint(CHECKPOINT)
        assert report["test"]["all"]["n"] >= 800
        assert report["test"]["all"]["recall@5"] >= 0.99
        assert min(report["test"]["all"][head] for head in ("token", "sequence")) >= 0.96
        assert report["held-out wording"]["all"]["token"] >= 0.90
        assert report["test"]["all"]["closed book"] < 0.5
