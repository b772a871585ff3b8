"""The engine against transformers over random models, inputs and options; and docs/parity.md, both sides pinned.

`make parity N=5000` runs more draws than fit here.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, RagSequenceForGeneration

from generator_svc.engine import RagEngine
from generator_svc.engine.heads import rank_scores
from generator_svc.engine.options import HONOURED, INDIFFERENT, REFUSED
from shared.errors import InvalidRequest, StartupError
from tests import parity
from tests.parity import Draw, compare, draw, in_memory
from tests.tiny_checkpoint import tiny_model

PAD, EOS, BOS = 1, 2, 0
BLOCK = 20
pytestmark = pytest.mark.filterwarnings("ignore:Unfeasible length constraints")  # transformers', of some draws


@pytest.mark.parametrize("first", range(0, 200, BLOCK))
def test_token_ids_are_those_of_transformers(first: int) -> None:
    outcomes = [compare(draw(seed)) for seed in range(first, first + BLOCK)]
    assert set(outcomes) <= {"equal", "tie", "theirs crashes"}, "\n".join(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(200, 600, BLOCK))
def test_token_ids_are_those_of_transformers_on_more_draws(first: int) -> None:
    outcomes = [compare(draw(seed)) for seed in range(first, first + BLOCK)]
    assert set(outcomes) <= {"equal", "tie", "theirs crashes"}, "\n".join(outcomes)


def test_the_proof_of_a_tie_fails_where_there_is_none_and_holds_where_there_is_one() -> None:
    """Tokens 5 and 6 are made alike in every way, so that to take one for the other is a tie, and 7 is none."""
    drawn = draw(0)
    drawn.options.clear()
    drawn.options.update(num_beams=3, max_length=4, num_return_sequences=1)
    bart = drawn.model.generator
    for weight in (bart.model.shared.weight.data, bart.lm_head.weight.data, bart.final_logits_bias[0]):
        weight[6] = weight[5]
    start = drawn.model.generation_config.decoder_start_token_id
    assert parity.tie(drawn, 0, [[start, 5, 9, 2]], [[start, 6, 9, 2]])
    assert not parity.tie(drawn, 0, [[start, 5, 9, 2]], [[start, 7, 9, 2]])


# --- options -----------------------------------------------------------------------------------------------


def test_every_option_of_transformers_is_honoured_or_refused_or_has_no_effect() -> None:
    known = set(vars(GenerationConfig()))
    assert known - INDIFFERENT - set(REFUSED) == HONOURED
    assert not HONOURED & set(REFUSED)
    assert not INDIFFERENT & (HONOURED | set(REFUSED))


@pytest.mark.parametrize("name", sorted(set(REFUSED) | {"streamer", "pad_token_id", "use_cache", "num_beam"}))
def test_what_a_call_cannot_have_is_refused_by_name(name: str) -> None:
    engine = RagEngine(in_memory(tiny_model()))
    with pytest.raises(InvalidRequest, match=f"^{name} cannot be honoured: ") as refusal:
        engine.task([torch.tensor([0, 7, 2])], torch.zeros(1), **{name: 2})
    assert refusal.value.param == name


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_checkpoint_that_asks_for_what_cannot_be_honoured_is_refused(name: str) -> None:
    model = tiny_model()
    setattr(model.generation_config, name, 1.5)
    with pytest.raises(StartupError, match=f"ask for {name}=1.5"):
        RagEngine(in_memory(model))


def test_a_checkpoint_may_say_what_changes_nothing() -> None:
    model = tiny_model()
    for name, value in {"encoder_repetition_penalty": 1.0, "num_beam_groups": 1, "penalty_alpha": 0.0}.items():
        setattr(model.generation_config, name, value)
    model.generation_config.use_cache = model.generation_config.output_scores = True
    made = RagEngine(in_memory(model)).generate(*contexts(0, n_questions=1), max_new_tokens=4)
    assert len(made.sequences) == 1


def test_an_unknown_setting_of_a_checkpoint_is_refused() -> None:
    model = tiny_model()
    model.generation_config.num_beam = 4
    with pytest.raises(StartupError, match="num_beam=4, which cannot be honoured"):
        RagEngine(in_memory(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, "temperature has an effect only with do_sample"),
        ({"top_k": 5}, "top_k has an effect only with do_sample"),
        ({"seed": 5}, "seed has an effect only with do_sample"),
        ({"length_penalty": 2.0}, "length_penalty has an effect only with num_beams above 1"),
        ({"early_stopping": True}, "early_stopping has an effect only with num_beams above 1"),
        ({"deduplicate": False, "strategy": "token"}, "deduplicate has an effect only with strategy 'sequence'"),
        ({"max_length": 5, "max_new_tokens": 4}, "not both"),
        ({"max_new_tokens": 0}, "at least 2"),
        ({"num_beams": 2, "do_sample": True}, "beam_sample is not supported"),
    ],
    ids=str,
)
def test_an_option_without_effect_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        RagEngine(in_memory(tiny_model())).task([torch.tensor([0, 7, 2])], torch.zeros(1), **options)


def test_a_minimum_of_new_tokens_replaces_the_checkpoints_minimum() -> None:
    model = tiny_model(eos_bias=30.0, forced_eos=False)
    model.generation_config.min_length = 7
    engine = RagEngine(in_memory(model))
    for strategy in ("token", "sequence"):
        made = engine.generate(*contexts(1, n_questions=1), strategy=strategy, min_new_tokens=2, max_new_tokens=9)
        assert made.sequences.shape[1] == 1 + 3  # two tokens, and the end


@pytest.mark.parametrize(("strategy", "length"), [("token", 20), ("sequence", 21)])
def test_without_a_length_answers_end_where_transformers_would_end_them(strategy: str, length: int) -> None:
    engine = RagEngine(in_memory(tiny_model(eos_bias=-30.0)))
    assert engine.generate(*contexts(1, n_questions=1), strategy=strategy).sequences.shape[1] == length


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[5, 6, 7]], [[0, 1, 1]], "padded at the right"),
        ([[5, 6, 7]], [[1, 0, 1]], "padded at the right"),
        ([[5, 6, 7]], [[0, 0, 0]], "each of them a token"),
        ([[5] * 161], [[1] * 161], "positions for 160 tokens"),
    ],
)
def test_contexts_that_would_be_misread_are_refused(ids: list[list[int]], mask: list[list[int]], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        RagEngine(in_memory(tiny_model())).generate(torch.tensor(ids), torch.tensor(mask), torch.zeros(1, 1))


# --- docs/parity.md: what transformers does, what we do -----------------------------------------------------


def contexts(seed: int, n_questions: int = 2, n_docs: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = n_questions * n_docs
    ids = torch.randint(5, 300, (rows, 14), generator=generator)
    mask = (torch.arange(14) < torch.randint(4, 15, (rows, 1), generator=generator)).long()
    return ids.masked_fill(mask == 0, PAD), mask, torch.randn(n_questions, n_docs, generator=generator)


def named(batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("context_input_ids", "context_attention_mask", "doc_scores"), batch, strict=True))


def sequence_model(**options: Any) -> RagSequenceForGeneration:
    model = tiny_model(**options)
    made = RagSequenceForGeneration(
        model.config, question_encoder=model.question_encoder, generator=model.generator
    ).eval()
    made.generator.generation_config = model.generation_config
    return made


def test_rag_sequence_reads_padding_as_text_in_transformers() -> None:
    batch = contexts(2, n_questions=6)
    narrow = named(batch)
    wide = {**narrow, "context_input_ids": torch.nn.functional.pad(batch[0], (0, 20), value=PAD)}
    wide["context_attention_mask"] = torch.nn.functional.pad(batch[1], (0, 20))
    model, engine = sequence_model(), RagEngine(in_memory(tiny_model()))
    assert answers(model.generate(**narrow, max_length=9)) != answers(model.generate(**wide, max_length=9))
    ours = [engine.generate(**given, strategy="sequence", max_length=9) for given in (narrow, wide)]
    assert answers(ours[0].sequences) == answers(ours[1].sequences)


def test_rag_token_ignores_max_new_tokens_in_transformers() -> None:
    model, batch = tiny_model(eos_bias=-30.0), named(contexts(3))
    assert model.generate(**batch, max_new_tokens=4).shape[1] == 20
    assert RagEngine(in_memory(model)).generate(**batch, strategy="token", max_new_tokens=4).sequences.shape[1] == 5


def test_rag_token_gives_one_sample_for_three_in_transformers() -> None:
    model, batch = tiny_model(), named(contexts(3))
    options = {"do_sample": True, "num_return_sequences": 3, "max_length": 6}
    assert len(model.generate(**batch, **options)) == 2
    made = RagEngine(in_memory(model)).generate(**batch, strategy="token", seed=0, **options)
    assert made.question.tolist() == [0, 0, 0, 1, 1, 1]


def test_rag_sequence_crashes_in_transformers_where_candidates_are_fewer_than_asked_for() -> None:
    ids, mask, scores = contexts(4, n_questions=1)
    batch = named((ids[:1].repeat(3, 1), mask[:1].repeat(3, 1), scores))
    with pytest.raises(RuntimeError, match="out of range"):
        sequence_model().generate(**batch, num_return_sequences=2, max_length=9)
    made = RagEngine(in_memory(tiny_model())).generate(
        **batch, strategy="sequence", num_return_sequences=2, max_length=9
    )
    assert len(made.sequences) == 1


def test_rag_sequence_takes_no_other_number_of_documents_in_transformers() -> None:
    batch = named(contexts(5, n_docs=2))  # the configuration says 3
    with pytest.raises(AssertionError):
        sequence_model().generate(**batch, n_docs=2, max_length=9)
    made = RagEngine(in_memory(tiny_model())).generate(**batch, n_docs=2, strategy="sequence", max_length=9)
    assert made.doc_posterior.shape == (2, 2)


def test_rag_sequence_passes_the_documents_index_to_prefix_allowed_tokens_fn_in_transformers() -> None:
    batch = named(contexts(6))
    seen: dict[str, set[int]] = {"theirs": set(), "ours": set()}

    def allowed(who: str, index: int) -> list[int]:
        seen[who].add(index)
        return list(range(300))

    sequence_model().generate(**batch, max_length=4, prefix_allowed_tokens_fn=lambda i, _: allowed("theirs", i))
    engine = RagEngine(in_memory(tiny_model()))
    engine.generate(
        **batch, strategy="sequence", max_length=4, prefix_allowed_tokens_fn=lambda i, _: allowed("ours", i)
    )
    assert seen == {"theirs": {0, 1, 2}, "ours": {0, 1}}


def test_an_answer_of_one_token_loses_the_documents_prior_in_transformers() -> None:
    model = sequence_model()
    logits, scores = torch.randn(3, 2, 40), torch.tensor([[4.0, 0.0, -4.0]])
    one_token = torch.tensor([[EOS, EOS]])
    log_probs = logits.log_softmax(-1)[:, 0, EOS]
    theirs = -model.get_nll(logits, scores, one_token)
    assert theirs.item() == pytest.approx(log_probs.logsumexp(0).item(), abs=1e-5)
    prior = scores[0].log_softmax(0)
    ours = rank_scores(log_probs.view(1, 3, 1), one_token[:, 1:], prior, BOS, PAD)
    assert ours.item() == pytest.approx((log_probs + prior).logsumexp(0).item(), abs=1e-5)


def test_a_first_token_that_all_candidates_share_counts_in_the_probability_and_not_in_the_order() -> None:
    """``exclude_bos_score`` is kept for the order, since it is part of which answer comes first."""
    labels = torch.tensor([[BOS, 7, EOS], [BOS, 9, EOS]])
    log_probs = torch.tensor([[[-5.0, -1.0, -1.0], [-0.1, -2.0, -1.0]], [[-5.0, -3.0, -1.0], [-0.1, -1.9, -1.0]]])
    prior = torch.tensor([0.5, 0.5]).log()
    dropped = (log_probs[:, :, 1:].sum(2) + prior).logsumexp(1)
    assert torch.allclose(rank_scores(log_probs, labels, prior, BOS, PAD), dropped)
    labels[1, 0] = 8  # one candidate opens otherwise, and the score of the other changes
    assert torch.allclose(rank_scores(log_probs, labels, prior, BOS, PAD), (log_probs.sum(2) + prior).logsumexp(1))


def test_settings_saved_with_a_model_count_for_both_heads() -> None:
    """RAG-Sequence in transformers asks its generator's settings, which are not saved, and `num_beams` not at all."""
    model = tiny_model(eos_bias=-30.0)
    model.generation_config.max_length, model.generation_config.num_beams = 7, 3
    theirs = RagSequenceForGeneration(model.config, question_encoder=model.question_encoder, generator=model.generator)
    batch = named(contexts(7))
    with pytest.warns(UserWarning, match="model-agnostic default"):
        assert theirs.eval().generate(**batch).shape[1] == 21
    engine = RagEngine(in_memory(model))
    for strategy in ("token", "sequence"):
        assert engine.generate(**batch, strategy=strategy).sequences.shape[1] == 7
        task = engine.task([torch.tensor([0, 7, 2])], torch.zeros(1), strategy=strategy)
        assert task.config.num_beams == 3


