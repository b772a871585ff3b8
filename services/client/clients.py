"""The clients: one that blocks, one that awaits. The requests and responses are in :mod:`services.client.calls`."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack
from urllib.request import getproxies

import httpx
import pyarrow as pa

from services.client import calls
from services.client.calls import Call, Service, Vectors
from services.client.events import EventReader, StreamEvent
from services.client.options import (
    AnswerOptions,
    CollectionOptions,
    EncodeOptions,
    RetrieveOptions,
    ScoreOptions,
    SearchOptions,
)
from shared.errors import DeadlineExceeded, RagError
from shared.http_pool import PooledTransport
from shared.retrieval import RetrieveResult
from shared.schemas import (
    AnswerResponse,
    CollectionInfo,
    EncodeResponse,
    Health,
    ScoreResponse,
    SearchResponse,
    ServiceInfo,
    Written,
)
from shared.vectors import Form

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 60.0
# A proxy of the environment (HTTP_PROXY) is honoured, but nothing on this machine is behind one.
_NO_PROXY = {"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None}
_LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20)  # httpx's own


class _Client:
    """Addresses, the key and the time to wait: what both clients keep."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        retriever_url: str | None = None,
        api_key: str | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> None:
        """``timeout_s`` bounds each call on this side (``None``: no bound); ``timeout_ms`` of a call goes with the
        request and bounds it on both services too."""
        self._urls: dict[Service, str | None] = {"generator": url, "retriever": retriever_url}
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s

    def _url(self, call: Call[T]) -> str:
        base = self._urls[call.service]
        if base is None:
            raise ValueError("this call goes to the retriever: give the client its address as retriever_url")
        return base.rstrip("/") + call.path

    def _request(self, call: Call[T]) -> httpx.Request:
        timeout = httpx.Timeout(call.wait_s(self._timeout_s)).as_dict()
        return httpx.Request(
            call.method,
            self._url(call),
            headers=self._headers | call.headers,
            content=call.content,
            extensions={"timeout": timeout},
        )

    def _failure(self, call: Call[T], error: httpx.TransportError) -> RagError:
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            return DeadlineExceeded(f"the {call.service} did not answer within {call.wait_s(self._timeout_s):g} s")
        return calls.unreachable(call, str(self._urls[call.service]), error)


