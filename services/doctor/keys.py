"""Keys: who may come in, who may read them, and whether the ones in use open the doors that they should."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx

from services.client.calls import Service
from services.doctor.deployment import Deployment
from services.doctor.finding import Finding, Findings
from shared.auth import auth_is_on
from shared.server import is_loopback
from shared.settings import ServiceSettings

_found = Findings("keys")


def check(deployment: Deployment) -> Iterator[Finding]:
    for service in sorted(deployment.services & deployment.settings.keys()):
        yield from _settings(service, deployment.settings[service])
    for name in sorted(os.environ):
        if name.endswith("_KEY_FILE") and name.startswith(("GENERATOR_", "RETRIEVER_")) and os.environ[name]:
            yield from _file(name, Path(os.environ[name]))
    yield from _door(deployment, "generator")
    between = list(_between(deployment))
    if not between or deployment.api_key:  # else it is the same key, told once
        yield from _door(deployment, "retriever")
    yield from between


def _settings(service: Service, settings: ServiceSettings) -> Iterator[Finding]:
    prefix = service.upper()
    if auth_is_on(settings):
        named = [name for name in ("api_key", "admin_key") if getattr(settings, name) is not None]
        yield _found("ok", f"{service}: asks for a key ({' and '.join(named)} set)")
        if settings.admin_key is None and service == "retriever":
            yield _found("note", "retriever: without an admin key nothing can be written", f"set {prefix}_ADMIN_KEY")
    elif not is_loopback(settings.host):
        what = f"{service}: listens on {settings.host} and asks for no key: everyone who reaches it may use it"
        yield _found("problem", what, f"set {prefix}_ADMIN_KEY and {prefix}_API_KEY, or {prefix}_HOST=127.0.0.1")
    else:
        yield _found("ok", f"{service}: asks for no key, and listens on this machine only")


def _file(name: str, path: Path) -> Iterator[Finding]:
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # the settings tell that it cannot be read
    if mode & stat.S_IROTH:
        yield _found("note", f"{name}: everyone on this machine can read {path}", f"chmod o-r {path}")


def _door(deployment: Deployment, service: Service) -> Iterator[Finding]:
    """Whether the key that was given, or one of the settings, is taken by the service that runs."""
    visit = deployment.visits[service]
    if not visit.ours:
        return
    if visit.info_status == httpx.codes.UNAUTHORIZED:
        flag = "--api-key or RAG_API_KEY"
        if deployment.api_key:
            what, mend = f"the {service} at {visit.url} refuses the key that was given", f"give a valid one in {flag}"
        else:
            what = f"the {service} at {visit.url} asks for a key, and refuses those of the settings here"
            mend = f"give one in {flag}; services started with other settings need a restart to take these"
        yield _found("problem", what, mend)
    elif visit.key is not None:
        yield _found("ok", f"the {service} at {visit.url} takes the key")


def _between(deployment: Deployment) -> Iterator[Finding]:
    """Whether the retriever takes the key that the generator shows."""
    visit, settings = deployment.visits["retriever"], deployment.generator
    if not visit.ours or settings is None or "generator" not in deployment.services:
        return
    key = settings.retriever_api_key
    try:
        status = visit.get("/v1/collections", key.get_secret_value() if key else None).status_code
    except httpx.HTTPError:
        return  # told by the check of the neighbours
    if status == httpx.codes.UNAUTHORIZED:
        shown = (
            "refuses the key in GENERATOR_RETRIEVER_API_KEY" if key else "asks the generator for a key, which has none"
        )
        mend = "set GENERATOR_RETRIEVER_API_KEY to the retriever's RETRIEVER_API_KEY, and start the generator again"
        yield _found("problem", f"the retriever at {visit.url} {shown}", mend)
