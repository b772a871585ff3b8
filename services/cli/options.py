"""Options that several commands share."""

# ruff: noqa: PLC0415  (imports inside commands: see services.cli)
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # httpx and pydantic take a moment to import: only once a command runs
    from pydantic import BaseModel

    from services.client import RagClient

Url = Annotated[str, typer.Option("--url", envvar="RAG_URL", help="Address of the generator service.")]
RetrieverUrl = Annotated[
    str, typer.Option("--retriever-url", envvar="RAG_RETRIEVER_URL", help="Address of the retriever service.")
]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="RAG_API_KEY", help="Key, where the service asks one.")]
TimeoutMs = Annotated[int | None, typer.Option(min=1, help="Deadline of the request, over both services.")]
NDocs = Annotated[int | None, typer.Option(min=1, help="Passages to retrieve. [default: as the checkpoint has it]")]
Collection = Annotated[str, typer.Option("--collection", help="Where to look: a collection, or an alias of one.")]
Filter = Annotated[
    str | None,
    typer.Option("--filter", help="SQL condition on metadata columns, id, title and text that passages fulfil."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_RETRIEVER_URL = "http://127.0.0.1:8001"


def connect(url: str, api_key: str | None, retriever_url: str | None = None) -> "RagClient":
    from services.client import RagClient

    return RagClient(url, api_key=api_key, retriever_url=retriever_url)


def print_json(found: "BaseModel | dict[str, Any] | list[Any]") -> None:
    """One JSON document, numbers and names as the services give them."""
    from pydantic_core import to_json

    print(to_json(found, indent=2).decode())


def tell(found: dict[str, Any], text: str, *, as_json: bool) -> None:
    """What came of a command: as JSON, or in words."""
    if as_json:
        print_json(found)
    else:
        print(text)