def test_rows_that_no_hypothesis_took_are_answers_in_transformers_and_none_of_ours() -> None:
    model, batch = tiny_model(), named(contexts(8, n_questions=1))
    options = {"num_beams": 4, "num_return_sequences": 4, "max_length": 2, "forced_eos_token_id": EOS}
    assert model.generate(**batch, **options).tolist()[-1] == [EOS, PAD]
    assert RagEngine(in_memory(model)).generate(**batch, strategy="token", **options).sequences.tolist() == [[EOS, EOS]]


def test_rag_tokens_beams_go_wrong_with_a_static_cache_in_transformers() -> None:
    batch = named(contexts(9, n_questions=4))
    options = {"num_beams": 4, "max_length": 10}
    model = tiny_model()
    right = model.generate(**batch, **options)
    wrong = tiny_model().generate(**batch, **options, cache_implementation="static")
    assert answers(wrong) != answers(right)
    model.generation_config.cache_implementation = "static"  # a checkpoint may ask for it
    made = RagEngine(in_memory(model)).generate(**batch, strategy="token", **options)
    assert answers(made.sequences) == answers(right)


@pytest.mark.parametrize("name", ["input_ids", "decoder_input_ids", "streamer", "stop_strings", "num_beam_groups"])
def test_what_crashes_or_is_overlooked_in_transformers_is_refused_by_name(name: str) -> None:
    """Own contexts given with ``input_ids`` are retrieved anew there; a decoder prompt is dropped or crashes."""
    with pytest.raises(InvalidRequest, match=f"^{name} cannot be honoured"):
        RagEngine(in_memory(tiny_model())).generate(*contexts(1), **{name: torch.tensor([[EOS, 7]])})


