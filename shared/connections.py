"""Connections that cost nobody else anything: bounded in number, and closed when they are slow.

uvicorn's own protocol waits without end for the head of a request, for its body and for a client that does not read its
answer, and takes any number of connections; a few lines of script could keep every place ("slow loris"). Here

- a connection above ``max_connections``, or above a client's share of them, is refused with 503 or 429; first an idle
  one is closed for it, where there is one,
- a head must be complete within ``header_timeout_s`` (408) and no longer than ``max_header_bytes`` (431),
- a body must arrive (408), and an answer be read, at ``min_bytes_per_s`` on average, after a grace of ten seconds,
- what cannot be parsed as HTTP gets a 400 in the error form.

A connection is counted to its address, also where keys are set: a key is known only once a head was read.
"""

import asyncio
import json
import time
import uuid
from collections import Counter
from http import HTTPStatus
from typing import Any

import structlog
from prometheus_client import CollectorRegistry
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from shared.clients import network
from shared.errors import (
    HeadTooLarge,
    Overloaded,
    RagError,
    RequestError,
    RequestTimeout,
    Unavailable,
    error_to_wire,
)
from shared.metrics import ConnectionMetrics
from shared.security_headers import SECURITY_HEADERS
from shared.settings import ServiceSettings

GRACE_S = 10.0
_MAY_CLOSE_AFTER_S = 1.0  # a connection that has said nothing for so long gives its place to a new one

log = structlog.get_logger(__name__)


class Connections:
    """The connections of one server, and the limits that they must keep. Lives on the event loop."""

    def __init__(self, settings: ServiceSettings, registry: CollectorRegistry, *, grace_s: float = GRACE_S) -> None:
        self.settings = settings
        self.grace_s = grace_s
        self.max_a_client = max(1, int(settings.client_share * settings.max_connections))
        self._open: dict[GuardedProtocol, str] = {}
        self._of_address: Counter[str] = Counter()
        self.metrics = ConnectionMetrics(registry, lambda: len(self._open))

    def __len__(self) -> int:
        return len(self._open)

    def protocol(self, config: Config, server_state: ServerState, app_state: Any, **options: Any) -> "GuardedProtocol":
        """What uvicorn calls for a new connection; takes the place of a protocol class."""
        return GuardedProtocol(config, server_state, app_state, connections=self, **options)

    def refusal(self, address: str) -> RagError | None:
        """Why there is no place for one more connection from there."""
        client = network(address)
        if len(self._open) >= self.settings.max_connections and not self._close_an_idle_one():
            return Unavailable(f"{len(self._open)} connections are open already")
        if self._of_address[client] >= self.max_a_client and not self._close_an_idle_one(client):
            return Overloaded(f"{self._of_address[client]} connections are open from this address already")
        return None

    def add(self, protocol: "GuardedProtocol", address: str) -> None:
        self._open[protocol] = client = network(address)
        self._of_address[client] += 1

    def remove(self, protocol: "GuardedProtocol") -> None:
        client = self._open.pop(protocol, None)
        if client is not None:
            self._of_address[client] -= 1
            if not self._of_address[client]:
                del self._of_address[client]

    def _close_an_idle_one(self, client: str | None = None) -> bool:
        """Closes the connection that has been silent for longest, of this client or of all."""
        latest_s = time.monotonic() - _MAY_CLOSE_AFTER_S
        idle = [
            protocol
            for protocol, owner in self._open.items()
            if client in (None, owner) and protocol.silent_since_s is not None and protocol.silent_since_s < latest_s
        ]
        if not idle:
            return False
        longest = min(idle, key=lambda protocol: protocol.silent_since_s or 0.0)
        self.remove(longest)
        longest.transport.abort()
        return True

    async def watch(self) -> None:
        """Ends connections that are too slow, for as long as it runs."""
        pause_s = min(1.0, self.settings.header_timeout_s / 4, self.grace_s / 4)
        while True:
            await asyncio.sleep(pause_s)
            now_s = time.monotonic()
            for protocol in list(self._open):
                protocol.end_if_slow(now_s)
            self._bound_unread()

    def _bound_unread(self) -> None:
        """Answers that nobody reads may take as much memory as bodies; the largest are given up first."""
        unread = {protocol: protocol.transport.get_write_buffer_size() for protocol in self._open}
        total = sum(unread.values())
        for protocol in sorted(unread, key=lambda protocol: -unread[protocol]):
            if total <= self.settings.max_held_bytes:
                return
            log.warning("unread_answer_given_up", bytes=unread[protocol])
            total -= unread[protocol]
            protocol.transport.abort()


