"""Answers, passages and facts about the services, as a person reads them on a terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from services.doctor.finding import Report
from shared.schemas import Document, Health, QuestionResult, ServiceInfo


def render_answers(result: QuestionResult, n_passages: int, console: Console | None = None) -> None:
    """The answers, then the ``n_passages`` documents that the best answer rests on most."""
    console = console or Console(highlight=False)
    if result.abstained:
        console.print(Text("I do not know: no answer is probable enough.", "bold yellow"))
    for answer in result.answers:
        console.print(Text.assemble((answer.text, "bold"), (f"   probability {_share(answer.probability)}", "dim")))
    best = result.answers[0] if result.answers else None
    posterior = best.doc_posterior if best else None
    weight = posterior or [document.prior for document in result.documents]
    ranked = sorted(range(len(result.documents)), key=lambda n: -weight[n])
    for n in ranked[:n_passages]:
        document = result.documents[n]
        evidence = f"prior {_share(document.prior)}" + (f", posterior {_share(posterior[n])}" if posterior else "")
        console.print()
        console.print(Text.assemble(("from ", "dim"), (document.title, "cyan"), (f"   {evidence}", "dim")))
        text = Text(document.text)
        if best:
            text.highlight_words([best.text], "bold green", case_sensitive=False)
        console.print(Padding(text, (0, 0, 0, 2)))


def render_documents(documents: Sequence[Document], console: Console | None = None) -> None:
    """Ranked passages, with their retrieval score and the prior that follows from it."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("#", justify="right")
    table.add_column("score", justify="right")
    table.add_column("prior", justify="right")
    table.add_column("title", style="cyan")
    table.add_column("text")
    for rank, document in enumerate(documents, 1):
        scores = f"{document.score:.2f}", _share(document.prior)
        table.add_row(str(rank), *scores, Text(document.title), Text(document.text))
    (console or Console(highlight=False)).print(table)


def render_info(info: ServiceInfo, url: str, health: Health, console: Console | None = None) -> None:
    """One service: where, since what versions, what it serves, its limits."""
    console = console or Console(highlight=False)
    state = ("ready", "green") if health.status == "ok" else ("not ready: " + "; ".join(health.reasons), "red")
    console.print(Text.assemble((info.service, "bold"), f" {info.version} at {url} on {info.device}: ", state))
    grid = Table.grid(padding=(0, 2))
    _add_rows(grid, "model", info.model or {})
    for collection in info.collections or []:
        _add_rows(grid, f"collection {collection.name}", collection.model_dump(exclude={"name"}))
    _add_rows(grid, "limits", info.limits)
    _add_rows(grid, "versions", info.versions)
    console.print(Padding(grid, (0, 0, 0, 2)))


_MARKS = {"ok": ("ok", "green"), "note": ("note", "cyan"), "problem": ("PROBLEM", "bold red"), "skipped": ("-", "dim")}


def render_report(report: Report, console: Console | None = None) -> None:
    """What `rag doctor` found, a line a finding, what to do below it."""
    console = console or Console(highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for finding in report.findings:
        what = Text(finding.what)
        if finding.mend:
            what.append("\n→ ", "bold")
            what.append(finding.mend)
        table.add_row(Text(*_MARKS[finding.status]), finding.check, what)
    console.print(table)
    n = len(report.problems)
    verdict = ("nothing is wrong", "green") if report.ok else (f"{n} problem{'s' * (n > 1)}", "bold red")
    console.print()
    console.print(Text(*verdict))


def _share(probability: float) -> str:
    """Three digits; a tiny one keeps its magnitude."""
    return f"{probability:.3f}" if probability >= 0.001 or probability == 0 else f"{probability:.0e}"


def _add_rows(grid: Table, heading: str, values: Mapping[str, object]) -> None:
    for n, (name, value) in enumerate(values.items()):
        grid.add_row(Text(heading if n == 0 else "", "dim"), Text(name), Text(str(value)))
