"""The retriever service as the generator calls it: pooled, retried while out of reach, bounded by the deadline."""

import asyncio
import json
import random
import time
from dataclasses import replace
from typing import Any

import httpx
from opentelemetry.trace import SpanKind

from generator_svc.settings import GeneratorSettings
from shared.deadline import Deadline
from shared.errors import (
    DeadlineExceeded,
    EncoderMismatch,
    InvalidRequest,
    NotFound,
    Overloaded,
    RagError,
    Unavailable,
    UpstreamError,
    error_from_wire,
)
from shared.http_pool import PooledTransport
from shared.logs import current_request_id
from shared.retrieval import RetrieveQuery, RetrieveResult
from shared.schemas import CollectionInfo
from shared.telemetry import http_attributes, pass_on, stage
from shared.vectors import ARROW_TYPE, query_to_wire, result_from_wire

_CONNECT_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 0.5
_RETRIEVE = "/v1/retrieve"
_CALLERS_FIELDS = ("collection", "n_docs", "filter", "search_params")


class RetrieverClient:
    """One retriever service. `encoder` is the fingerprint that its indexes must carry."""

    def __init__(self, settings: GeneratorSettings, encoder: str) -> None:
        key = settings.retriever_api_key
        self.url = settings.retriever_url
        self.encoder = encoder
        self._retry_s = settings.retriever_retry_s
        self._call_attributes = http_attributes("POST", httpx.URL(self.url + _RETRIEVE))
        self._http = httpx.AsyncClient(
            base_url=settings.retriever_url,
            headers={} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"},
            # Deadlines bound the rest: a timeout for each read would start anew with every byte.
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
            transport=PooledTransport(
                httpx.Limits(
                    max_connections=settings.retriever_connections,
                    max_keepalive_connections=settings.retriever_connections,
                )
            ),
            trust_env=False,  # a neighbour: no proxy of the environment lies between
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def retrieve(self, query: RetrieveQuery, deadline: Deadline) -> RetrieveResult:
        """The documents of each query.

        A retriever that cannot be reached, hangs up or says that it is not ready is tried again, with growing pauses,
        for as long as the setting ``retriever_retry_s`` and the deadline allow: asking twice changes nothing.

        Raises:
            NotFound: no such collection. InvalidRequest: a field that the caller gave is refused.
            EncoderMismatch: the index was made for another question encoder.
            Overloaded: it refuses more work; asking again at once would only add to it.
            UpstreamError: everything else that the retriever does wrong, with its message.
            DeadlineExceeded.
        """
        give_up_s = time.monotonic() + self._retry_s
        pause_s = _FIRST_PAUSE_S
        while True:
            deadline.check("documents were retrieved")
            try:
                result = await self._ask(query, deadline)
            except Unavailable as error:
                # Jitter keeps callers that failed together from coming back together.
                jittered_s = pause_s * random.uniform(0.5, 1)
                if time.monotonic() + jittered_s > give_up_s:
                    raise UpstreamError(error.message) from error
                if jittered_s > deadline.remaining_s:
                    raise DeadlineExceeded(f"the deadline passed; {error.message}") from error
                await asyncio.sleep(jittered_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                self.check_encoder(result.index.encoder, result.index.collection)
                return result

    def check_encoder(self, encoder: str, collection: str) -> None:
        """Raises: EncoderMismatch."""
        if encoder != self.encoder:
            raise EncoderMismatch(
                f"the index of collection {collection!r} was made for the question encoder {encoder}, this generator "
                f"searches with {self.encoder}: build the index with this checkpoint's context encoder, or, if the "
                "two do share their space, name the index's encoder in the setting index_encoder"
            )

    async def check_ready(self, deadline: Deadline) -> None:
        """One attempt.

        Raises:
            RagError: it cannot be reached, or is not ready, and why.
        """
        ready = await self._send("GET", "/readyz", deadline)
        if ready.status_code != httpx.codes.OK:
            reasons = _json(ready).get("reasons") or [f"HTTP {ready.status_code}"]
            raise Unavailable(
                f"the retriever at {self.url} is not ready: {'; '.join(str(reason) for reason in reasons)}"
            )

    async def collection(self, name: str, deadline: Deadline) -> CollectionInfo | None:
        """What the retriever says of a collection, None where it has none of that name. Raises: RagError."""
        response = await self._send("GET", f"/v1/collections/{name}", deadline)
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        if response.status_code != httpx.codes.OK:
            raise self._error(response)
        return CollectionInfo.model_validate(_json(response))

    async def _ask(self, query: RetrieveQuery, deadline: Deadline) -> RetrieveResult:
        remaining_ms = max(1, int(deadline.remaining_s * 1000))
        body, content_type = query_to_wire(replace(query, timeout_ms=remaining_ms), "arrow")
        headers = {"Content-Type": content_type, "Accept": ARROW_TYPE}
        if request_id := current_request_id():
            headers["X-Request-ID"] = request_id
        with stage(f"POST {_RETRIEVE}", self._call_attributes, kind=SpanKind.CLIENT) as span:
            pass_on(headers)
            response = await self._send("POST", _RETRIEVE, deadline, content=body, headers=headers)
            span.set_attribute("http.response.status_code", response.status_code)
        if response.status_code != httpx.codes.OK:
            raise self._error(response)
        return result_from_wire(response.content, response.headers.get("Content-Type"))

    async def _send(self, method: str, path: str, deadline: Deadline, **request: Any) -> httpx.Response:
        """One attempt.

        Raises:
            Unavailable: no answer came, and another attempt may get one. DeadlineExceeded.
        """
        try:
            async with asyncio.timeout(deadline.remaining_s):
                return await self._http.request(method, path, **request)
        except TimeoutError:
            raise DeadlineExceeded(f"the deadline passed while the retriever at {self.url} was busy") from None
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise Unavailable(f"the retriever at {self.url} cannot be reached: {reason}") from error

    def _error(self, response: httpx.Response) -> RagError:
        """The error to raise for a response that is not a success: the caller's own, or a failed upstream."""
        error = error_from_wire(response.status_code, _json(response))
        if isinstance(error, NotFound | InvalidRequest) and (error.param or "").partition(".")[0] in _CALLERS_FIELDS:
            return error
        kind = type(error) if isinstance(error, DeadlineExceeded | Overloaded | Unavailable) else UpstreamError
        return kind(f"the retriever at {self.url} says: {error.message}")


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return body if isinstance(body, dict) else {}
