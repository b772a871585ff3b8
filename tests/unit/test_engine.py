"""The engine against transformers: token ids, log p(y|x) and document posteriors, on random tiny checkpoints.

The reference for RAG-Sequence is transformers' own class with its one hole closed: its candidates are generated with
the attention mask. Probabilities are checked in float64 from the logits of transformers' forward pass.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RagSequenceForGeneration, RagTokenForGeneration

from generator_svc.engine import RagEngine
from generator_svc.engine.likelihood import counted_tokens
from services.demo.answering import DemoRag
from services.demo.build import CHECKPOINT
from shared.errors import InvalidRequest
from shared.schemas import Strategy
from tests.tiny_checkpoint import save_tiny_checkpoint

PAD, EOS, BOS = 1, 2, 0
VOCABULARY = 300


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six random models: forced first token or not, forced end or not, short answers and long ones."""
    return [
        save_tiny_checkpoint(
            tmp_path_factory.mktemp("tiny"),
            seed=seed,
            forced_bos=seed % 2 == 1,
            forced_eos=seed < 4,
            eos_bias=seed + 1.0,
        )
        for seed in range(6)
    ]


def random_contexts(seed: int, n_questions: int = 3, n_docs: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts of different lengths, so that there is padding to be masked, and document scores."""
    generator = torch.Generator().manual_seed(seed)
    rows, longest = n_questions * n_docs, 24
    ids = torch.randint(5, VOCABULARY, (rows, longest), generator=generator)
    lengths = torch.randint(6, longest + 1, (rows, 1), generator=generator)
    mask = (torch.arange(longest) < lengths).long()
    scores = torch.randn(n_questions, n_docs, generator=generator) * 1.5
    return ids.masked_fill(mask == 0, PAD), mask, scores


def transformers_generate(
    folder: Path, strategy: str, ids: Tensor, mask: Tensor, scores: Tensor, **options: object
) -> Tensor:
    """Transformers' own generation, mask-correct, with the number of documents set where it looks for it."""
    cls = RagTokenForGeneration if strategy == "token" else RagSequenceForGeneration
    model = cls.from_pretrained(folder).eval()
    model.config.n_docs = scores.shape[1]
    inner = model.generator.generate

    def masked(input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        return inner(input_ids, attention_mask=(input_ids != PAD).long(), **kwargs)

    model.generator.generate = masked
    # Saved without its generation settings (RagSequence has none), forced tokens come from RagToken's file.
    model.generator.generation_config = RagTokenForGeneration.from_pretrained(folder).generation_config
    return model.generate(
        context_input_ids=ids, context_attention_mask=mask, doc_scores=scores, max_length=11, **options
    )


@pytest.mark.parametrize("strategy", ["token", "sequence"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.4},
        {"num_beams": 2, "no_repeat_ngram_size": 1},
        {"min_new_tokens": 4},
    ],
    ids=str,
)
def test_token_ids_are_those_of_transformers(checkpoints: list[Path], strategy: str, options: dict) -> None:
    for seed, folder in enumerate(checkpoints):
        contexts = random_contexts(seed)
        ours = RagEngine.from_pretrained(folder).generate(*contexts, strategy=strategy, max_new_tokens=10, **options)
        theirs = transformers_generate(folder, strategy, *contexts, **options)
        assert ours.sequences.tolist() == theirs.tolist()


@pytest.mark.parametrize("strategy", ["token", "sequence"])
@pytest.mark.parametrize("n_docs", [1, 2, 5])
def test_any_number_of_documents_is_scored_with_that_number(
    checkpoints: list[Path], strategy: str, n_docs: int
) -> None:
    contexts = random_contexts(7, n_docs=n_docs)  # the configuration says 3
    ours = RagEngine.from_pretrained(checkpoints[0]).generate(
        *contexts, strategy=strategy, n_docs=n_docs, num_beams=2, max_new_tokens=10
    )
    theirs = transformers_generate(checkpoints[0], strategy, *contexts, num_beams=2)
    assert ours.sequences.tolist() == theirs.tolist()
    assert ours.doc_posterior.shape == (3, n_docs)


def exact_likelihoods(
    folder: Path, strategy: str, contexts: tuple[Tensor, Tensor, Tensor], answer: list[int]
) -> tuple[float, np.ndarray]:
    """log p(y|x) and p(z|x,y) of one question's answer, in float64 from transformers' logits."""
    model = RagTokenForGeneration.from_pretrained(folder).double().eval()
    ids, mask, scores = contexts
    n_docs = scores.shape[1]
    with torch.no_grad():
        logits = model(
            context_input_ids=ids,
            context_attention_mask=mask,
            doc_scores=scores.double(),
            decoder_input_ids=torch.tensor([answer[:-1]]),
            n_docs=n_docs,
            do_marginalize=False,
        ).logits.numpy()
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    prior = scores[0].double().numpy()
    prior = prior - np.logaddexp.reduce(prior)
    counted = []
    for step, token in enumerate(answer[1:]):
        if step > 0 or model.generation_config.forced_bos_token_id != token:
            counted.append(log_p[:, step, token])
        if token == EOS:
            break
    tokens = np.array(counted).reshape(-1, n_docs)  # (T, N)
    joint = prior + tokens.sum(axis=0)
    log_prob = np.logaddexp.reduce(prior + tokens, axis=1).sum() if strategy == "token" else np.logaddexp.reduce(joint)
    return float(log_prob), np.exp(joint - np.logaddexp.reduce(joint))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    n_docs=st.integers(1, 5),
    strategy=st.sampled_from(["token", "sequence"]),
    num_beams=st.integers(1, 3),
)
def test_log_probs_and_posteriors_agree_with_float64(
    checkpoints: list[Path], seed: int, n_docs: int, strategy: str, num_beams: int
) -> None:
    folder = checkpoints[seed % len(checkpoints)]
    ids, mask, scores = random_contexts(seed, n_docs=n_docs)
    engine = RagEngine.from_pretrained(folder)
    made = engine.generate(
        ids, mask, scores, strategy=strategy, num_beams=num_beams, num_return_sequences=num_beams, max_new_tokens=8
    )
    for row, answer in enumerate(made.sequences.tolist()):
        b = int(made.question[row])
        documents = slice(b * n_docs, (b + 1) * n_docs)
        of_question = (ids[documents], mask[documents], scores[b : b + 1])
        log_prob, posterior = exact_likelihoods(folder, strategy, of_question, answer)
        assert made.log_probs[row].item() == pytest.approx(log_prob, abs=1e-4)
        assert made.doc_posterior[row].numpy() == pytest.approx(posterior, abs=1e-4)
        assert made.doc_posterior[row].sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("strategy", ["token", "sequence"])
