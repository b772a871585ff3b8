"""Settings that both services have, read from the environment once, at the start.

A subclass sets ``model_config = SettingsConfigDict(env_prefix="RETRIEVER_")`` and adds its own fields.
pydantic-settings reads the variables it knows and says nothing about the others, so ``RETRIEVER_PROT=9000`` would leave
the port as it was; :func:`load_settings` refuses it and names the nearest setting.

(In Kubernetes a Service called ``retriever`` puts ``RETRIEVER_PORT=tcp://…`` and its like into every pod: set
``enableServiceLinks: false`` there.)
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import StartupError

_FILE_SUFFIX = "_FILE"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ORIGIN = re.compile(r"https?://[^/\s,*?#@]+", re.IGNORECASE)


class ServiceSettings(BaseSettings):
    # Compose files write `VARIABLE: ${VARIABLE:-}`: an empty variable means "as it was".
    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_ignore_empty=True)

    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: SecretStr | None = Field(default=None, description="Key that may read: ask, search, inspect.")
    admin_key: SecretStr | None = Field(default=None, description="Key that may do everything.")
    client_keys: SecretStr | None = Field(
        default=None,
        description="Further keys that may read, one a client, as `name:key` with commas or white space between them; "
        "each has its own share.",
    )
    cors_origins: str | None = Field(
        default=None,
        description="Origins whose pages may call the service from a browser, such as `https://app.example.org`, with "
        "commas between them. `*`: all.",
    )
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024, description="Largest request body.")
    max_held_bytes: int = Field(
        default=256 * 2**20, ge=1024, description="Memory for the bodies of all requests that wait or are worked on."
    )
    max_queue: int = Field(default=256, ge=1, description="Requests that may wait; the next one is refused with 429.")
    max_concurrent: int = Field(default=256, ge=1, description="Requests that are worked on at once.")
    client_share: float = Field(
        default=0.75,
        gt=0,
        le=1,
        description="Largest part of max_concurrent, max_queue, max_held_bytes and max_connections that one client "
        "takes: all who use one key, or where no keys are set one address.",
    )
    shed_after_ms: int = Field(
        default=500,
        ge=0,
        description="How long a queue may stand before only so many requests are taken as are answered without a wait, "
        "and the rest refused with 429. 0: never; then a request waits as long as its deadline allows.",
    )
    max_wait_ms: float = Field(
        default=0,
        ge=0,
        le=1000,
        description="Longest wait for others to share a batch; those that come during one share the next anyway.",
    )
    max_connections: int = Field(default=1000, ge=1, description="Connections that are open at once.")
    max_header_bytes: int = Field(default=32 * 2**10, ge=1024, description="Largest head of a request.")
    header_timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="Longest time from a request's first byte to its whole head.",
    )
    min_bytes_per_s: int = Field(
        default=1024,
        ge=1,
        description="Slowest rate at which a client may send a body or read an answer, on average, after ten seconds.",
    )
    idle_timeout_s: int = Field(
        default=75, ge=1, description="How long a connection stays open without a request; longer than clients keep it."
    )
    default_timeout_ms: int = Field(default=30_000, ge=1, description="Deadline of a request that names none.")
    max_timeout_ms: int = Field(default=600_000, ge=1, description="Longest deadline that a request may ask for.")
    drain_timeout_s: float = Field(default=30.0, ge=0, description="How long a stop waits for requests in flight.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least that is logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="JSON lines, or lines for people; auto: for people where they go to a terminal."
    )
    otlp_endpoint: str | None = Field(
        default=None, description="OTLP/HTTP collector that traces are sent to, as http://host:4318; without, none are."
    )
    otlp_sample_ratio: float = Field(
        default=1.0, ge=0, le=1, description="Share of traces that are recorded; one that came in decided already."
    )
    otlp_service_name: str | None = Field(default=None, description="Name in traces; default: rag- and the service's.")

    @field_validator("*")
    @classmethod
    def _keys_fit_a_header(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, SecretStr) and info.field_name != "client_keys":  # which are looked at one by one
            # An empty one, from a file that was never filled, would let everybody in.
            if not value.get_secret_value():
                raise ValueError("the key is empty")
            if not all("!" <= char <= "~" for char in value.get_secret_value()):
                raise ValueError("a key consists of visible ASCII characters without spaces")
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_base_url(cls, url: str | None) -> str | None:
        parsed = urlsplit(url or "http://none")
        if parsed.scheme not in {"http", "https"} or not parsed.hostname:
            raise ValueError("must begin with http:// or https:// and name a host")
        return None if url is None else url.rstrip("/").removesuffix("/v1/traces")

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: str | None) -> str | None:
        for origin in _split(origins or ""):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin: write scheme://host or scheme://host:port")
        return origins

    @property
    def origins(self) -> list[str]:
        return _split(self.cors_origins or "")

    @property
    def named_keys(self) -> dict[str, SecretStr]:
        """The keys of ``client_keys`` by their names."""
        return {} if self.client_keys is None else _named_keys(self.client_keys.get_secret_value())

    @property
    def shared_limits(self) -> dict[str, int | float]:
        """The limits that both services have, for ``GET /info``; what one client may take of them beside each."""
        shared = ("max_held_bytes", "max_queue", "max_concurrent", "max_connections")
        own = (
            "max_body_bytes",
            "max_header_bytes",
            "header_timeout_s",
            "min_bytes_per_s",
            "idle_timeout_s",
            "max_wait_ms",
            "shed_after_ms",
            "default_timeout_ms",
            "max_timeout_ms",
        )
        limits: dict[str, int | float] = {name: getattr(self, name) for name in (*own, *shared)}
        return limits | {f"{name}_per_client": max(1, int(self.client_share * limits[name])) for name in shared}

    @model_validator(mode="after")
    def _limits_agree(self) -> Self:
        if self.default_timeout_ms > self.max_timeout_ms:
            raise ValueError("default_timeout_ms is above max_timeout_ms")
        if self.api_key is not None and self.api_key == self.admin_key:
            raise ValueError("api_key and admin_key are the same: readers could do everything")
        named = self.named_keys
        keys = [key for key in (self.api_key, self.admin_key, *named.values()) if key is not None]
        if len({key.get_secret_value() for key in keys}) < len(keys):
            raise ValueError("client_keys holds a key that is given twice: whose request it is could not be told")
        if self.max_body_bytes > self.client_share * self.max_held_bytes:
            raise ValueError("max_body_bytes is above client_share of max_held_bytes: no client could send such a body")
        return self


def _split(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _named_keys(text: str) -> dict[str, SecretStr]:
    """Raises: ValueError, which tells no key."""
    found: dict[str, SecretStr] = {}
    for place, entry in enumerate(_split(text), start=1):
        name, _, key = entry.partition(":")
        if not _NAME.fullmatch(name) or not key or not all("!" <= char <= "~" for char in key):
            raise ValueError(f"entry {place} of client_keys is not of the form name:key, in visible ASCII characters")
        if name in found or name in {"read", "admin"}:
            raise ValueError(f"the name {name!r} in client_keys is taken")
        found[name] = SecretStr(key)
    if not found:  # from a file that was never filled: it would let everybody in
        raise ValueError("client_keys holds no key")
    return found


Settings = TypeVar("Settings", bound=ServiceSettings)


def load_settings(cls: type[Settings]) -> Settings:
    """The settings of the environment. Every key may come from a file: ``RETRIEVER_API_KEY_FILE=/run/secrets/key``.

    Raises:
        StartupError: a value is refused, or a variable with the service's prefix is no setting.
    """
    prefix = cls.model_config.get("env_prefix", "").upper()
    known = {prefix + name.upper() for name in cls.model_fields}
    key_files = {
        prefix + name.upper() + _FILE_SUFFIX: name
        for name, field in cls.model_fields.items()
        if field.annotation == SecretStr | None
    }
    _refuse_unknown(prefix, {*known, *key_files})
    keys: dict[str, Any] = {
        field: _read_key(variable) for variable, field in key_files.items() if os.environ.get(variable)
    }
    for field in keys:
        if os.environ.get(prefix + field.upper()):
            raise StartupError(f"{prefix}{field.upper()} and {prefix}{field.upper()}{_FILE_SUFFIX} are both set")
    try:
        return cls(**keys)
    except ValidationError as refused:
        lines = []
        for error in refused.errors(include_input=False, include_url=False):
            variable = prefix + "_".join(str(part) for part in error["loc"]).upper() if error["loc"] else "settings"
            lines.append(f"{variable}: {error['msg'].removeprefix('Value error, ')}")
        raise StartupError("; ".join(lines)) from None


def _refuse_unknown(prefix: str, known: set[str]) -> None:
    for name in sorted(os.environ):
        if prefix and name.upper().startswith(prefix) and name.upper() not in known:
            # Compared without the prefix, which would make any two names look alike.
            names = sorted(variable.removeprefix(prefix) for variable in known)
            near = difflib.get_close_matches(name.upper().removeprefix(prefix), names, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise StartupError(f"{name} is set, but there is no such setting; {hint}")


def _read_key(variable: str) -> SecretStr:
    try:
        return SecretStr(Path(os.environ[variable]).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{variable}: cannot read the key: {error}") from None
