"""A request whose client went away is cancelled, so that what it waits for in a queue never runs."""

import asyncio
from typing import cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CancelOnDisconnect:
    """Watches the connection from the moment the body has arrived until the response is out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        task = cast("asyncio.Task[None]", asyncio.current_task())
        body_arrived, gone = asyncio.Event(), asyncio.Event()
        answered = ours = False

        async def app_receive() -> Message:
            if body_arrived.is_set():
                await gone.wait()
                return {"type": "http.disconnect"}
            message = await receive()
            if not message.get("more_body", False):
                body_arrived.set()
            return message

        async def app_send(message: Message) -> None:
            nonlocal answered
            # Servers report the end of a response as a disconnect, too; that one is none.
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        async def watch() -> None:
            await body_arrived.wait()
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            if not answered:
                nonlocal ours
                ours = True
                task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            await self.app(scope, app_receive, app_send)
        except asyncio.CancelledError:
            if not ours or task.uncancel() > 0:
                raise  # someone else cancels us: the server stops
        finally:
            watcher.cancel()