class GuardedProtocol(HttpToolsProtocol):
    def __init__(
        self, config: Config, server_state: ServerState, app_state: Any, *, connections: Connections, **options: Any
    ) -> None:
        super().__init__(config, server_state, app_state, **options)
        self._all = connections
        self._settings = connections.settings
        self._refused = False
        self._head_since_s: float | None = None
        self._head_bytes = 0  # as it came
        self._head_size = 0  # as it was parsed
        self._body_since_s: float | None = None
        self._body_bytes = 0
        self._unread_since_s: float | None = None
        self._unread = 0
        self.silent_since_s: float | None = None
        """Since when it has neither asked for anything nor waited for an answer; None while it does."""

    # --- asyncio's events -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        address = (transport.get_extra_info("peername") or ("unknown",))[0]
        refusal = self._all.refusal(address)
        super().connection_made(transport)
        if refusal is not None:
            self._refuse(refusal)
            return
        self._all.add(self, address)
        self.silent_since_s = self._head_since_s = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        self.silent_since_s = None
        if self._head_since_s is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        # The parser holds a header until it is whole, so what is counted is what came.
        if self._head_since_s is not None and self._head_bytes > self._settings.max_header_bytes:
            self._refuse(HeadTooLarge(f"the head is larger than {self._settings.max_header_bytes} bytes"))

    # --- the parser's events ----------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_since_s is None:
            self._head_since_s = time.monotonic()
        self._head_size = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._head_size += len(name) + len(value) + 4
        if self._head_size > self._settings.max_header_bytes:
            raise HeadTooLarge(f"the head is larger than {self._settings.max_header_bytes} bytes")

    def on_headers_complete(self) -> None:
        self._head_since_s, self._head_bytes = None, 0
        self._body_since_s, self._body_bytes = time.monotonic(), 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)
        if self.cycle.response_complete and self._body_bytes > self._settings.max_body_bytes:
            self.transport.close()  # it was answered, and sends on without end

    def on_message_complete(self) -> None:
        self._body_since_s = None
        super().on_message_complete()
        self._is_idle()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._is_idle()

    def _is_idle(self) -> None:
        sends = self._head_since_s is not None or self._body_since_s is not None
        if not sends and not self.pipeline and self.cycle.response_complete:
            self.silent_since_s = time.monotonic()

    # --- limits -----------------------------------------------------------------------------------------

    def end_if_slow(self, now_s: float) -> None:
        if self._read_too_slowly(now_s):
            log.info("connection_ended", why="the answer was read too slowly", unread_bytes=self._unread)
            self._all.metrics.ended.labels("unread").inc()
            self.transport.abort()
        elif self.transport.is_closing():
            return
        elif self._head_since_s is not None and now_s - self._head_since_s > self._settings.header_timeout_s:
            if self.silent_since_s is not None:
                self._all.metrics.ended.labels("silent").inc()
                self.transport.close()
            else:
                longest_s = self._settings.header_timeout_s
                self._refuse(RequestTimeout(f"the head did not arrive within {longest_s:g} seconds"))
        elif self.silent_since_s is not None and now_s - self.silent_since_s > self._settings.idle_timeout_s:
            self.transport.close()
        elif self._sent_too_slowly(now_s):
            slowest = self._settings.min_bytes_per_s
            self._refuse(RequestTimeout(f"the body arrived at less than {slowest} bytes a second"))

    def _sent_too_slowly(self, now_s: float) -> bool:
        if self._body_since_s is None:
            return False
        if self.flow.read_paused:  # it is we who do not read
            self._body_since_s, self._body_bytes = now_s, 0
        beyond_s = now_s - self._body_since_s - self._all.grace_s
        return beyond_s > 0 and self._body_bytes < beyond_s * self._settings.min_bytes_per_s + 1

    def _read_too_slowly(self, now_s: float) -> bool:
        unread = self.transport.get_write_buffer_size()
        if not unread:
            self._unread_since_s = None
            return False
        if self._unread_since_s is None or unread > self._unread:  # more was written
            self._unread_since_s, self._unread = now_s, unread
        beyond_s = now_s - self._unread_since_s - self._all.grace_s
        return beyond_s > 0 and unread > self._unread - beyond_s * self._settings.min_bytes_per_s

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  uvicorn's signature
        if self._head_size > self._settings.max_header_bytes:
            self._refuse(HeadTooLarge(f"the head is larger than {self._settings.max_header_bytes} bytes"))
        else:
            self._refuse(RequestError("this is not valid HTTP/1.1"))

    def _refuse(self, error: RagError) -> None:
        """Says why and closes. Where an answer is on its way there is no place to say it: then it is cut short."""
        self._refused = True
        self._all.metrics.ended.labels(error.code).inc()
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(_response(error))
        self.transport.close()


def _response(error: RagError) -> bytes:
    request_id = uuid.uuid4().hex
    log.info("request", status=error.status, code=error.code, request_id=request_id)
    body = json.dumps(error_to_wire(error, request_id)).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        "X-Request-ID": request_id,
        **({"Retry-After": "1"} if isinstance(error, Overloaded | Unavailable) else {}),
        **SECURITY_HEADERS,
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body
