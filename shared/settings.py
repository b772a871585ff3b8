"""Settings that both services have, read from the environment once, at the start.

A subclass sets ``model_config = SettingsConfigDict(env_prefix="RETRIEVER_")`` and adds its own fields.
pydantic-settings reads the variables it knows and says nothing about the others, so ``RETRIEVER_PROT=9000`` would leave
the port as it was; :func:`load_settings` refuses it and names the nearest setting.

(In Kubernetes a Service called ``retriever`` puts ``RETRIEVER_PORT=tcp://…`` and its like into every pod: set
``enableServiceLinks: false`` there.)
"""

import difflib
import os
from pathlib import Path
from typing import Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import StartupError

_FILE_SUFFIX = "_FILE"


class ServiceSettings(BaseSettings):
    # Compose files write `VARIABLE: ${VARIABLE:-}`: an empty variable means "as it was".
    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_ignore_empty=True)

    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: SecretStr | None = Field(default=None, description="Key that may read: ask, search, inspect.")
    admin_key: SecretStr | None = Field(default=None, description="Key that may do everything.")
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024, description="Largest request body.")
    max_queue: int = Field(default=256, ge=1, description="Requests that may wait for the device; then 429.")
    max_wait_ms: float = Field(default=2.0, ge=0, le=1000, description="Longest wait for others to share a batch.")
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

    @field_validator("api_key", "admin_key")
    @classmethod
    def _fits_a_header(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and not all("!" <= char <= "~" for char in key.get_secret_value()):
            raise ValueError("a key consists of visible ASCII characters without spaces")
        return key

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_base_url(cls, url: str | None) -> str | None:
        parsed = urlsplit(url or "http://none")
        if parsed.scheme not in {"http", "https"} or not parsed.hostname:
            raise ValueError("must begin with http:// or https:// and name a host")
        return None if url is None else url.rstrip("/").removesuffix("/v1/traces")

    @model_validator(mode="after")
    def _limits_agree(self) -> Self:
        if self.default_timeout_ms > self.max_timeout_ms:
            raise ValueError("default_timeout_ms is above max_timeout_ms")
        if self.api_key is not None and self.api_key == self.admin_key:
            raise ValueError("api_key and admin_key are the same: readers could do everything")
        return self


Settings = TypeVar("Settings", bound=ServiceSettings)


def load_settings(cls: type[Settings]) -> Settings:
    """The settings of the environment. A key may also come from a file: ``RETRIEVER_API_KEY_FILE=/run/secrets/key``.

    Raises:
        StartupError: a value is refused, or a variable with the service's prefix is no setting.
    """
    prefix = cls.model_config.get("env_prefix", "").upper()
    known = {prefix + name.upper() for name in cls.model_fields}
    key_files = {prefix + name + _FILE_SUFFIX: name.lower() for name in ("API_KEY", "ADMIN_KEY")}
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
