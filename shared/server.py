"""Runs an app until it is told to stop, and then lets the requests in flight finish."""

import asyncio
import logging
import math
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import cast

import structlog
import uvicorn
from fastapi import FastAPI

from shared.auth import auth_is_on
from shared.connections import GRACE_S, Connections
from shared.drain import Drain
from shared.errors import StartupError
from shared.logs import configure_logging
from shared.settings import ServiceSettings, Settings, load_settings

log = structlog.get_logger(__name__)

_OTHER_FILES = 512  # that a service holds open besides connections: collections, libraries, the other service


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which goes on listening while it drains.

    uvicorn itself closes its sockets at once: a client that was sent here a moment ago then finds the connection
    refused. Here it reads a 503 with Retry-After until the last request in flight is done, or the time is up.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, drain_timeout_s: float, connections: Connections) -> None:
        super().__init__(config)
        self.drain = drain
        self.drain_timeout_s = drain_timeout_s
        self.connections = connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._watching = asyncio.create_task(self.connections.watch(), name="connections")
        # Only now: who waits for this line connects at once.
        for sock in sockets or []:
            host, port = sock.getsockname()[:2]
            log.info("listening", url=f"http://{_bracketed(host)}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  uvicorn's signature
        # Unlike uvicorn's, it does not keep the signal to raise it again: a drained stop is a success.
        self.drain.begin()
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        until_s = time.monotonic() + self.drain_timeout_s
        log.info("draining", in_flight=self.drain.in_flight)
        while self.drain.in_flight and time.monotonic() < until_s and not self.force_exit:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        if self.drain.in_flight:
            log.warning("drain_timed_out", in_flight=self.drain.in_flight)
        # What is left of the time is for clients that read slowly; then tasks are cancelled.
        self.config.timeout_graceful_shutdown = max(1, math.ceil(until_s - time.monotonic()))
        await super().shutdown(sockets)
        self._watching.cancel()


def run(settings_class: type[Settings], create_app: Callable[[Settings], FastAPI], *, grace_s: float = GRACE_S) -> int:
    """The main program of a service: its settings from the environment, its app, and then :func:`serve`."""
    try:
        settings = load_settings(settings_class)
        app = create_app(settings)
    except StartupError as error:
        return _refuse_to_start(error)
    return serve(app, settings, grace_s=grace_s)


def serve(app: FastAPI, settings: ServiceSettings, *, grace_s: float = GRACE_S) -> int:
    """Serves until SIGTERM or SIGINT; the exit code. A StartupError ends in one line on standard error and code 3."""
    configure_logging(settings.log_level, settings.log_format)
    connections = Connections(settings, app.state.registry, grace_s=grace_s)
    config = uvicorn.Config(
        app,
        http=cast("type[asyncio.Protocol]", connections.protocol),
        lifespan="off",  # entered in _run, where a StartupError can be caught; uvicorn would print its trace
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        proxy_headers=False,  # whose word counts is not known, and an address that a client chooses bounds nothing
        timeout_keep_alive=settings.idle_timeout_s,
    )
    _allow_open_files(settings.max_connections)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_run(app, settings, config, connections))
    except StartupError as error:
        return _refuse_to_start(error)
    except KeyboardInterrupt:  # before the server took over the signals
        return 128 + signal.SIGINT
    return 0


def _refuse_to_start(error: StartupError) -> int:
    print(f"error: {error.message}", file=sys.stderr)  # noqa: T201  for the person who started it
    return error.exit_code


def _allow_open_files(connections: int) -> None:
    """A connection is an open file, and the usual soft limit is 1024 of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < wanted:
            log.warning("too_few_open_files", allowed=most, advice=f"set max_connections to {most - _OTHER_FILES}")


async def _run(app: FastAPI, settings: ServiceSettings, config: uvicorn.Config, connections: Connections) -> None:
    # Bound first, so that a taken port shows before a model is loaded; it listens only when the app can answer.
    with _bind(settings) as sock:
        async with app.router.lifespan_context(app):
            if not auth_is_on(settings) and not is_loopback(sock.getsockname()[0]):
                log.warning("open_to_the_network", advice="set an admin key, or listen on 127.0.0.1")
            server = DrainingServer(config, app.state.drain, settings.drain_timeout_s, connections)
            await server.serve(sockets=[sock])
        log.info("stopped")


def _bind(settings: ServiceSettings) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartupError(f"cannot listen on host {settings.host}: {error}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        prefix = settings.model_config.get("env_prefix", "")
        raise StartupError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; set {prefix}PORT to another port"
        ) from None
    sock.set_inheritable(False)
    return sock


def is_loopback(host: str) -> bool:
    return host == "::1" or host.startswith("127.")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
