"""How well the demo answers, on entities that training never saw and with passages that it has to find.

    python -m services.demo.evaluate

Beside it stands the same reader without passages ("closed book"): what it gets right, it remembers or guesses.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from services.demo.answering import Answer, DemoRag
from services.demo.build import CHECKPOINT, PASSAGES
from services.demo.corpus import build_corpus
from services.demo.facts import KINDS, load_entities
from services.demo.questions import Question, question_set, unanswerable_questions
from services.training.metrics import auroc, exact_match, recall_at

SEEDS = {"test": 11, "held-out wording": 12, "dev": 21}
KEPT = 0.95
"""Share of answerable dev questions that the suggested `min_probability` must let through."""
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)

Report = dict[str, Any]


def evaluate_demo(
    checkpoint: Path = CHECKPOINT, passages: Path = PASSAGES, *, n_questions: int = 800, n_unanswerable: int = 100
) -> Report:
    """Measure everything. Half as many questions are asked in wordings that were kept out of training."""
    rag = DemoRag(checkpoint, passages)
    entities = load_entities()
    corpus = build_corpus(entities)
    sets = {
        "test": question_set(entities, corpus, "test", n_questions, seed=SEEDS["test"]),
        "held-out wording": question_set(
            entities,
            corpus,
            "test",
            max(1, n_questions // 2),
            held_out_patterns=True,
            seed=SEEDS["held-out wording"],
        ),
    }
    report: Report = {"passages": len(corpus), "encoder": rag.encoder}
    answered: dict[str, list[Answer]] = {}
    for name, questions in sets.items():
        texts = [question.text for question in questions]
        answers = {
            "token": rag.answer(texts, "token"),
            "sequence": rag.answer(texts, "sequence"),
            "closed book": rag.answer(texts, "token", closed_book=True),
        }
        report[name] = dict(_figures(questions, answers))
        answered[name] = answers["token"]
    dev = question_set(entities, corpus, "dev", max(1, n_questions // 2), seed=SEEDS["dev"])
    report["abstention"] = _abstention(
        sets["test"],
        answered["test"],
        rag.answer(unanswerable_questions(entities, n_unanswerable), "token"),
        rag.answer([question.text for question in dev], "token"),
    )
    return report


def _figures(
    questions: Sequence[Question], answers: Mapping[str, Sequence[Answer]]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Recall and exact match of all questions, then of each kind."""
    rows: dict[str, list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        rows["all"].append(i)
        rows[question.kind].append(i)
    for name in ("all", *KINDS):
        chosen = rows[name]
        if not chosen:
            continue
        gold = [questions[i].gold for i in chosen]
        ranked = [answers["token"][i].passages for i in chosen]
        yield (
            name,
            {
                "n": len(chosen),
                "recall@1": recall_at(1, ranked, gold),
                "recall@5": recall_at(5, ranked, gold),
                **{
                    head: sum(exact_match(given[i].text, questions[i].answer) for i in chosen) / len(chosen)
                    for head, given in answers.items()
                },
            },
        )


def _abstention(
    questions: Sequence[Question],
    answerable: Sequence[Answer],
    unanswerable: Sequence[Answer],
    dev: Sequence[Answer],
) -> Report:
    """How well a caller can tell the unanswerable questions; `dev` sets the threshold and the scales."""
    signals: dict[str, Callable[[Answer], float]] = {
        "answer probability": lambda answer: answer.log_prob,
        "retrieval score": lambda answer: answer.top_score,
        "sum of both, standardised": lambda answer: (
            _standardised(answer.log_prob, [a.log_prob for a in dev])
            + _standardised(answer.top_score, [a.top_score for a in dev])
        ),
    }
    correct = [
        exact_match(answer.text, question.answer) for question, answer in zip(questions, answerable, strict=True)
    ]

    def at(threshold: float) -> dict[str, float]:
        kept = [answer.probability >= threshold for answer in answerable]
        return {
            "min_probability": threshold,
            "answerable kept": sum(kept) / len(kept),
            "exact match of those kept": sum(c for c, k in zip(correct, kept, strict=True) if k) / max(1, sum(kept)),
            "unanswerable refused": sum(answer.probability < threshold for answer in unanswerable) / len(unanswerable),
        }

    return {
        "n": {"answerable": len(answerable), "unanswerable": len(unanswerable)},
        "auroc": {
            name: auroc([signal(a) for a in answerable], [signal(a) for a in unanswerable])
            for name, signal in signals.items()
        },
        "suggested": at(round(sorted(answer.probability for answer in dev)[int(len(dev) * (1 - KEPT))], 2)),
        "thresholds": [at(threshold) for threshold in THRESHOLDS],
    }


def _standardised(value: float, reference: Sequence[float]) -> float:
    return (value - statistics.mean(reference)) / (statistics.pstdev(reference) or 1.0)


def print_report(report: Report, console: Console) -> None:
    """The figures as tables."""
    console.print(f"{report['passages']} passages, encoder {report['encoder']}", highlight=False)
    for name, title in (
        ("test", "Entities held out of training, retrieved passages"),
        ("held-out wording", "The same, asked in wordings held out of training"),
    ):
        table = Table(title=title, title_justify="left")
        table.add_column("kind")
        for heading in ("n", "recall@1", "recall@5", "EM Token", "EM Sequence", "EM closed book"):
            table.add_column(heading, justify="right")
        for kind, row in report[name].items():
            table.add_row(kind, str(row["n"]), *(f"{value:.1%}" for key, value in row.items() if key != "n"))
        console.print(table)
    _print_abstention(report["abstention"], console)


def _print_abstention(abstention: Report, console: Console) -> None:
    counts = abstention["n"]
    table = Table(
        title=f"{counts['answerable']} questions that the corpus answers, {counts['unanswerable']} that it cannot",
        title_justify="left",
    )
    table.add_column("signal")
    table.add_column("AUROC", justify="right")
    for name, value in abstention["auroc"].items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    table = Table(title="With min_probability", title_justify="left")
    for heading in ("min_probability", "answerable kept", "EM of those kept", "unanswerable refused"):
        table.add_column(heading, justify="right")
    for row in abstention["thresholds"]:
        first, *shares = row.values()
        table.add_row(f"{first:.2f}", *(f"{share:.1%}" for share in shares))
    first, *shares = abstention["suggested"].values()
    table.add_section()
    table.add_row(f"suggested {first:.2f}", *(f"{share:.1%}" for share in shares))
    console.print(table)


def save_report(report: Report, folder: Path) -> None:
    """Write ``demo_eval.json`` and, as printed, ``demo_eval.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo_eval.json").write_text(json.dumps(report, indent=2) + "\n")
    with (folder / "demo_eval.txt").open("w") as file:
        print_report(report, Console(file=file, width=110))


def _main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo on entities that training never saw.")
    parser.add_argument("--questions", type=int, default=800, help="number of test questions (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder to write demo_eval.json and demo_eval.txt to")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and nothing else")
    options = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own, for every file it reads
    report = evaluate_demo(n_questions=options.questions)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report, Console())
    if options.output:
        save_report(report, options.output)


if __name__ == "__main__":
    _main()