class RagClient(_Client):
    """Both services from one thread. Keeps connections open: use it with ``with``, or ``close()`` it.

    Every call raises a class of :mod:`shared.errors`: what the service sent, :class:`Unreachable` where nothing
    answers, :class:`DeadlineExceeded` where the answer does not come in time.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        retriever_url: str | None = None,
        api_key: str | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(url, retriever_url=retriever_url, api_key=api_key, timeout_s=timeout_s)
        self._http = httpx.Client(transport=transport, mounts=None if transport else _NO_PROXY)

    def answer(self, question: str | Sequence[str], **options: Unpack[AnswerOptions]) -> AnswerResponse:
        """Answer one question or many from retrieved passages (or from ``passages``)."""
        return self._send(calls.answer(question, options))

    def stream(self, question: str, **options: Unpack[AnswerOptions]) -> Iterator[StreamEvent]:
        """The answer to one question while it is made: its documents, the text piece by piece, the whole response.

        Pieces come with greedy search and with one sample of RAG-Token. What is not read to the end is cancelled.
        """
        call, reader = calls.stream(question, options), EventReader()
        try:
            response = self._http.send(self._request(call), stream=True)
            with closing(response):
                if not calls.is_stream(response):
                    response.read()
                    calls.read(call, response)
                for line in response.iter_lines():
                    if (event := reader.read(line)) is not None:
                        yield event
        except httpx.TransportError as error:
            raise self._failure(call, error) from error
        if not reader.ended:
            raise calls.unreachable(call, self._url(call), EOFError("the stream ended early"))

    def score(
        self,
        question: str | Sequence[str],
        answers: Sequence[str] | Sequence[Sequence[str]],
        **options: Unpack[ScoreOptions],
    ) -> ScoreResponse:
        """log p(y|x) of given answers, marginalised over the documents: one list of answers a question."""
        return self._send(calls.score(question, answers, options))

    def encode(self, question: str | Sequence[str], **options: Unpack[EncodeOptions]) -> EncodeResponse:
        """Question vectors, (B, D); :meth:`retrieve` takes them as they are."""
        return self._send(calls.encode(question, options))

    def search(self, question: str | Sequence[str], **options: Unpack[SearchOptions]) -> SearchResponse:
        """Ranked passages for each question, nothing generated."""
        return self._send(calls.search(question, options))

    def retrieve(self, vectors: Vectors, *, form: Form = "arrow", **options: Unpack[RetrieveOptions]) -> RetrieveResult:
        """Documents nearest to each of ``vectors`` (B, D), as numpy arrays; ``form`` is the one on the wire."""
        return self._send(calls.retrieve(vectors, form, options))

    def upsert(self, passages: pa.RecordBatch | Sequence[Mapping[str, Any]], *, collection: str = "default") -> Written:
        """Store passages (``id``, ``title``, ``text``, ``embedding``), or replace those that have the ids."""
        return self._send(calls.upsert(collection, passages))

    def delete(self, ids: Sequence[int], *, collection: str = "default") -> Written:
        """Delete passages by id."""
        return self._send(calls.delete(collection, ids))

    def reload(self, collection: str = "default") -> CollectionInfo:
        """Serve what `rag index` has made of a collection since the retriever started."""
        return self._send(calls.reload(collection))

    def create_collection(
        self, name: str, *, dimension: int, encoder: str, **options: Unpack[CollectionOptions]
    ) -> CollectionInfo:
        """Make a collection without passages; ``encoder``: fingerprint of the question encoder it is for."""
        return self._send(calls.create_collection(name, dimension, encoder, options))

    def drop_collection(self, name: str, *, remove_aliases: bool = False) -> None:
        """Remove a collection, for good; refused while an alias stands for it, unless those are to go, too."""
        self._send(calls.drop_collection(name, remove_aliases=remove_aliases))

    def collections(self) -> list[CollectionInfo]:
        """What the retriever serves."""
        return self._send(calls.collections())

    def collection(self, name: str = "default") -> CollectionInfo:
        """What it serves under a name or an alias."""
        return self._send(calls.collection(name))

    def info(self, service: Service = "generator") -> ServiceInfo:
        """Versions, device, model or collections, limits."""
        return self._send(calls.info(service))

    def ready(self, service: Service = "generator") -> Health:
        """Whether the service can answer now, and why not; a service that cannot be reached is not ready."""
        try:
            return self._send(calls.ready(service))
        except RagError as error:
            return calls.not_ready(error)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: Call[T]) -> T:
        request = self._request(call)
        try:
            response = self._http.send(request)
        except httpx.TransportError as error:
            raise self._failure(call, error) from error
        return calls.read(call, response)


class AsyncRagClient(_Client):
    """:class:`RagClient` for asyncio: the same calls, awaited; ``async with``, or ``await close()``."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        retriever_url: str | None = None,
        api_key: str | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(url, retriever_url=retriever_url, api_key=api_key, timeout_s=timeout_s)
        if transport is None and not getproxies().keys() - {"no"}:
            transport = PooledTransport(_LIMITS)
        self._http = httpx.AsyncClient(transport=transport, mounts=None if transport else _NO_PROXY)

    async def answer(self, question: str | Sequence[str], **options: Unpack[AnswerOptions]) -> AnswerResponse:
        return await self._send(calls.answer(question, options))

    async def stream(self, question: str, **options: Unpack[AnswerOptions]) -> AsyncIterator[StreamEvent]:
        call, reader = calls.stream(question, options), EventReader()
        try:
            response = await self._http.send(self._request(call), stream=True)
            async with aclosing(response):
                if not calls.is_stream(response):
                    await response.aread()
                    calls.read(call, response)
                async for line in response.aiter_lines():
                    if (event := reader.read(line)) is not None:
                        yield event
        except httpx.TransportError as error:
            raise self._failure(call, error) from error
        if not reader.ended:
            raise calls.unreachable(call, self._url(call), EOFError("the stream ended early"))

    async def score(
        self,
        question: str | Sequence[str],
        answers: Sequence[str] | Sequence[Sequence[str]],
        **options: Unpack[ScoreOptions],
    ) -> ScoreResponse:
        return await self._send(calls.score(question, answers, options))

    async def encode(self, question: str | Sequence[str], **options: Unpack[EncodeOptions]) -> EncodeResponse:
        return await self._send(calls.encode(question, options))

    async def search(self, question: str | Sequence[str], **options: Unpack[SearchOptions]) -> SearchResponse:
        return await self._send(calls.search(question, options))

    async def retrieve(
        self, vectors: Vectors, *, form: Form = "arrow", **options: Unpack[RetrieveOptions]
    ) -> RetrieveResult:
        return await self._send(calls.retrieve(vectors, form, options))

    async def upsert(
        self, passages: pa.RecordBatch | Sequence[Mapping[str, Any]], *, collection: str = "default"
    ) -> Written:
        return await self._send(calls.upsert(collection, passages))

    async def delete(self, ids: Sequence[int], *, collection: str = "default") -> Written:
        return await self._send(calls.delete(collection, ids))

    async def reload(self, collection: str = "default") -> CollectionInfo:
        return await self._send(calls.reload(collection))

    async def create_collection(
        self, name: str, *, dimension: int, encoder: str, **options: Unpack[CollectionOptions]
    ) -> CollectionInfo:
        return await self._send(calls.create_collection(name, dimension, encoder, options))

    async def drop_collection(self, name: str, *, remove_aliases: bool = False) -> None:
        await self._send(calls.drop_collection(name, remove_aliases=remove_aliases))

    async def collections(self) -> list[CollectionInfo]:
        return await self._send(calls.collections())

    async def collection(self, name: str = "default") -> CollectionInfo:
        return await self._send(calls.collection(name))

    async def info(self, service: Service = "generator") -> ServiceInfo:
        return await self._send(calls.info(service))

    async def ready(self, service: Service = "generator") -> Health:
        try:
            return await self._send(calls.ready(service))
        except RagError as error:
            return calls.not_ready(error)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, call: Call[T]) -> T:
        request = self._request(call)
        try:
            response = await self._http.send(request)
        except httpx.TransportError as error:
            raise self._failure(call, error) from error
        return calls.read(call, response)
