"""Random models, inputs and options, put to transformers and to the engine: the token ids must be the same.

``python -m tests.parity 5000`` runs so many draws, ``--first`` says where to begin. A draw is made from its number
alone. tests/unit/test_parity.py runs some of them.

The oracle is transformers' own code with what docs/parity.md calls its faults mended at the border: RAG-Sequence's
candidates are generated with the attention mask, end with padding rather than with repeated ends, and an answer of one
token keeps the document's prior. Where the ids differ, :func:`tie` looks up the first decision on which the two
searches part, computes both candidates' scores anew in float64 by teacher forcing, and accepts 1e-5.
"""

import argparse
import copy
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DPRConfig,
    DPRQuestionEncoder,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RagConfig,
    RagSequenceForGeneration,
    RagTokenForGeneration,
)
from transformers.generation.utils import GenerateBeamEncoderDecoderOutput

from generator_svc.checkpoint import Checkpoint
from generator_svc.engine import RagEngine
from generator_svc.engine.bart_backend import BartBackend
from generator_svc.engine.search import REJECTED

TIE = 1e-5
POSITIONS = 64
_ENCODER = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


def in_memory(model: RagTokenForGeneration) -> Checkpoint:
    """A checkpoint for the engine alone, which takes the weights of a copy; nobody reads its tokenizers."""
    nobody: Any = None
    device, model = torch.device("cpu"), copy.deepcopy(model)
    return Checkpoint("random", model, nobody, nobody, ("token", "sequence"), "", device, model.generator.dtype)


@dataclass(frozen=True)
class Draw:
    """One comparison. ``options`` are transformers' names; ``max_length`` counts the decoder's start token."""

    seed: int
    model: RagTokenForGeneration
    ids: Tensor
    mask: Tensor
    doc_scores: Tensor
    strategy: str
    options: dict[str, Any]
    deduplicate: bool
    allowed_modulus: int | None

    def allowed(self, question: int, sequence: Tensor) -> list[int]:
        """``prefix_allowed_tokens_fn``: arbitrary, but a function of the question and of all tokens so far."""
        vocabulary = self.model.config.generator.vocab_size
        offset = int(sequence.sum()) + question
        return [token for token in range(vocabulary) if (token + offset) % (self.allowed_modulus or 1) != 1]


