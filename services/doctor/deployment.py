"""What is examined: the settings that services started here would read, and the services that answer."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Literal

from generator_svc.settings import GeneratorSettings
from retriever_svc.settings import RetrieverSettings
from services.client.calls import Service
from services.doctor.visit import Visit, visit
from services.supervisor.address import url_of
from shared.errors import StartupError
from shared.settings import ServiceSettings, load_settings

NEEDS = {"generator": ("torch", "transformers", "tokenizers", "safetensors"), "retriever": ("faiss", "lance")}
"""The modules that each service needs besides what both have."""
Side = Literal["generator", "retriever", "both"]


def installed(service: Service) -> bool:
    return all(find_spec(module) is not None for module in NEEDS[service])


@dataclass(frozen=True)
class Deployment:
    """``services``: those that this machine should be able to run. Addresses not given follow from settings."""

    services: frozenset[Service]
    given_url: str | None = None
    given_retriever_url: str | None = None
    api_key: str | None = None
    settings: dict[Service, ServiceSettings] = field(default_factory=dict)
    refused: dict[Service, StartupError] = field(default_factory=dict)
    """Why the settings of a service cannot be read; there are none then."""

    @classmethod
    def here(
        cls, side: Side | None = None, url: str | None = None, retriever_url: str | None = None, key: str | None = None
    ) -> "Deployment":
        """``side``: which services belong on this machine; None: those whose libraries are installed."""
        both: tuple[Service, ...] = ("generator", "retriever")
        wanted = [service for service in both if (installed(service) if side is None else side in (service, "both"))]
        found = cls(frozenset(wanted), url and url.rstrip("/"), retriever_url and retriever_url.rstrip("/"), key)
        for service in both:
            try:
                found.settings[service] = load_settings(_SETTINGS[service])
            except StartupError as error:
                found.refused[service] = error
        return found

    @property
    def generator(self) -> GeneratorSettings | None:
        settings = self.settings.get("generator")
        return settings if isinstance(settings, GeneratorSettings) else None

    @property
    def retriever(self) -> RetrieverSettings | None:
        settings = self.settings.get("retriever")
        return settings if isinstance(settings, RetrieverSettings) else None

    def listens_at(self, service: Service) -> str:
        """The address that the service's own settings give it."""
        settings = self.settings.get(service)
        return url_of(settings.host, settings.port) if settings else url_of("127.0.0.1", _DEFAULT_PORTS[service])

    @property
    def names_retriever(self) -> bool:
        """Whether somebody said where the retriever is, so that it is expected to be there."""
        return self.given_retriever_url is not None or bool(os.environ.get("GENERATOR_RETRIEVER_URL"))

    @property
    def generator_url(self) -> str:
        return self.given_url or self.listens_at("generator")

    @property
    def retriever_url(self) -> str:
        """Where the generator looks for it; `rag up` tells it the retriever's own address, unless one is set."""
        if self.given_retriever_url is not None:
            return self.given_retriever_url
        if self.generator is not None and self.names_retriever:
            return self.generator.retriever_url
        return self.listens_at("retriever")

    @cached_property
    def visits(self) -> dict[Service, Visit]:
        """Both services, asked once."""
        return {
            "generator": visit(self.generator_url, self._keys(self.generator)),
            "retriever": visit(self.retriever_url, self._retriever_keys()),
        }

    def _keys(self, settings: ServiceSettings | None) -> list[str]:
        """What may be tried at a service: the key that was given, or those that its own settings name."""
        own = [] if settings is None else [settings.api_key, settings.admin_key]
        return [self.api_key] if self.api_key else [key.get_secret_value() for key in own if key is not None]

    def _retriever_keys(self) -> list[str]:
        theirs = self.generator.retriever_api_key if self.generator else None
        return ([theirs.get_secret_value()] if theirs else []) + self._keys(self.retriever)


_SETTINGS: dict[Service, type[ServiceSettings]] = {"generator": GeneratorSettings, "retriever": RetrieverSettings}
_DEFAULT_PORTS: dict[Service, int] = {"generator": 8000, "retriever": 8001}