def test_a_label_of_minus_100_crashes_in_transformers_and_is_refused_here() -> None:
    batch, labels = named(contexts(1, n_questions=1)), torch.tensor([[EOS, 7, EOS, -100]])
    with pytest.raises((IndexError, RuntimeError)):
        tiny_model()(**batch, labels=labels)
    with pytest.raises(InvalidRequest, match="token ids go from 0"):
        RagEngine(in_memory(tiny_model())).score(**batch, sequences=labels)


@pytest.mark.parametrize("rows", [[[7, EOS]], [[EOS]]], ids=["another start", "no token"])
def test_an_answer_that_is_no_sequence_of_the_decoder_is_refused(rows: list[list[int]]) -> None:
    with pytest.raises(InvalidRequest, match="decoder's start token 2 and a token at least"):
        RagEngine(in_memory(tiny_model())).score(*contexts(1, n_questions=1), torch.tensor(rows))


def test_fast_decoding_without_deduplication_gives_equal_answers_equal_numbers() -> None:
    ids, mask, scores = contexts(4, n_questions=1)
    same = (ids[:1].repeat(3, 1), mask[:1].repeat(3, 1), scores)  # three documents alike propose one answer
    rules: dict[str, Any] = {"strategy": "sequence", "num_return_sequences": 3, "max_length": 9}
    engine = RagEngine(in_memory(tiny_model()))
    fast = engine.generate(*same, decoding="fast", deduplicate=False, **rules)
    thorough = engine.generate(*same, deduplicate=False, **rules)
    assert fast.log_probs.tolist() == pytest.approx(thorough.log_probs.tolist(), abs=1e-4)


