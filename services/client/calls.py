"""Each call as a value: what to send, and how to read what comes back. Both clients share it.

A :class:`Call` knows nothing of sockets, so the sync and the async client differ only in how they wait.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

import httpx
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError
from pydantic_core import to_json

from services.client.options import (
    AnswerOptions,
    CollectionOptions,
    EncodeOptions,
    RetrieveOptions,
    ScoreOptions,
    SearchOptions,
)
from shared.arrow import write_stream
from shared.errors import RagError, Unavailable, UpstreamError, error_from_wire
from shared.retrieval import RetrieveQuery, RetrieveResult
from shared.schemas import (
    AnswerRequest,
    AnswerResponse,
    CollectionInfo,
    CollectionList,
    EncodedArray,
    EncodeRequest,
    EncodeResponse,
    Health,
    NewCollection,
    Request,
    ScoreRequest,
    ScoreResponse,
    SearchRequest,
    SearchResponse,
    ServiceInfo,
    Wire,
    Written,
)
from shared.validation import refusal_of
from shared.vectors import ARROW_TYPE, JSON_TYPE, Form, decode_vectors, query_to_wire, result_from_wire

Service = Literal["generator", "retriever"]
# (B, D): numpy, nested lists, or what `/v1/encode` answered.
Vectors = npt.NDArray[np.floating] | Sequence[Sequence[float]] | EncodedArray
T = TypeVar("T")
W = TypeVar("W", bound=Wire)

# What Accept has to say so that vectors come back in each form.
_ACCEPT: dict[Form, str] = {
    "json": "application/json",
    "base64": "application/json;vectors=base64",
    "arrow": "application/vnd.apache.arrow.stream",
}
# A service given `timeout_ms` answers by then, if only with an error: the client waits a little longer for it.
_GRACE_S = 2.0


class Unreachable(Unavailable):
    """No service answers at that address. Not on the wire: there was no response."""

    code: ClassVar[str] = "unreachable"


@dataclass(frozen=True)
class Call(Generic[T]):
    service: Service
    method: Literal["GET", "POST", "DELETE"]
    path: str
    parse: Callable[[httpx.Response], T]
    content: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    timeout_ms: int | None = None

    def wait_s(self, default_s: float | None) -> float | None:
        """How long the client waits: a deadline given with the request wins over the client's own."""
        return default_s if self.timeout_ms is None else self.timeout_ms / 1000 + _GRACE_S


def answer(question: str | Sequence[str], options: AnswerOptions) -> Call[AnswerResponse]:
    return _post("/v1/answer", AnswerRequest, AnswerResponse, {"question": _plain(question), **options})


def stream(question: str, options: AnswerOptions) -> Call[AnswerResponse]:
    fields = {"question": question, "stream": True, **options}
    return _post("/v1/answer", AnswerRequest, AnswerResponse, fields)


def score(question: str | Sequence[str], answers: Sequence[Any], options: ScoreOptions) -> Call[ScoreResponse]:
    fields = {"question": _plain(question), "answers": [_plain(given) for given in answers], **options}
    return _post("/v1/score", ScoreRequest, ScoreResponse, fields)


def encode(question: str | Sequence[str], options: EncodeOptions) -> Call[EncodeResponse]:
    return _post("/v1/encode", EncodeRequest, EncodeResponse, {"question": _plain(question), **options})


def search(question: str | Sequence[str], options: SearchOptions) -> Call[SearchResponse]:
    return _post("/v1/search", SearchRequest, SearchResponse, {"question": _plain(question), **options})


def retrieve(vectors: Vectors, form: Form, options: RetrieveOptions) -> Call[RetrieveResult]:
    query = RetrieveQuery(decode_vectors(vectors), **options)
    content, content_type = query_to_wire(query, form)
    return Call(
        "retriever",
        "POST",
        "/v1/retrieve",
        lambda response: result_from_wire(response.content, response.headers.get("content-type", "")),
        content,
        {"Content-Type": content_type, "Accept": _ACCEPT[form]},
        query.timeout_ms,
    )


