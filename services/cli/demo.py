"""`rag demo`: the corpus and the checkpoint that come with the project, made anew or examined.

Each command becomes the module that does the work (``python -m …``), whose options are its own.
"""

import os
import sys

import typer

app = typer.Typer(
    help="Rebuild, retrain or evaluate the demo that comes with the project.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
# `--help` and all options belong to the module.
_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command()
def build() -> None:
    """Write the corpus with its embeddings: what the retriever builds its first index from.

    **Example**

    - `rag demo build`
    """
    _become("services.demo.build", [])


@app.command(context_settings=_FORWARD)
def train(context: typer.Context) -> None:
    """Train the demo checkpoint from nothing (about an hour on two cores); continues where it was stopped."""
    _become("services.demo.train", context.args)


@app.command("eval", context_settings=_FORWARD)
def evaluate(context: typer.Context) -> None:
    """Measure exact match and recall on questions about entities that training never saw."""
    _become("services.demo.evaluate", context.args)


def _become(module: str, arguments: list[str]) -> None:
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606  (no shell is wanted)
