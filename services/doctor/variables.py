"""The environment: values that are refused, variables that are misspelt, settings that contradict each other."""

import difflib
import os
from collections.abc import Iterator

from services.client.calls import Service
from services.doctor.deployment import Deployment
from services.doctor.finding import Finding, Findings
from shared.errors import StartupError
from shared.settings import ServiceSettings

_found = Findings("variables")

_PREFIXES = ("GENERATOR", "RETRIEVER")
_OF_THE_CLIENT = {"RAG_URL", "RAG_RETRIEVER_URL", "RAG_API_KEY"}
_OF_TESTS = {"RAG_REQUIRE_BROWSER"}


def check(deployment: Deployment) -> Iterator[Finding]:
    for service, error in deployment.refused.items():
        yield _refused(service, error)
    for service, settings in deployment.settings.items():
        yield _read(service, settings)
    for name in sorted(os.environ):
        if (hint := _misspelt(name)) is not None:
            what = f"the variable {name} is set, and read by nobody"
            yield _found("problem", what, f"did you mean {hint}?")
    yield from _addresses(deployment)


def _refused(service: Service, error: StartupError) -> Finding:
    mend = f"correct or unset the variable: the {service} refuses to start with it"
    return _found("problem", f"{service}: {error.message}", mend)


def _read(service: Service, settings: ServiceSettings) -> Finding:
    changed = sorted(settings.model_fields_set)
    what = (
        f"{service}: {', '.join(changed)} set, all else as by default" if changed else f"{service}: all as by default"
    )
    return _found("ok", what)


def _misspelt(name: str) -> str | None:
    """The variable that was probably meant; a misspelt setting behind a right prefix is refused by the service."""
    prefix, underscore, rest = name.partition("_")
    if prefix == "RAG" and name not in _OF_THE_CLIENT | _OF_TESTS:
        near = difflib.get_close_matches(name, sorted(_OF_THE_CLIENT), n=1, cutoff=0.8)
        return near[0] if near else None
    if not underscore or prefix.upper() in _PREFIXES:
        return None
    near = difflib.get_close_matches(prefix.upper(), _PREFIXES, n=1, cutoff=0.85)
    return f"{near[0]}_{rest}" if near else None


def _addresses(deployment: Deployment) -> Iterator[Finding]:
    """`rag up` tells the generator where the retriever listens; a generator started by itself has to be told."""
    generator, retriever = deployment.generator, deployment.retriever
    if generator is None or retriever is None or deployment.services != {"generator", "retriever"}:
        return
    listens = deployment.listens_at("retriever")
    if retriever.port and not deployment.names_retriever and generator.retriever_url != listens:
        what = f"the retriever listens at {listens}; a generator without `rag up` looks at {generator.retriever_url}"
        yield _found("note", what, f"set GENERATOR_RETRIEVER_URL={listens}")
