"""One look at a service: does it answer, is it one of ours, is it ready, what does it say, what time is it there."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from pydantic import ValidationError

from shared.schemas import Health, ServiceInfo

_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Visit:
    """``answers``: something speaks HTTP there; ``health``: and it is a service of ours."""

    url: str
    answers: bool = False
    health: Health | None = None
    info: ServiceInfo | None = None
    info_status: int = 0
    key: str | None = None
    skew_s: float | None = None
    why_not: str = ""

    @property
    def ours(self) -> bool:
        return self.health is not None

    def get(self, path: str, key: str | None) -> httpx.Response:
        """Raises: httpx.HTTPError."""
        with _client(self.url) as http:
            return http.get(path, headers=_bearer(key))


def visit(url: str, keys: Sequence[str]) -> Visit:
    """``keys`` are tried in turn where the service asks for one."""
    try:
        with _client(url) as http:
            began = time.time()
            ready = http.get("/readyz")
            skew_s = _skew_s(ready, (began + time.time()) / 2)
            try:
                health = Health.model_validate(ready.json())
            except (ValueError, ValidationError):
                return Visit(url, answers=True, skew_s=skew_s, why_not="what answers there is no service of ours")
            for key in (None, *keys):
                response = http.get("/info", headers=_bearer(key))
                if response.status_code != httpx.codes.UNAUTHORIZED:
                    break
            info = _info(response)
            return Visit(url, True, health, info, response.status_code, key, skew_s)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Visit(url, why_not=str(error) or type(error).__name__)


def _client(url: str) -> httpx.Client:
    # trust_env: a proxy of the environment is not for neighbours; the generator does not use one either.
    return httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False)


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _info(response: httpx.Response) -> ServiceInfo | None:
    try:
        body: Any = response.json()
        return ServiceInfo.model_validate(body) if response.is_success else None
    except (ValueError, ValidationError):
        return None


def _skew_s(response: httpx.Response, now_s: float) -> float | None:
    """How far its clock is ahead of ours. The Date header counts whole seconds."""
    try:
        return parsedate_to_datetime(response.headers["Date"]).timestamp() + 0.5 - now_s
    except (KeyError, ValueError):
        return None
