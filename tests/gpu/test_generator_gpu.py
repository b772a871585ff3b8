"""The generator on CUDA against itself on the CPU, which the other tests hold to transformers."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor

from generator_svc.app import create_app
from generator_svc.checkpoint import load_checkpoint
from generator_svc.engine import RagEngine
from generator_svc.question_encoder import QuestionEncoder
from generator_svc.settings import GeneratorSettings
from tests.serving import served
from tests.small_retriever import SmallRetriever
from tests.tiny_checkpoint import save_tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DEVICE = "cuda"
PAD = 1
QUESTIONS = ["How many people live in Paris?", "who discovered oxygen", "Where is Reykjavík?"]
OPTIONS: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}]
RULES: list[dict[str, Any]] = [
    {"do_sample": True, "seed": 4, "num_return_sequences": 3},  # takes the ordinary way
    {"num_beams": 3, "no_repeat_ngram_size": 2},  # a rule that cannot be captured
    {"num_beams": 4, "early_stopping": True, "repetition_penalty": 1.3, "min_new_tokens": 4},
]
# Largest difference to float32 on random tiny models: of log p(y|x) a token, and of a document's posterior. Measured:
# bfloat16 0.024 and 0.063, float16 0.005 and 0.006.
TOLERANCES = {"bfloat16": (0.06, 0.15), "float16": (0.015, 0.02)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def contexts(n_questions: int = 8, n_docs: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, longest = n_questions * n_docs, 30
    ids = torch.randint(5, 300, (rows, longest), generator=generator)
    mask = (torch.arange(longest) < torch.randint(8, longest + 1, (rows, 1), generator=generator)).long()
    return ids.masked_fill(mask == 0, PAD), mask, torch.randn(n_questions, n_docs, generator=generator)


@pytest.mark.parametrize("strategy", ["token", "sequence"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float32_gives_the_same_answers_as_the_cpu(checkpoint: Path, strategy: Any, options: dict[str, Any]) -> None:
    cpu, gpu = (
        RagEngine.from_pretrained(checkpoint, device=device).generate(
            *contexts(), strategy=strategy, max_new_tokens=10, **options
        )
        for device in ("cpu", DEVICE)
    )
    assert gpu.sequences.tolist() == cpu.sequences.tolist()
    assert gpu.log_probs.tolist() == pytest.approx(cpu.log_probs.tolist(), abs=1e-3)
    assert gpu.doc_posterior.cpu().numpy() == pytest.approx(cpu.doc_posterior.numpy(), abs=1e-3)


@pytest.mark.parametrize("strategy", ["token", "sequence"])
@pytest.mark.parametrize("options", [*OPTIONS, *RULES], ids=str)
def test_captured_steps_give_what_launched_ones_give(
    checkpoint: Path, strategy: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of two sizes and back again, each often enough to be captured and replayed over other documents."""
    replays: list[None] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        replays.append(None)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    loaded = load_checkpoint(checkpoint, device=DEVICE)
    launched, captured = RagEngine(loaded, cuda_graphs=False), RagEngine(loaded)
    for n_questions, seen in ((4, 0), (8, 0), (4, 1), (8, 1), (4, 2)):
        inputs = contexts(n_questions, seed=seen)
        expected = launched.generate(*inputs, strategy=strategy, max_new_tokens=10, **options)
        assert not replays
        found = captured.generate(*inputs, strategy=strategy, max_new_tokens=10, **options)
        assert (len(replays) >= 2) == (seen > 0 and not options.get("do_sample"))
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert found.log_probs.tolist() == pytest.approx(expected.log_probs.tolist(), abs=1e-4)
        assert found.doc_posterior.numpy() == pytest.approx(expected.doc_posterior.numpy(), abs=1e-4)
        replays.clear()


@pytest.mark.parametrize("strategy", ["token", "sequence"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_half_precision_stays_near_float32(checkpoint: Path, strategy: Any, dtype: str) -> None:
    exact = RagEngine.from_pretrained(checkpoint).generate(*contexts(), strategy=strategy, max_new_tokens=10)
    half = RagEngine.from_pretrained(checkpoint, device=DEVICE, dtype=dtype)
    scored = half.score(*contexts(), exact.sequences, question=exact.question, strategy=strategy)
    n_tokens = (exact.sequences[:, 1:] != PAD).sum(dim=1)
    per_token, posterior = TOLERANCES[dtype]
    assert ((scored.log_probs.cpu() - exact.log_probs).abs() / n_tokens).max() < per_token
    assert (scored.doc_posterior.cpu() - exact.doc_posterior).abs().max() < posterior
    made = half.generate(*contexts(), strategy=strategy, max_new_tokens=10)
    assert made.doc_posterior.sum(dim=1).tolist() == pytest.approx([1.0] * 8, abs=1e-5)


def test_question_vectors_are_those_of_the_cpu(checkpoint: Path) -> None:
    cpu, gpu = (QuestionEncoder(load_checkpoint(checkpoint, device=device)) for device in ("cpu", DEVICE))
    assert gpu.fingerprint == cpu.fingerprint
    assert gpu.encode(QUESTIONS) == pytest.approx(cpu.encode(QUESTIONS), abs=1e-4)


def test_a_seed_repeats_its_samples_and_leaves_the_gpus_generator_alone(checkpoint: Path) -> None:
    engine = RagEngine.from_pretrained(checkpoint, device=DEVICE)

    def sample(seed: int) -> list[list[int]]:
        options: dict[str, Any] = {"do_sample": True, "top_k": 0, "num_return_sequences": 2, "max_new_tokens": 10}
        made = engine.generate(*contexts(), strategy="token", seed=seed, **options)
        return [row.tolist() for row in made.sequences]

    state = torch.cuda.get_rng_state()
    first, again, other = sample(1), sample(1), sample(2)
    assert first == again != other
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_the_service_answers_on_the_gpu_as_on_the_cpu(checkpoint: Path) -> None:
    embeddings = np.random.default_rng(0).standard_normal((20, 16), dtype=np.float32)
    retriever = SmallRetriever(embeddings, load_checkpoint(checkpoint).encoder)

    async def answers(device: str, url: str) -> list[Any]:
        app = create_app(GeneratorSettings(checkpoint=str(checkpoint), retriever_url=url, device=device))
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://g") as http,
        ):
            assert (await http.get("/info")).json()["device"].startswith(device)
            request = {"question": QUESTIONS, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 10}
            return (await http.post("/v1/answer", json=request)).json()["results"]

    with served(retriever.app) as url:
        cpu, gpu = (asyncio.run(answers(device, url)) for device in ("cpu", DEVICE))
    for ours, theirs in zip(gpu, cpu, strict=True):
        assert [answer["text"] for answer in ours["answers"]] == [answer["text"] for answer in theirs["answers"]]
        assert [document["id"] for document in ours["documents"]] == [
            document["id"] for document in theirs["documents"]
        ]
        for answer, expected in zip(ours["answers"], theirs["answers"], strict=True):
            assert answer["log_prob"] == pytest.approx(expected["log_prob"], abs=1e-3)
            assert answer["doc_posterior"] == pytest.approx(expected["doc_posterior"], abs=1e-3)
