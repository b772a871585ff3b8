"""Figures of merit: exact match as SQuAD counts it, recall of passages, and the separation of two populations."""

import re
import string
from collections.abc import Sequence

import numpy as np

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


def recall_at(k: int, ranked: Sequence[Sequence[int]], gold: Sequence[Sequence[int]]) -> float:
    """Share of questions that find one of their gold passages among the first `k`."""
    hits = [any(i in right for i in row[:k]) for row, right in zip(ranked, gold, strict=True)]
    return sum(hits) / len(hits)


def auroc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Probability that a positive scores above a negative, a tie counting half (area under the ROC curve)."""
    above = np.asarray(positives)[:, None] - np.asarray(negatives)[None, :]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())
