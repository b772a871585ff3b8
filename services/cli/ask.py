"""`rag ask` and `rag search`."""

# ruff: noqa: PLC0415  (imports inside commands: see services.cli)
from typing import Annotated, Any

import typer

from services.cli.options import (
    DEFAULT_URL,
    ApiKey,
    AsJson,
    Collection,
    Filter,
    NDocs,
    TimeoutMs,
    Url,
    connect,
    print_json,
)


def ask(
    question: Annotated[str, typer.Argument(help="What you want to know.", show_default=False)],
    *,
    n_docs: NDocs = None,
    collection: Collection = "default",
    where: Filter = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Hypotheses that the search keeps.")] = 1,
    answers: Annotated[int, typer.Option(min=1, help="Answers to print; raises --num-beams to as many.")] = 1,
    strategy: Annotated[
        str | None,
        typer.Option(help="How documents are combined: `token` or `sequence`. [default: as the checkpoint has it]"),
    ] = None,
    min_probability: Annotated[
        float, typer.Option(min=0, max=1, help="Below this, say so instead of answering.")
    ] = 0.0,
    passages: Annotated[int, typer.Option(min=0, help="Passages to print, the best evidence first.")] = 1,
    timeout_ms: TimeoutMs = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Ask a question; print the answer, how probable it is, and the passage that it came from.

    The **prior** of a passage is its share of the retrieval score; the **posterior** is how much of the answer's
    probability it accounts for, once the generator has read it.

    **Examples**

    - `rag ask "How many people live in Paris?"`
    - `rag ask "What is the symbol of gold?" --answers 3 --passages 5`
    - `rag ask "How many people live in Narnia?" --min-probability 0.5`
    - `rag ask "Who won the race?" --collection news --filter "year >= 1990 AND lang = 'en'"`
    - `rag ask "Where is Oslo?" --json | jq '.results[0].answers[0].text'`
    """
    options: dict[str, Any] = {"num_beams": max(num_beams, answers), "num_return_sequences": answers}
    options |= {"min_probability": min_probability, "n_docs": n_docs, "strategy": strategy, "timeout_ms": timeout_ms}
    options |= {"collection": collection, "filter": where}
    with connect(url, api_key) as client:
        response = client.answer(question, **options)
    if as_json:
        print_json(response)
        return
    from services.cli.render import render_answers

    render_answers(response.results[0], passages)


def search(
    question: Annotated[str, typer.Argument(help="What the passages should be about.", show_default=False)],
    *,
    n_docs: NDocs = None,
    collection: Collection = "default",
    where: Filter = None,
    timeout_ms: TimeoutMs = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Find passages; nothing is generated.

    **Examples**

    - `rag search "rivers and capitals of Europe" --n-docs 10`
    - `rag search "rivers" --filter "title = 'Paris'"`
    - `rag search "Where is Oslo?" --json | jq -r '.results[0].documents[].title'`
    """
    with connect(url, api_key) as client:
        response = client.search(question, n_docs=n_docs, collection=collection, filter=where, timeout_ms=timeout_ms)
    if as_json:
        print_json(response)
        return
    from services.cli.render import render_documents

    render_documents(response.results[0].documents)
