"""The root of `rag`: its commands, and how an error becomes a message and an exit code."""

import os
import sys
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.text import Text

from services.cli import ask, demo, doctor, index, info, up
from shared.errors import RagError, StartupError

FAILED, CANNOT_START, NOT_REACHABLE = 1, StartupError.exit_code, 4

_HINTS = {
    "unreachable": "Start both services with [bold]rag up[/bold], or name another address with [bold]--url[/bold].",
    "unauthorized": "Give the key with [bold]--api-key[/bold] or in the variable [bold]RAG_API_KEY[/bold].",
    "forbidden": "Give the admin key with [bold]--api-key[/bold] or in the variable [bold]RAG_API_KEY[/bold].",
    "unavailable": "It may be starting or stopping: try again; [bold]rag doctor[/bold] says what it waits for.",
    "upstream_failed": "[bold]rag doctor[/bold] looks at both services and at what lies between them.",
    "encoder_mismatch": "[bold]rag doctor[/bold] says which collections belong to the checkpoint.",
    "overloaded": "The queue is full: try again in a moment.",
    "request_timeout": "The request did not arrive in time: try again, or look at the network in between.",
    "deadline_exceeded": "Give it longer with [bold]--timeout-ms[/bold], or ask for fewer passages or beams.",
    "startup_failed": "[bold]rag doctor[/bold] looks at the machine, the settings and the data folder.",
}

app = typer.Typer(
    name="rag",
    help="Answers from your passages, with the evidence for each: a retriever and a generator (RAG), served.",
    epilog=(
        '**First steps:** `rag up` in one terminal, `rag ask "How many people live in Paris?"` in another.\n\n'
        "**Exit codes:** 0 done · 1 the service refused or failed the request · 2 wrong usage · "
        "3 a service cannot start as it is set up · 4 no service answers, or it is not ready yet. "
        "`rag doctor`: 1 problems were found.\n\n"
        "**For programs:** `--json` prints JSON on standard output and nothing else; messages go to standard error. "
        "NO_COLOR=1 turns colours off; `rag --install-completion` completes commands and options with Tab."
    ),
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(up.up)
app.command("ask")(ask.ask)
app.command("search")(ask.search)
app.command("info")(info.info)
app.command("doctor")(doctor.doctor)
app.add_typer(index.app, name="index")
app.add_typer(demo.app, name="demo")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `rag` and end the process with its exit code. Without ``arguments`` it is the process's own: its log, too."""
    if arguments is None:
        from shared.logs import configure_logging  # noqa: PLC0415  `rag`'s completion in a shell has no use for it

        configure_logging("warning", "console")
        # Of every published checkpoint it reports weights that RAG never reads; those that matter are checked by us.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(arguments, prog_name="rag")
    except RagError as error:
        _complain(error)
        sys.exit(_exit_code(error))


def _exit_code(error: RagError) -> int:
    if isinstance(error, StartupError):
        return CANNOT_START
    return NOT_REACHABLE if error.code in ("unreachable", "unavailable") else FAILED


def _complain(error: RagError) -> None:
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), error.message), soft_wrap=True)
    if hint := _HINTS.get(error.code):
        console.print(hint)
    if error.request_id:
        console.print(Text(f"{error.code} · request {error.request_id}", "dim"), soft_wrap=True)
