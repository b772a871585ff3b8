"""Contexts against `RagRetriever.postprocess_docs`, and what happens where transformers would cut the question."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, RagConfig, RagRetriever

from generator_svc.contexts import Context, ContextForm, build_contexts, context_text, pad_contexts, question_form
from shared.errors import InvalidRequest
from tests.tiny_checkpoint import generator_tokenizer, question_tokenizer

TOKENIZER = generator_tokenizer()
MAX_TOKENS = 64
FORM = ContextForm("", " / ", " // ", MAX_TOKENS)
WORDS = st.text(
    st.sampled_from("abcXYZ 0123456789\"'.,?!/  éßø東京🏙️\u00a0\u0301") | st.characters(exclude_categories=["Cs"]),
    max_size=60,
)
SEPARATORS = st.sampled_from([" / ", " // ", "/", "", "  ", " [SEP] ", "\n", " | "])


def built(title: str, text: str, question: str, form: ContextForm, tokenizer: PreTrainedTokenizerBase) -> Context:
    [context] = build_contexts([(title, text)], question, form, tokenizer)
    return context


def transformers_ids(title: str, text: str, question: str, form: ContextForm) -> list[int]:
    """What transformers' retriever makes of one document, without its padding."""
    retriever = SimpleNamespace(
        generator_tokenizer=TOKENIZER,
        config=SimpleNamespace(title_sep=form.title_sep, doc_sep=form.doc_sep, max_combined_length=form.max_tokens),
    )
    docs = [{"title": [title], "text": [text]}]
    ids, mask = RagRetriever.postprocess_docs(retriever, docs, [question], form.prefix, 1)
    return ids[0][: sum(mask[0])]


@given(WORDS, WORDS, WORDS, st.tuples(st.sampled_from(["", " ", "answer: "]), SEPARATORS, SEPARATORS))
def test_contexts_that_fit_are_those_of_transformers(
    title: str, text: str, question: str, joints: tuple[str, str, str]
) -> None:
    form = ContextForm(*joints, max_tokens=1000)
    context = built(title, text, question, form, TOKENIZER)
    assert not context.truncated
    assert context.input_ids == transformers_ids(title, text, question, form)


@given(WORDS, WORDS.map(lambda text: text * 8), WORDS.map(lambda question: question[:12]), SEPARATORS, SEPARATORS)
def test_a_long_passage_is_cut_and_the_question_stays_whole(
    title: str, text: str, question: str, title_sep: str, doc_sep: str
) -> None:
    form = ContextForm("", title_sep, doc_sep, MAX_TOKENS)
    uncut = TOKENIZER(context_text(title, text, question, title_sep=title_sep, doc_sep=doc_sep))["input_ids"]
    context = built(title, text, question, form, TOKENIZER)
    assert len(context.input_ids) <= MAX_TOKENS
    assert context.truncated == (len(uncut) > MAX_TOKENS)
    # The ids are those of transformers for some beginning of the passage, with separator and question behind it.
    beginnings = [(title, text[:length]) for length in range(len(text) + 1)]
    beginnings += [(title[:length], "") for length in range(len(title))]
    assert any(
        context.input_ids == transformers_ids(cut_title, cut_text, question, form) for cut_title, cut_text in beginnings
    )


@given(st.lists(st.tuples(WORDS, WORDS.map(lambda text: text * 4)), max_size=6))
def test_passages_do_not_touch_each_other(passages: list[tuple[str, str]]) -> None:
    together = build_contexts(passages, "who?", FORM, TOKENIZER)
    assert together == [built(*passage, "who?", FORM, TOKENIZER) for passage in passages]


def test_a_cut_never_shortens_a_number() -> None:
    text = "It has 2138551 inhabitants. " * 20
    question = "how many people live in paris?"
    context = built("Paris", text, question, FORM, TOKENIZER)
    read = TOKENIZER.decode(context.input_ids, skip_special_tokens=True)
    passage, asked = read.split(" // ")
    assert asked == question
    assert set(passage.split()) == {"Paris", "/", "It", "has", "2138551", "inhabitants."}


def test_as_much_of_the_passage_is_kept_as_fits() -> None:
    words = ["Seine"] * 60
    context = built("Paris", " ".join(words), "where?", FORM, TOKENIZER)
    kept = TOKENIZER.decode(context.input_ids).count("Seine")
    one_more = TOKENIZER(FORM.text("Paris", " ".join(words[: kept + 1]), "where?"))["input_ids"]
    assert len(context.input_ids) <= MAX_TOKENS < len(one_more)


def test_a_single_endless_word_is_cut_within() -> None:
    context = built("t", "x" * 500, "who?", FORM, TOKENIZER)
    assert len(context.input_ids) == MAX_TOKENS
    assert TOKENIZER.decode(context.input_ids, skip_special_tokens=True).endswith("x // who?")


def test_a_book_is_cut_like_a_page() -> None:
    page, book = ("Seine and more " * n for n in (100, 100_000))
    assert built("t", book, "who?", FORM, TOKENIZER) == built("t", page, "who?", FORM, TOKENIZER)


def test_a_long_title_gives_way_after_the_text() -> None:
    context = built("Seine " * 100, "text", "who?", FORM, TOKENIZER)
    read = TOKENIZER.decode(context.input_ids, skip_special_tokens=True)
    assert read.endswith(" / // who?")
    assert set(read.split(" / ")[0].split()) == {"Seine"}


def test_a_question_that_does_not_fit_by_itself_is_refused() -> None:
    with pytest.raises(InvalidRequest) as refused:
        built("t", "text", "who? " * 100, FORM, TOKENIZER)
    assert refused.value.param == "question"


def test_the_question_has_the_form_that_checkpoints_were_trained_on() -> None:
    assert question_form("How many people live in Paris ?", question_tokenizer()) == "how many people live in paris?"
    assert question_form("Who's high, it's what?", question_tokenizer()) == "who's high, it's what?"


@pytest.mark.parametrize(
    ("generator_prefix", "rag_prefix", "used"),
    [(None, None, ""), ("g: ", None, "g: "), ("g: ", "r: ", "g: "), (None, "r: ", "r: "), ("", "r: ", "")],
)
def test_the_generators_prefix_comes_before_the_rag_configs(
    generator_prefix: str | None, rag_prefix: str | None, used: str
) -> None:
    config = RagConfig(prefix=rag_prefix)
    config.generator.prefix = generator_prefix
    assert ContextForm.of(config, 300).prefix == used


def test_padding_goes_to_the_longest_of_the_batch() -> None:
    ids, mask = pad_contexts([[0, 7, 2], [0, 2]], pad_token_id=1)
    assert ids.tolist() == [[0, 7, 2], [0, 2, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
