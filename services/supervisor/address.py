"""Addresses of the services: how they are written, and whether they are free."""

import socket

from services.client import RagClient
from shared.errors import RagError, StartupError

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104


def url_of(host: str, port: int) -> str:
    """The address at which this machine reaches a service that listens on ``host``."""
    reachable = _ANY.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def check_free(host: str, port: int, option: str) -> None:
    """Raises: StartupError where nothing can listen there; the message says who does, and what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As uvicorn does: a port in TIME_WAIT, which a service has just left, is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartupError(
                f"cannot listen on {host}:{port}: {_holder(host, port) or error.strerror}. "
                f"Stop it, or choose another port: rag up {option} {_another(port)}"
            ) from None


def _holder(host: str, port: int) -> str | None:
    """Who listens there, if it is one of our own."""
    try:
        with RagClient(url_of(host, port), timeout_s=2) as client:
            return f"a {client.info().service} service runs there already"
    except (RagError, ValueError):
        return None


def _another(port: int) -> int:
    return port + 10 if port + 10 < 2**16 else port - 10
