"""`rag doctor`."""

# ruff: noqa: PLC0415  (imports inside commands: see services.cli)
from typing import Annotated, Literal

import typer

from services.cli.options import ApiKey, print_json

PROBLEMS_FOUND = 1


def doctor(
    *,
    side: Annotated[
        Literal["generator", "retriever", "both"] | None,
        typer.Option("--service", help="What belongs on this machine. [default: what is installed]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    url: Annotated[
        str | None,
        typer.Option("--url", envvar="RAG_URL", help="Address of the generator. [default: from its settings]"),
    ] = None,
    retriever_url: Annotated[
        str | None,
        typer.Option("--retriever-url", envvar="RAG_RETRIEVER_URL", help="Of the retriever. [default: from settings]"),
    ] = None,
    api_key: ApiKey = None,
) -> None:
    """Look at this machine and the services, say what is wrong, and how to mend it.

    Python and packages, GPUs, variables, keys, ports, disk, checkpoint, collections, the services that run, and
    whether index and checkpoint belong together. Run it with the environment of the services, before they start or
    while they run. It changes nothing.

    **Exit codes:** 0 nothing is wrong · 1 problems were found · 2 wrong usage.

    **Examples**

    - `rag doctor`
    - `RETRIEVER_DATA_DIR=/var/lib/rag rag doctor --service retriever`
    - `rag doctor --url https://rag.example.org --api-key …`
    - `rag doctor --json | jq '.findings[] | select(.status == "problem")'`
    """
    from services.doctor import Deployment, examine

    report = examine(Deployment.here(side, url, retriever_url, api_key))
    if as_json:
        print_json(report)
    else:
        from services.cli.render import render_report

        render_report(report)
    raise typer.Exit(PROBLEMS_FOUND if report.problems else 0)