def draw(seed: int) -> Draw:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    strategy, n_docs = rng.choice(["token", "sequence"]), rng.choice([1, 2, 3, 5])
    model = _model(rng, n_docs)
    rows, longest = rng.choice([1, 1, 2, 3]) * n_docs, rng.choice([2, 5, 12, 24])
    ids = torch.randint(0, model.config.generator.vocab_size, (rows, longest))
    lengths = torch.randint(2, longest + 1, (rows, 1))
    if rng.random() < 0.7:
        lengths[0] = longest
    mask = (torch.arange(longest) < lengths).long()
    ids = ids.masked_fill(mask == 0, model.config.generator.pad_token_id)
    doc_scores = torch.randn(rows // n_docs, n_docs) * rng.choice([0.1, 1.0, 4.0])
    options = _options(rng, strategy, model.config.generator.vocab_size)
    modulus = rng.choice([2, 3, 7]) if rng.random() < 0.12 else None
    return Draw(seed, model, ids, mask, doc_scores, strategy, options, rng.random() < 0.75, modulus)


def _model(rng: random.Random, n_docs: int) -> RagTokenForGeneration:
    pad, bos = rng.choice([(1, 0), (1, 0), (1, 0), (0, 1)])
    generator = BartConfig(
        vocab_size=rng.choice([9, 14, 40, 120, 600]),
        d_model=rng.choice([16, 32]),
        encoder_layers=rng.choice([1, 2]),
        decoder_layers=rng.choice([1, 2]),
        encoder_attention_heads=rng.choice([1, 2, 4]),
        decoder_attention_heads=rng.choice([1, 2, 4]),
        encoder_ffn_dim=24,
        decoder_ffn_dim=rng.choice([16, 40]),
        max_position_embeddings=POSITIONS,
        activation_function=rng.choice(["gelu", "relu", "silu", "gelu_new", "tanh"]),
        scale_embedding=rng.random() < 0.3,
        tie_word_embeddings=rng.random() < 0.8,
        init_std=rng.choice([0.1, 0.3, 0.6]),
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=2,
        decoder_start_token_id=rng.choice([2, 2, bos, 3]),
        forced_eos_token_id=None,
    )
    encoder = DPRConfig(vocab_size=8, **_ENCODER)
    config = RagConfig.from_question_encoder_generator_configs(encoder, generator, n_docs=n_docs)
    bart = BartForConditionalGeneration(generator)
    bart.final_logits_bias = torch.randn_like(bart.final_logits_bias) * 0.5
    bart.final_logits_bias[0, 2] += rng.choice([-1.0, 0.0, 1.5, 3.0])
    bart.final_logits_bias[0, pad] += rng.choice([-2.0, 0.0, 1.5])
    model = RagTokenForGeneration(config=config, question_encoder=DPRQuestionEncoder(encoder), generator=bart).eval()
    if rng.random() < 0.2:
        model.generation_config.eos_token_id = [2, 4]
    return model


def _options(rng: random.Random, strategy: str, vocabulary: int) -> dict[str, Any]:
    num_beams = rng.choice([1, 1, 2, 3, 4, 6, 12])
    options: dict[str, Any] = {"num_beams": num_beams, "max_length": 1 + rng.choice([1, 2, 3, 6, 6, 10, 10, 16])}
    most = num_beams if strategy == "token" else 3 * num_beams
    options["num_return_sequences"] = rng.choice([1, 1, rng.randint(1, most)])
    if num_beams > 1:
        options["length_penalty"] = rng.choice([1.0, 1.0, 0.0, 0.4, 2.0, -1.0])
        options["early_stopping"] = rng.choice([False, True, "never"])
    elif rng.random() < 0.15:  # sampling from one token is a search as well
        options |= {"do_sample": True, "top_k": 1}
        options["num_return_sequences"] = 1
    return options | _processors(rng, vocabulary, options)


def _processors(rng: random.Random, vocabulary: int, search: dict[str, Any]) -> dict[str, Any]:
    def chance(probability: float) -> bool:
        return rng.random() < probability

    def token() -> int:
        return rng.randrange(3, vocabulary)

    options: dict[str, Any] = {}
    if chance(0.15):
        options["repetition_penalty"] = rng.choice([0.7, 1.3, 3.0])
    if chance(0.2):
        options["no_repeat_ngram_size"] = rng.choice([1, 2, 3])
    if chance(0.2):
        options[rng.choice(["min_length", "min_new_tokens"])] = rng.randint(1, search["max_length"])
    if chance(0.15):
        options["bad_words_ids"] = [[token()], [token(), token()]]
    if chance(0.15):
        options["suppress_tokens"] = [rng.randrange(6, vocabulary), vocabulary - 1]
    if chance(0.1):
        options["begin_suppress_tokens"] = [2, token()]
    if chance(0.15):
        options["sequence_bias"] = [[[token()], rng.uniform(-3, 3)], [[token(), token()], rng.uniform(-3, 3)]]
    if chance(0.2):
        options["forced_bos_token_id"] = rng.choice([0, 1, 5])
    if chance(0.4):
        options["forced_eos_token_id"] = 2 if "do_sample" in search else rng.choice([2, 2, [2, 4]])
    if chance(0.1):
        options["exponential_decay_length_penalty"] = (rng.randint(1, 4), 1.3)
    for flag in ("renormalize_logits", "remove_invalid_values"):
        if chance(0.12):
            options[flag] = True
    return options


class CorrectRagSequence(RagSequenceForGeneration):
    """transformers' class; ``get_nll`` gives an answer of one token its document prior, and is theirs otherwise."""

    def get_nll(self, seq_logits: Tensor, doc_scores: Tensor, target: Tensor, **options: Any) -> Tensor:
        theirs = super().get_nll(seq_logits, doc_scores, target, **options)
        pad, n_docs = self.config.generator.pad_token_id, self.config.n_docs
        labels = torch.nn.functional.pad(target[:, 1:], (0, 1), value=pad)
        opens_with_bos = bool((labels[:, 0] == self.config.generator.bos_token_id).all())
        log_probs = seq_logits.log_softmax(-1).view(len(labels), n_docs, *seq_logits.shape[1:])
        kept = log_probs.gather(-1, labels[:, None, :, None].expand(-1, n_docs, -1, 1)).squeeze(-1)
        kept = kept.masked_fill((labels == pad)[:, None], 0.0)[:, :, int(opens_with_bos) :]
        ours = -(kept.sum(2) + doc_scores.log_softmax(1)).logsumexp(1)
        return torch.where(labels[:, 1] == pad, ours, theirs)


def ends_in_padding(rows: Tensor, config: GenerationConfig, pad: int) -> Tensor:
    """What stands behind the first end-of-sequence token becomes padding: with pad id 0, transformers repeats it."""
    ends = torch.isin(rows[:, 1:], torch.tensor(config.eos_token_id)).long()
    behind = (ends.cumsum(1) - ends) > 0
    return torch.cat([rows[:, :1], rows[:, 1:].masked_fill(behind, pad)], 1)


def taken(made: Tensor | GenerateBeamEncoderDecoderOutput, pad: int) -> Tensor:
    """Beam search returns rows that no hypothesis took, with their first score, where the rules allow too few."""
    if isinstance(made, Tensor):
        return made
    rows = made.sequences[made.sequences_scores > REJECTED]
    return rows if len(rows) else torch.tensor([[int(made.sequences[0, 0]), pad]])


def theirs(drawn: Draw, question: int | None = None, returned: int | None = None, **rules: Any) -> list[list[int]]:
    """The answers of transformers, without the padding behind them; of one question or of all."""
    model = copy.deepcopy(drawn.model)
    n_docs, options = drawn.doc_scores.shape[1], dict(drawn.options)
    pad = model.config.generator.pad_token_id
    wanted = slice(None) if question is None else slice(question * n_docs, (question + 1) * n_docs)
    contexts = {
        "context_input_ids": drawn.ids[wanted],
        "context_attention_mask": drawn.mask[wanted],
        "doc_scores": drawn.doc_scores if question is None else drawn.doc_scores[question : question + 1],
    }
    if drawn.allowed_modulus:
        first = question or 0
        by_question = drawn.strategy == "token"
        rules["prefix_allowed_tokens_fn"] = lambda row, ids: drawn.allowed(first + row * by_question, ids)
    config = model.generation_config
    if options["num_beams"] > 1:
        rules |= {"return_dict_in_generate": True, "output_scores": True}
    if drawn.strategy == "token":
        rows = ends_in_padding(taken(model.generate(**contexts, **options, **rules), pad), config, pad)
    else:
        model = CorrectRagSequence(model.config, question_encoder=model.question_encoder, generator=model.generator)
        model.generator.generation_config = config
        inner = model.generator.generate

        def masked(input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
            found = inner(input_ids, attention_mask=contexts["context_attention_mask"], **kwargs)
            return ends_in_padding(taken(found, pad), config, pad)

        model.generator.generate = masked
        options["num_return_sequences"] = returned
        rows = model.eval().generate(**contexts, do_deduplication=drawn.deduplicate, **options, **rules)
    return [_answer(row, config) for row in rows.tolist()]


def ours(
    drawn: Draw, question: int | None = None, *, in_step: bool | None = None, **rules: Any
) -> list[list[list[int]]]:
    """The engine's answers, question by question; ``in_step`` as on CUDA, or not (None: every second draw)."""
    n_docs = drawn.doc_scores.shape[1]
    wanted = slice(None) if question is None else slice(question * n_docs, (question + 1) * n_docs)
    if drawn.allowed_modulus:
        rules["prefix_allowed_tokens_fn"] = lambda row, ids: drawn.allowed((question or 0) + row, ids)
    if drawn.strategy == "sequence":
        rules["deduplicate"] = drawn.deduplicate
    scores = drawn.doc_scores if question is None else drawn.doc_scores[question : question + 1]
    engine = RagEngine(in_memory(copy.deepcopy(drawn.model)))
    backend = engine._backend
    if (drawn.seed % 2 if in_step is None else in_step) and isinstance(backend, BartBackend):
        backend.use_lanes(capture=False)
    options = {**drawn.options, **rules}
    made = engine.generate(drawn.ids[wanted], drawn.mask[wanted], scores, strategy=drawn.strategy, **options)
    config = drawn.model.generation_config
    return [[_answer(row, config) for row in found.sequences.tolist()] for found in made.evidence]


def _answer(row: list[int], config: GenerationConfig) -> list[int]:
    """A row up to its first end-of-sequence token."""
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    end = next((at + 1 for at, token in enumerate(row) if at and token in eos), len(row))
    return row[:end]


def compare(drawn: Draw) -> str:
    """ "equal", or "tie" where that is proved, or "theirs crashes", or what differs."""
    found = ours(drawn)
    try:
        expected = _expected(drawn, found)
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):  # the rules leave a sampled row no token
            raise
        return "theirs crashes"
    different = [question for question, rows in enumerate(expected) if rows != found[question]]
    if all(tie(drawn, question, expected[question], found[question]) for question in different):
        return "tie" if different else "equal"
    return f"draw {drawn.seed}: {drawn.strategy} {drawn.options}\n theirs {expected}\n ours   {found}"


def _expected(drawn: Draw, found: list[list[list[int]]]) -> list[list[list[int]]]:
    if drawn.strategy == "sequence":
        return [theirs(drawn, question, returned=len(rows)) for question, rows in enumerate(found)]
    answers, each = theirs(drawn), drawn.options["num_return_sequences"]
    if len(answers) != each * len(found):  # too few were possible
        return [theirs(drawn, question) for question in range(len(found))]
    return [answers[at : at + each] for at in range(0, len(answers), each)]


class _Recorder(LogitsProcessor):
    """Keeps the hypotheses that are alive at each step, and changes nothing."""

    def __init__(self) -> None:
        self.alive: list[list[list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.alive.append(input_ids.tolist())
        return scores


def tie(drawn: Draw, question: int, expected: list[list[int]], found: list[list[int]]) -> bool:
    """Whether the two parted on candidates whose scores, in float64 by teacher forcing, are within 1e-5."""
    n_docs = drawn.doc_scores.shape[1]
    rows = range(question * n_docs, (question + 1) * n_docs)
    problems = [list(rows)] if drawn.strategy == "token" else [[row] for row in rows]
    for documents in problems:
        scores = drawn.doc_scores[question, [row - rows.start for row in documents]][None]
        model = copy.deepcopy(drawn.model)
        model.config.n_docs = len(documents)
        alone = Draw(
            drawn.seed, model, drawn.ids[documents], drawn.mask[documents], scores,
            drawn.strategy, drawn.options, drawn.deduplicate, None,
        )  # fmt: skip
        rules = {}
        if drawn.allowed_modulus:
            rules["prefix_allowed_tokens_fn"] = lambda _, ids: drawn.allowed(question, ids)
        a, b = _Recorder(), _Recorder()
        theirs(alone, returned=1, logits_processor=LogitsProcessorList([a]), **rules)
        ours(alone, logits_processor=LogitsProcessorList([b]), **rules)
        for step, (one, other) in enumerate(zip(a.alive, b.alive, strict=False)):
            for left, right in zip(one, other, strict=True):
                if left != right:
                    gap = search_score(alone, left, rules) - search_score(alone, right, rules)
                    return step > 0 and abs(gap) < TIE
    left, right = next(pair for pair in zip(expected, found, strict=True) if pair[0] != pair[1])
    score = final_score if drawn.strategy == "token" else rank_score
    return abs(score(drawn, question, left) - score(drawn, question, right)) < TIE


def teacher_forced(drawn: Draw, question: int, sequence: list[int]) -> tuple[Tensor, Tensor]:
    """Logits (N, T, V) and log p(z|x) (N,), both float64, from transformers' forward pass."""
    model = copy.deepcopy(drawn.model).double()
    n_docs = drawn.doc_scores.shape[1]
    rows = slice(question * n_docs, (question + 1) * n_docs)
    scores = drawn.doc_scores[question : question + 1].double()
    with torch.no_grad():
        logits = model(
            context_input_ids=drawn.ids[rows],
            context_attention_mask=drawn.mask[rows],
            doc_scores=scores,
            decoder_input_ids=torch.tensor([sequence[:-1]]),
            n_docs=n_docs,
            do_marginalize=False,
        ).logits
    return logits, scores[0].log_softmax(0)


def search_score(drawn: Draw, sequence: list[int], rules: dict[str, Any], question: int = 0) -> float:
    """What the search adds up for a hypothesis, processors included; greedy search sees its last token alone."""
    logits, prior = teacher_forced(drawn, question, sequence)
    greedy = drawn.options["num_beams"] == 1
    if drawn.strategy == "token":
        steps = (logits.log_softmax(-1) + prior[:, None, None]).logsumexp(0)
    else:
        steps = logits[0] if greedy else logits[0].log_softmax(-1)
    config, _ = drawn.model._prepare_generation_config(None, **{**drawn.options, "num_return_sequences": 1})
    drawn.model._prepare_special_tokens(config, True)
    one_beam = copy.copy(config)
    one_beam.num_beams = 1
    processors = drawn.model._get_logits_processor(one_beam, 1, device="cpu", **rules)
    total = 0.0
    for at, scores in enumerate(steps, start=1):
        seen = torch.tensor([sequence[:at]])
        gain = processors(seen, scores[None])[0, sequence[at]].item()
        total = gain if greedy else total + gain
    return total


def final_score(drawn: Draw, question: int, sequence: list[int]) -> float:
    """A finished hypothesis of RAG-Token's beam search: its score by its length."""
    rules = {}
    if drawn.allowed_modulus:
        rules["prefix_allowed_tokens_fn"] = lambda _, ids: drawn.allowed(question, ids)
    return search_score(drawn, sequence, rules, question) / (len(sequence) - 1) ** drawn.options.get(
        "length_penalty", 1.0
    )


def rank_score(drawn: Draw, question: int, sequence: list[int]) -> float:
    """RAG-Sequence's score of a candidate; a first token that all have in common may count or not: no order changes."""
    logits, prior = teacher_forced(drawn, question, sequence)
    labels = torch.tensor(sequence[1:])
    log_probs = logits.log_softmax(-1).gather(-1, labels[None, :, None].expand(len(prior), -1, 1))[..., 0]
    return (log_probs.masked_fill(labels == drawn.model.config.generator.pad_token_id, 0.0).sum(1) + prior).logsumexp(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("draws", type=int)
    parser.add_argument("--first", type=int, default=0)
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    counts = {"equal": 0, "tie": 0, "theirs crashes": 0, "different": 0}
    started = shown = time.monotonic()
    for done, seed in enumerate(range(asked.first, asked.first + asked.draws), start=1):
        try:
            outcome = compare(draw(seed))
        except Exception as error:  # noqa: BLE001  one of the two failed, which is a difference
            outcome = f"draw {seed}: {error!r}"
        counts[outcome if outcome in counts else "different"] += 1
        if outcome not in counts:
            sys.stdout.write(f"{outcome}\n")
        if time.monotonic() - shown > 5 or done == asked.draws:
            shown = time.monotonic()
            sys.stderr.write(f"{done}/{asked.draws} draws, {shown - started:.0f} s: {counts}\n")
    sys.stdout.write(f"{asked.draws} draws from {asked.first}: {counts}\n")
    return counts["different"] > 0


if __name__ == "__main__":
    sys.exit(main())
