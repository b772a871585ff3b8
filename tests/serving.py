"""Serving an app on a free port of 127.0.0.1 from a thread, for tests that need real sockets."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(app: ASGIApp, port: int | None = None) -> Iterator[str]:
    """The base URL of `app`, its lifespan entered; stopped at the end."""
    port = port or free_port()
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, ws="none", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until_s = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive(), "the server ended before it had started"
            assert time.monotonic() < until_s, "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