def test_log_probs_and_posteriors_agree_with_float64_on_the_demo(strategy: Strategy, num_beams: int) -> None:
    """A trained model is surer than random ones: its posteriors are close to 0 and 1."""
    rag = DemoRag()
    read = rag.read(
        ["How many people live in Paris?", "What is the symbol of gold?", "Which airport has the code JFK?", "Who?"]
    )
    ids, mask, scores = read.context_input_ids, read.context_attention_mask, read.doc_scores
    made = rag.engine.generate(
        ids, mask, scores, strategy=strategy, num_beams=num_beams, num_return_sequences=num_beams, max_new_tokens=24
    )
    n_docs = scores.shape[1]
    for row, answer in enumerate(made.sequences.tolist()):
        b = int(made.question[row])
        documents = slice(b * n_docs, (b + 1) * n_docs)
        of_question = (ids[documents], mask[documents], scores[b : b + 1])
        log_prob, posterior = exact_likelihoods(CHECKPOINT, strategy, of_question, answer)
        assert made.log_probs[row].item() == pytest.approx(log_prob, abs=1e-4)
        assert made.doc_posterior[row].numpy() == pytest.approx(posterior, abs=1e-4)


@pytest.mark.parametrize("strategy", ["token", "sequence"])
def test_score_gives_generated_answers_the_same_numbers(checkpoints: list[Path], strategy: str) -> None:
    engine = RagEngine.from_pretrained(checkpoints[1])
    contexts = random_contexts(3)
    made = engine.generate(*contexts, strategy=strategy, num_beams=3, num_return_sequences=2, max_new_tokens=8)
    scored = engine.score(*contexts, made.sequences, question=made.question, strategy=strategy)
    assert scored.log_probs.tolist() == pytest.approx(made.log_probs.tolist(), abs=1e-4)
    assert scored.doc_posterior.numpy() == pytest.approx(made.doc_posterior.numpy(), abs=1e-4)