def upsert(collection: str, passages: pa.RecordBatch | Sequence[Mapping[str, Any]]) -> Call[Written]:
    path = f"/v1/collections/{collection}/passages"
    if isinstance(passages, pa.RecordBatch):
        columns = {name: passages.column(name) for name in passages.schema.names}
        return Call("retriever", "POST", path, _model(Written), write_stream(columns, {}), {"Content-Type": ARROW_TYPE})
    content = to_json({"passages": [dict(passage) for passage in passages]})
    return Call("retriever", "POST", path, _model(Written), content, {"Content-Type": JSON_TYPE})


def delete(collection: str, ids: Sequence[int]) -> Call[Written]:
    path, content = f"/v1/collections/{collection}/passages/delete", to_json({"ids": list(ids)})
    return Call("retriever", "POST", path, _model(Written), content, {"Content-Type": JSON_TYPE})


def reload(collection: str) -> Call[CollectionInfo]:
    return Call("retriever", "POST", f"/v1/collections/{collection}/reload", _model(CollectionInfo))


def create_collection(name: str, dimension: int, encoder: str, options: CollectionOptions) -> Call[CollectionInfo]:
    try:
        asked = NewCollection(name=name, dimension=dimension, encoder=encoder, **options)
    except ValidationError as refused:
        raise refusal_of(refused) from None
    content = asked.model_dump_json(exclude_unset=True).encode()
    return Call("retriever", "POST", "/v1/collections", _model(CollectionInfo), content, {"Content-Type": JSON_TYPE})


def drop_collection(name: str, *, remove_aliases: bool) -> Call[None]:
    path = f"/v1/collections/{name}" + ("?remove_aliases=true" if remove_aliases else "")
    return Call("retriever", "DELETE", path, lambda _: None)


def collections() -> Call[list[CollectionInfo]]:
    return Call("retriever", "GET", "/v1/collections", lambda r: _model(CollectionList)(r).collections)


def collection(name: str) -> Call[CollectionInfo]:
    return Call("retriever", "GET", f"/v1/collections/{name}", _model(CollectionInfo))


def info(service: Service) -> Call[ServiceInfo]:
    return Call(service, "GET", "/info", _model(ServiceInfo))


def ready(service: Service) -> Call[Health]:
    return Call(service, "GET", "/readyz", _model(Health))


def read(call: Call[T], response: httpx.Response) -> T:
    """The result that ``response`` holds. Raises: RagError: the one that it stands for."""
    # /readyz says why it is not ready in its own body, with status 503.
    if response.is_success or (call.path == "/readyz" and response.status_code == Unavailable.status):
        try:
            return call.parse(response)
        except ValidationError:
            raise UpstreamError(f"what answers at {response.url} is not a {call.service} of this version") from None
    try:
        body = response.json()
    except ValueError:
        body = None  # a proxy's page, not ours: the status has to do
    raise error_from_wire(response.status_code, body, _retry_after_s(response))


def is_stream(response: httpx.Response) -> bool:
    """Whether events follow; anything else is an error, and `read` raises it."""
    return str(response.headers.get("content-type", "")).startswith("text/event-stream")


def unreachable(call: Call[Any], url: str, cause: Exception) -> Unreachable:
    if isinstance(cause, httpx.ConnectError):
        return Unreachable(f"no {call.service} answers at {url}")
    return Unreachable(f"the connection to the {call.service} at {url} broke: {cause or type(cause).__name__}")


def not_ready(error: RagError) -> Health:
    return Health(status="unavailable", reasons=[error.message])


def _post(path: str, request: type[Request], response: type[W], fields: dict[str, Any]) -> Call[W]:
    try:
        checked = request.model_validate(fields)
    except ValidationError as refused:
        raise refusal_of(refused) from None
    content = checked.model_dump_json(exclude_unset=True).encode()
    headers = {"Content-Type": "application/json"}
    return Call("generator", "POST", path, _model(response), content, headers, checked.timeout_ms)


def _model(cls: type[W]) -> Callable[[httpx.Response], W]:
    return lambda response: cls.model_validate_json(response.content)


def _plain(text: str | Sequence[str]) -> str | list[str]:
    return text if isinstance(text, str) else list(text)


def _retry_after_s(response: httpx.Response) -> float | None:
    try:
        return float(response.headers["Retry-After"])
    except (KeyError, ValueError):  # absent, or a date
        return None
