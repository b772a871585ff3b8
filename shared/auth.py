"""Bearer keys: those that may read, and one that may do everything. Off while no key is set.

Every path needs a key except those named open (liveness, readiness, metrics, and what a service adds): a route that
was forgotten is closed, not open. Routes that change things ask for the admin key with ``requires("admin")``.
"""

import hashlib
import hmac
from collections.abc import Callable
from typing import Literal

from fastapi import Request
from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from shared.clients import CLIENT_KEY
from shared.errors import Forbidden, Unauthorized
from shared.settings import ServiceSettings

Role = Literal["read", "admin"]
_ROLE = "shared.role"  # key of the ASGI scope


class Authenticate:
    """Finds out whose key it is, and leaves its name and role in the scope."""

    def __init__(self, app: ASGIApp, *, settings: ServiceSettings, open_paths: frozenset[str]) -> None:
        self.app = app
        self.open_paths = open_paths
        # Digests are compared, and all of them every time: how long it takes says nothing about a key, nor its length.
        self.keys = [(name, role, _digest(key.get_secret_value().encode())) for name, role, key in _keys(settings)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope[_ROLE] = "admin"
            if self.keys:
                scope[CLIENT_KEY], scope[_ROLE] = self._whose(scope)
                if scope[_ROLE] is None and scope["path"] not in self.open_paths:
                    raise Unauthorized("this needs the header `Authorization: Bearer KEY` with a valid key")
        await self.app(scope, receive, send)

    def _whose(self, scope: Scope) -> tuple[str | None, Role | None]:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = _digest(key.strip())
        matches = [(name, role) for name, role, known in self.keys if hmac.compare_digest(digest, known)]
        return matches[0] if matches and scheme.lower() == b"bearer" else (None, None)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _keys(settings: ServiceSettings) -> list[tuple[str, Role, SecretStr]]:
    known: list[tuple[str, Role, SecretStr | None]] = [
        ("read", "read", settings.api_key),
        ("admin", "admin", settings.admin_key),
        *((name, "read", key) for name, key in settings.named_keys.items()),
    ]
    return [(name, role, key) for name, role, key in known if key is not None]


def auth_is_on(settings: ServiceSettings) -> bool:
    return bool(_keys(settings))


class Requirement:
    """A FastAPI dependency; the OpenAPI document finds it by its class."""

    def __init__(self, role: Role) -> None:
        self.role = role

    def __call__(self, request: Request) -> None:
        """Raises: Forbidden: the key is valid, but not for this."""
        if self.role == "admin" and request.scope.get(_ROLE) != "admin":
            raise Forbidden("this needs the admin key")


def requires(role: Role) -> Callable[..., None]:
    """``dependencies=[Depends(requires("admin"))]``."""
    return Requirement(role)