def test_sequences_belong_to_the_questions_in_equal_shares_unless_told_otherwise(checkpoints: list[Path]) -> None:
    engine = RagEngine.from_pretrained(checkpoints[0])
    contexts = random_contexts(3)
    made = engine.generate(*contexts, strategy="token", num_beams=2, num_return_sequences=2, max_new_tokens=8)
    scored = engine.score(*contexts, made.sequences, strategy="token")
    assert scored.log_probs.tolist() == pytest.approx(made.log_probs.tolist(), abs=1e-4)
    with pytest.raises(InvalidRequest, match="multiple"):
        engine.score(*contexts, made.sequences[1:], strategy="token")


def test_scoring_in_small_steps_changes_nothing(checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = RagEngine.from_pretrained(checkpoints[0])
    contexts = random_contexts(3)
    made = engine.generate(*contexts, strategy="sequence", num_beams=3, num_return_sequences=3, max_new_tokens=8)
    monkeypatch.setattr("generator_svc.engine.decoding.LOGITS_ROWS", 4)
    monkeypatch.setattr("generator_svc.engine.decoding.NORMALIZED_ROWS", 2)
    scored = engine.score(*contexts, made.sequences, question=made.question, strategy="sequence")
    assert scored.log_probs.tolist() == pytest.approx(made.log_probs.tolist(), abs=1e-4)


@pytest.mark.parametrize("strategy", ["token", "sequence"])
def test_the_tokens_shares_sum_to_the_answer_and_the_last_posterior_is_the_answers(
    checkpoints: list[Path], strategy: str
) -> None:
    engine = RagEngine.from_pretrained(checkpoints[2])
    made = engine.generate(*random_contexts(4), strategy=strategy, num_beams=3, max_new_tokens=8)
    for found in made.evidence:
        assert found.token_log_probs.sum(1).tolist() == pytest.approx(found.log_probs.tolist(), abs=1e-5)
        assert torch.all(found.token_log_probs[~found.counted] == 0)
        assert found.token_posterior.sum(2).numpy() == pytest.approx(1, abs=1e-5)
        assert torch.equal(found.token_posterior[:, -1], found.doc_posterior)


def test_fast_decoding_counts_an_answer_only_under_the_documents_that_found_it(checkpoints: list[Path]) -> None:
    """Lewis et al. 2020, §2.5: p(y|x,z) = 0 where y is not among the beams of z."""
    engine = RagEngine.from_pretrained(checkpoints[2])
    ids, mask, scores = random_contexts(6, n_questions=1)
    options = {"strategy": "sequence", "num_beams": 3, "max_new_tokens": 8}
    alone = [
        engine.generate(ids[n : n + 1], mask[n : n + 1], scores[:, :1], num_return_sequences=3, **options)
        for n in range(3)
    ]
    prior = scores[0].log_softmax(0)
    expected: dict[tuple[int, ...], float] = {}
    for n, found in enumerate(alone):
        for row, log_prob in zip(found.sequences.tolist(), found.log_probs.tolist(), strict=True):
            answer = tuple(row[: row.index(EOS, 1) + 1])
            expected[answer] = np.logaddexp(expected.get(answer, -np.inf), prior[n].item() + log_prob)
    fast = engine.generate(ids, mask, scores, decoding="fast", num_return_sequences=9, **options)
    assert len(fast.sequences) == len(expected)
    for row, log_prob in zip(fast.sequences.tolist(), fast.log_probs.tolist(), strict=True):
        assert log_prob == pytest.approx(expected[tuple(row[: row.index(EOS, 1) + 1])], abs=1e-4)
    thorough = engine.score(ids, mask, scores, fast.sequences, strategy="sequence")
    assert torch.all(thorough.log_probs >= fast.log_probs - 1e-5)


def test_questions_of_every_kind_run_together_and_get_what_they_get_alone(checkpoints: list[Path]) -> None:
    engine = RagEngine.from_pretrained(checkpoints[4])
    tasks = []
    for seed, options in enumerate(
        [
            {"strategy": "token"},
            {"strategy": "sequence", "num_beams": 3},
            {"strategy": "token", "num_beams": 2, "num_return_sequences": 2},
            {"strategy": "sequence", "decoding": "fast", "num_beams": 2},
            {"strategy": "token", "do_sample": True, "seed": 5, "top_k": 0, "num_return_sequences": 3},
        ]
    ):
        ids, mask, scores = random_contexts(seed, n_questions=1, n_docs=seed + 1)
        documents = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
        tasks.append(engine.task(documents, scores[0], max_new_tokens=3 + seed, **options))
    together = engine.run(tasks)
    for task, found in zip(tasks, together, strict=True):
        [alone] = engine.run([task])
        assert found.sequences.tolist() == alone.sequences.tolist()
        assert found.log_probs.tolist() == pytest.approx(alone.log_probs.tolist(), abs=1e-4)


@pytest.mark.parametrize("strategy", ["token", "sequence"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_neither_the_questions_nor_the_documents_that_run_together_change_an_answer(
    checkpoints: list[Path], strategy: Strategy, num_beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question at a time, every document padded by itself (groups, and rows in another order than the groups'), and
    candidates scored a few at a time.
    """
    engine = RagEngine.from_pretrained(checkpoints[0])
    contexts = random_contexts(4, n_questions=4)
    together = engine.generate(*contexts, strategy=strategy, num_beams=num_beams, max_new_tokens=8)
    monkeypatch.setattr("generator_svc.engine.decoder.KEPT_PADDING", (1.0, 0))
    scattered = engine.generate(*contexts, strategy=strategy, num_beams=num_beams, max_new_tokens=8)
    monkeypatch.setattr("generator_svc.engine.bart_backend.CPU_HELD_NUMBERS", 1)
    apart = engine.generate(*contexts, strategy=strategy, num_beams=num_beams, max_new_tokens=8)
    monkeypatch.setattr("generator_svc.engine.decoder.CPU_ROWS", 9)
    in_pieces = engine.generate(*contexts, strategy=strategy, num_beams=num_beams, max_new_tokens=8)
    for other in (scattered, apart, in_pieces):
        assert other.sequences.tolist() == together.sequences.tolist()
        assert other.log_probs.tolist() == pytest.approx(together.log_probs.tolist(), abs=1e-4)


def test_padding_does_not_change_an_answer(checkpoints: list[Path]) -> None:
    ids, mask, scores = random_contexts(5, n_questions=1)
    engine = RagEngine.from_pretrained(checkpoints[0])
    wide_ids = torch.nn.functional.pad(ids, (0, 30), value=PAD)
    wide_mask = torch.nn.functional.pad(mask, (0, 30))
    for strategy in ("token", "sequence"):
        narrow = engine.generate(ids, mask, scores, strategy=strategy, max_new_tokens=8)
        wide = engine.generate(wide_ids, wide_mask, scores, strategy=strategy, max_new_tokens=8)
        assert narrow.sequences.tolist() == wide.sequences.tolist()
        assert narrow.log_probs.tolist() == pytest.approx(wide.log_probs.tolist(), abs=1e-4)


def test_max_new_tokens_bounds_both_heads(checkpoints: list[Path]) -> None:
    engine = RagEngine.from_pretrained(checkpoints[0])
    for strategy in ("token", "sequence"):
        made = engine.generate(*random_contexts(1), strategy=strategy, max_new_tokens=3, min_new_tokens=3)
        assert made.sequences.shape[1] == 1 + 3


@pytest.mark.parametrize("strategy", ["token", "sequence"])
def test_sampling_is_repeatable_by_its_seed_and_leaves_torchs_generator_alone(
    checkpoints: list[Path], strategy: str
) -> None:
    engine = RagEngine.from_pretrained(checkpoints[0])

    def sample(seed: int) -> list[list[int]]:
        made = engine.generate(
            *random_contexts(1), strategy=strategy, do_sample=True, top_k=0, seed=seed, max_new_tokens=10
        )
        return made.sequences.tolist()

    state = torch.get_rng_state()
    first, again, other = sample(1), sample(1), sample(2)
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_rag_token_gives_as_many_samples_as_asked_for(checkpoints: list[Path]) -> None:
    engine = RagEngine.from_pretrained(checkpoints[0])
    made = engine.generate(
        *random_contexts(1),
        strategy="token",
        do_sample=True,
        num_return_sequences=4,
        top_k=0,
        seed=1,
        max_new_tokens=10,
    )
    assert made.question.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(set(map(tuple, made.sequences[:4].tolist()))) > 1


def test_rag_sequence_returns_the_candidates_there_are(tmp_path: Path) -> None:
    # Every document gives the empty answer: one candidate where three are asked for. transformers crashes here.
    engine = RagEngine.from_pretrained(save_tiny_checkpoint(tmp_path, forced_bos=True, eos_bias=9.0))
    made = engine.generate(*random_contexts(1), strategy="sequence", num_return_sequences=3, max_new_tokens=10)
    assert made.question.tolist() == [0, 1, 2]
    assert made.sequences.tolist() == [[EOS, BOS, EOS]] * 3
    every = engine.generate(
        *random_contexts(1), strategy="sequence", num_return_sequences=3, max_new_tokens=10, deduplicate=False
    )
    assert every.question.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_counted_tokens_end_with_the_first_end_of_sequence() -> None:
    sequences = torch.tensor([[EOS, BOS, 7, EOS, PAD], [EOS, 7, PAD, 7, 7], [EOS, EOS, PAD, PAD, PAD]])
    assert counted_tokens(sequences, [EOS], None).tolist() == [
        [True, True, True, False],
        [True, True, True, True],
        [True, False, False, False],
    ]
    assert counted_tokens(sequences, [EOS], BOS)[:, 0].tolist() == [False, True, True]


def test_what_cannot_be_honoured_is_refused(checkpoints: list[Path]) -> None:
    engine = RagEngine.from_pretrained(checkpoints[0])
    ids, mask, scores = random_contexts(1)
    with pytest.raises(InvalidRequest, match="num_return_sequences"):
        engine.generate(ids, mask, scores, strategy="token", num_return_sequences=2)
    with pytest.raises(InvalidRequest, match="positions for 159 new tokens"):
        engine.generate(ids, mask, scores, max_new_tokens=160)
    with pytest.raises(InvalidRequest, match="n_docs"):
        engine.generate(ids, mask, scores, n_docs=4)
    with pytest.raises(InvalidRequest, match="one row for each"):
        engine.generate(ids[:-1], mask[:-1], scores)
    with pytest.raises(InvalidRequest, match="repetition cannot be honoured"):
        engine.generate(ids, mask, scores, repetition=2)
    with pytest.raises(InvalidRequest, match="encoder_repetition_penalty cannot be honoured"):
        engine.generate(ids, mask, scores, encoder_repetition_penalty=2.0)
    with pytest.raises(InvalidRequest, match="not supported"):
        engine.generate(ids, mask, scores, num_beams=2, do_sample=True)
    with pytest.raises(InvalidRequest, match="decoding has an effect only with strategy 'sequence'"):
        engine.generate(ids, mask, scores, strategy="token", decoding="fast")
