"""A bound on request bodies, enforced while they arrive: what is refused was never held."""

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.errors import PayloadTooLarge
from shared.responses import error_response

_LINGER_S = 2.0


class BodyLimit:
    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(receive, self.max_bytes)
        try:
            body.check_stated(scope)
            await self.app(scope, body.receive, body.before_end(send))
        except PayloadTooLarge as error:
            await error_response(error, scope)(scope, receive, body.before_end(send))


class _Body:
    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._received = 0
        self._more = True
        self._refused = False

    def check_stated(self, scope: Scope) -> None:
        stated = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        # The server has checked that it is a number; of one with more than 18 digits we need no more to know.
        if stated.isdigit() and int(stated[:18]) > self._max_bytes:
            self._refuse()

    async def receive(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        self._more = message.get("more_body", False)
        if self._received > self._max_bytes:
            self._refuse()
        return message

    def _refuse(self) -> None:
        self._refused = True
        raise PayloadTooLarge(f"the body is larger than {self._max_bytes} bytes")

    def before_end(self, send: Send) -> Send:
        """``send``, but a refusal ends only when the client has stopped sending.

        Closing on a client that still sends resets the connection, and the reset may overtake our answer. So what comes
        is thrown away for a moment between the answer and its end (nginx: lingering_close).
        """

        async def unhurried(message: Message) -> None:
            if self._refused and message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            if self._refused and message["type"] == "http.response.body" and not message.get("more_body"):
                await send({**message, "more_body": True})
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LINGER_S):
                        while self._more:
                            self._more = (await self._receive()).get("more_body", False)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        return unhurried