@pytest.mark.parametrize("rules", [{"strategy": "token"}, {"strategy": "sequence"}], ids=str)
def test_where_the_rules_leave_nothing_to_be_said_the_answer_is_empty(rules: dict[str, Any]) -> None:
    everything = list(range(len(tiny_model().generator.get_input_embeddings().weight)))
    engine = RagEngine(in_memory(tiny_model(forced_eos=False)))
    made = engine.generate(
        *contexts(1, n_questions=1), num_beams=2, max_length=5, bad_words_ids=[[token] for token in everything],
        suppress_tokens=everything, **rules,
    )  # fmt: skip
    assert made.sequences.tolist() == [[EOS, PAD]]


def test_with_padding_id_0_transformers_fills_up_with_ends_and_counts_them() -> None:
    drawn = next(
        drawn
        for drawn in map(draw, range(500))
        if drawn.model.config.generator.pad_token_id == 0
        and drawn.strategy == "token"
        and drawn.options["num_beams"] > 1
        and len({len(row) for rows in parity.ours(drawn) for row in rows}) > 1
    )
    raw = drawn.model.generate(**named((drawn.ids, drawn.mask, drawn.doc_scores)), **plain(drawn))
    made = RagEngine(in_memory(copy.deepcopy(drawn.model))).generate(
        drawn.ids, drawn.mask, drawn.doc_scores, strategy="token", **drawn.options
    )
    assert (raw[:, -1] == 2).sum() > (made.sequences[:, -1] == 2).sum()
    assert compare(drawn) == "equal"


def plain(drawn: Draw) -> dict[str, Any]:
    rules = dict(drawn.options)
    if drawn.allowed_modulus:
        rules["prefix_allowed_tokens_fn"] = drawn.allowed
    return rules


def answers(rows: Tensor) -> list[list[int]]:
    return [[token for token in row if token != PAD] for row in rows.tolist()]
