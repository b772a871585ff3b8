"""Bearer keys: one that may read, one that may do everything. Off while no key is set.

Every path needs a key except those named open (liveness, readiness, metrics, and what a service adds): a route that
was forgotten is closed, not open. Routes that change things ask for the admin key with ``requires("admin")``.
"""

import hmac
from collections.abc import Callable
from typing import Literal

from fastapi import Request
from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from shared.errors import Forbidden, Unauthorized
from shared.settings import ServiceSettings

Role = Literal["read", "admin"]
_ROLE = "shared.role"  # key of the ASGI scope


class Authenticate:
    """Finds out whose key it is, and leaves the role in the scope."""

    def __init__(self, app: ASGIApp, *, settings: ServiceSettings, open_paths: frozenset[str]) -> None:
        self.app = app
        self.open_paths = open_paths
        # Both are compared every time, in constant time: how long the answer takes says nothing about a key.
        self.keys: list[tuple[Role, bytes]] = [
            (role, key.get_secret_value().encode()) for role, key in _keys(settings).items() if key is not None
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            role = self._role_of(scope) if self.keys else "admin"
            if role is None and scope["path"] not in self.open_paths:
                raise Unauthorized("this needs the header `Authorization: Bearer KEY` with a valid key")
            scope[_ROLE] = role
        await self.app(scope, receive, send)

    def _role_of(self, scope: Scope) -> Role | None:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        matches = [role for role, known in self.keys if hmac.compare_digest(key.strip(), known)]
        return matches[0] if matches and scheme.lower() == b"bearer" else None


def _keys(settings: ServiceSettings) -> dict[Role, SecretStr | None]:
    return {"read": settings.api_key, "admin": settings.admin_key}


def auth_is_on(settings: ServiceSettings) -> bool:
    return any(key is not None for key in _keys(settings).values())


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
