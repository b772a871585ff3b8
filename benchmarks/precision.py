"""What a precision costs in answers: the demo's held-out questions, answered in each dtype.

Random weights say little here, since they make close calls everywhere; a trained model is what people serve.
"""

import time
from dataclasses import dataclass

from services.demo.answering import Answer, DemoRag
from services.demo.corpus import build_corpus
from services.demo.evaluate import SEEDS
from services.demo.facts import load_entities
from services.demo.questions import question_set
from services.training.metrics import exact_match
from shared.schemas import Strategy

STRATEGIES: tuple[Strategy, ...] = ("token", "sequence")


@dataclass(frozen=True)
class Precision:
    """Shares of ``questions``: ``exact_match`` with the gold answer, and ``equal`` to the answer in float32.

    ``log_prob_gap``: the mean difference of log p(y|x) from float32's, over the answers that are equal.
    """

    dtype: str
    strategy: str
    questions: int
    exact_match: float
    equal: float
    log_prob_gap: float
    seconds: float


def precisions(dtypes: list[str], device: str, n_questions: int = 800) -> list[Precision]:
    """float32 is always measured, since the others are compared with it."""
    entities = load_entities()
    questions = question_set(entities, build_corpus(entities), "test", n_questions, seed=SEEDS["test"])
    found: list[Precision] = []
    float32: dict[str, list[Answer]] = {}
    for dtype in ["float32", *(dtype for dtype in dtypes if dtype != "float32")]:
        rag = DemoRag(device=device, dtype=dtype)
        for strategy in STRATEGIES:
            rag.answer([question.text for question in questions[:32]], strategy)
            began = time.perf_counter()
            answers = rag.answer([question.text for question in questions], strategy)
            seconds = time.perf_counter() - began
            reference = float32.setdefault(strategy, answers)
            pairs = list(zip(answers, reference, strict=True))
            gaps = [abs(a.log_prob - b.log_prob) for a, b in pairs if a.text == b.text]
            matches = [exact_match(a.text, question.answer) for a, question in zip(answers, questions, strict=True)]
            found.append(
                Precision(
                    dtype=dtype,
                    strategy=strategy,
                    questions=len(questions),
                    exact_match=sum(matches) / len(matches),
                    equal=len(gaps) / len(pairs),
                    log_prob_gap=sum(gaps) / max(1, len(gaps)),
                    seconds=seconds,
                )
            )
    return found
