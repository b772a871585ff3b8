"""The text that the generator reads: a passage, then the question in the form published checkpoints saw."""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, RagConfig

from shared.errors import InvalidRequest

# A passage of so many characters is not tokenized to find that it is too long for a thousand tokens.
_BOOK_CHARS = 50_000
# The space before a beginning's last word, and that word.
_LAST_PART_OF_A_WORD = re.compile(r"(?<=\S)\s+\S+\Z")

# transformers 4's `clean_up_tokenization`, in its order: RAG checkpoints were trained on what it returns.
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def question_form(question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The question as the generator knows it: decoded from the question encoder's ids, then cleaned up.

    transformers' retriever receives token ids only and decodes them, so an uncased encoder hands the
    generator a lower-cased question: "How many people live in Paris?" becomes "how many people live in
    paris?". Version 5 dropped the clean-up ("paris ?"), which the checkpoints never saw; it is done here
    whatever the tokenizer's settings.

    Source: `RagRetriever.__call__` of transformers 4 and 5 (`models/rag/retrieval_rag.py`).
    """
    token_ids = tokenizer(question, truncation=True)["input_ids"]
    return cleaned_up(str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)))


def cleaned_up(decoded: str) -> str:
    """What transformers 4 made of a decoded question: "paris ?" becomes "paris?"."""
    for spaced, joined in _CLEAN_UP:
        decoded = decoded.replace(spaced, joined)
    return decoded


def context_text(
    title: str, text: str, question: str, *, prefix: str = "", title_sep: str = " / ", doc_sep: str = " // "
) -> str:
    """``prefix + title + title_sep + text + doc_sep + question``, exactly as transformers joins them.

    One leading and one trailing double quote of the title are dropped (DPR's Wikipedia dump quotes its
    titles), and double spaces are collapsed once. `question` is expected in `question_form`.

    Source: `RagRetriever.postprocess_docs` of transformers (`models/rag/retrieval_rag.py`).
    """
    title = title.removeprefix('"').removesuffix('"')
    return f"{prefix}{title}{title_sep}{text}{doc_sep}{question}".replace("  ", " ")


@dataclass(frozen=True)
class ContextForm:
    """How a checkpoint joins a passage and a question, and how long the result may be."""

    prefix: str
    title_sep: str
    doc_sep: str
    max_tokens: int  # special tokens included

    @classmethod
    def of(cls, config: RagConfig, max_tokens: int) -> Self:
        """The form that `config` asks for.

        The prefix is ``config.generator.prefix``, as transformers' retriever takes it. Where that is unset, it is
        ``config.prefix``, which `RagConfig` documents ("prepended to every input before passing to the generator
        model") and transformers never reads.
        """
        prefix = getattr(config.generator, "prefix", None)
        if prefix is None:
            prefix = config.prefix or ""
        return cls(prefix, config.title_sep, config.doc_sep, max_tokens)

    def text(self, title: str, text: str, question: str) -> str:
        return context_text(title, text, question, prefix=self.prefix, title_sep=self.title_sep, doc_sep=self.doc_sep)


@dataclass(frozen=True)
class Context:
    """What the generator reads of one document: `input_ids` unpadded, with special tokens."""

    input_ids: list[int]
    truncated: bool


def build_contexts(
    passages: Sequence[tuple[str, str]], question: str, form: ContextForm, tokenizer: PreTrainedTokenizerBase
) -> list[Context]:
    """Tokenize each passage, a (title, text), with the question; `question` is expected in `question_form`.

    Where one is too long, transformers cuts at the right and loses the question. Here the passage gives way: its text
    is cut after the last whole word that fits, so that no number is ever shortened into another number, and if need
    be its title too. The ids are those that transformers gives for the passage so cut, separator, question and
    end-of-sequence token included.

    Raises:
        InvalidRequest: the question does not fit by itself.
    """
    pages = [passage for passage in passages if sum(map(len, passage)) < _BOOK_CHARS]
    ids: list[list[int]] = []
    if pages:  # one call for all: a call costs as much as its tokens
        ids = tokenizer([form.text(title, text, question) for title, text in pages], verbose=False)["input_ids"]
    whole = dict(zip(pages, ids, strict=True))
    return [
        Context(whole[passage], truncated=False)
        if passage in whole and len(whole[passage]) <= form.max_tokens
        else _cut_context(*passage, question, form, tokenizer)
        for passage in passages
    ]


def _cut_context(
    title: str, text: str, question: str, form: ContextForm, tokenizer: PreTrainedTokenizerBase
) -> Context:
    def tokens(title: str, text: str) -> list[int]:
        ids: list[int] = tokenizer(form.text(title, text, question), verbose=False)["input_ids"]
        return ids

    def fits(title: str, text: str) -> bool:
        return len(tokens(title, text)) <= form.max_tokens

    if not fits("", ""):
        raise InvalidRequest(
            f"the question takes more than the {form.max_tokens} tokens that the generator reads, without any passage",
            param="question",
        )
    if fits(title, ""):
        text = _longest_fitting(text, lambda text: fits(title, text))
    else:
        title, text = _longest_fitting(title, lambda title: fits(title, "")), ""
    return Context(tokens(title, text), truncated=True)


def _longest_fitting(text: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning of `text` that fits and ends with a whole word; with part of one, if its first is too long.

    A longer beginning has more tokens, but for rare merges at its end, so the length is found by doubling and
    bisection, and then made sure of.
    """
    bound = 64
    while bound < len(text) and fits(text[:bound]):
        bound *= 2
    length = bisect_left(range(min(bound, len(text)) + 1), True, key=lambda length: not fits(text[:length])) - 1
    kept = text[: max(length, 0)]
    if _LAST_PART_OF_A_WORD.search(kept) and text[len(kept) : len(kept) + 1].strip():
        kept = _LAST_PART_OF_A_WORD.sub("", kept)
    while not fits(kept) and kept:
        kept = kept[:-1]
    return kept


def pad_contexts(
    contexts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Context ids and attention mask, both (B·N, S) int64, padded at the right to the longest of this batch.

    transformers pads every context to ``max_combined_length``; with the mask, the result is the same.
    """
    longest = max(len(ids) for ids in contexts)
    context_input_ids = torch.full((len(contexts), longest), pad_token_id, dtype=torch.int64)
    context_attention_mask = torch.zeros_like(context_input_ids)
    for row, ids in enumerate(contexts):
        context_input_ids[row, : len(ids)] = torch.tensor(ids)
        context_attention_mask[row, : len(ids)] = 1
    return context_input_ids.to(device), context_attention_mask.to(device)
