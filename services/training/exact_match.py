"""Exact match as SQuAD counts it."""

import re
import string

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower-case, without punctuation, articles and surplus spaces.

    Source: the evaluation script of SQuAD 1.1 (Rajpurkar et al., arXiv 1606.05250).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> bool:
    """Whether two answers are the same after `normalize_answer`."""
    return normalize_answer(answer) == normalize_answer(gold)
