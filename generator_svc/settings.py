"""Settings of the generator service, read from ``GENERATOR_…`` variables."""

from pathlib import Path
from typing import Literal, Self

import httpx
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from shared.settings import ServiceSettings

DEMO_CHECKPOINT = Path(__file__).parents[1] / "services" / "demo" / "checkpoint"
DEFAULT_COLLECTION = "default"


class GeneratorSettings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="GENERATOR_")

    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    checkpoint: str = Field(
        default=str(DEMO_CHECKPOINT), description="RAG checkpoint: a folder, or a model id on the Hugging Face hub."
    )
    model_name: str | None = Field(
        default=None, min_length=1, max_length=200, description="Name that responses give the model; without, its own."
    )
    device: str = Field(default="auto", description="`cpu`, `cuda`, `cuda:1` …; `auto`: CUDA where there is a GPU.")
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = Field(
        default="float32",
        description="Of the generator; the question encoder stays in float32. `int8` rounds the weights of a BART, "
        "on CPUs with VNNI or AMX.",
    )
    cuda_graphs: bool = Field(
        default=True, description="On CUDA: replay decode steps as captured graphs instead of launching each kernel."
    )
    torch_threads: int = Field(default=0, ge=0, description="CPU threads of one computation; 0: as torch chooses.")
    any_strategy: bool = Field(default=False, description="Allow both heads, whichever the checkpoint was trained for.")

    retriever_url: str = Field(default="http://127.0.0.1:8001", description="Where the retriever service listens.")
    retriever_api_key: SecretStr | None = Field(default=None, description="Key that the retriever asks for.")
    retriever_retry_s: float = Field(
        default=2.0, ge=0, description="How long a retriever that cannot be reached is tried again, with backoff."
    )
    retriever_connections: int = Field(default=32, ge=1, description="Connections kept open to the retriever.")
    readiness_interval_s: float = Field(default=1.0, gt=0, description="How often the retriever's readiness is read.")
    index_encoder: str | None = Field(
        default=None,
        description="Fingerprint that an index must carry; default: this checkpoint's own. RAG's training changes the "
        "question encoder and leaves the index as it was: then name the encoder that the index was made with.",
    )

    max_concurrent: int = Field(
        default=0,
        ge=0,
        description="Requests that are worked on at once. 0: as many as there are cores, at least 2; 64 on a GPU.",
    )
    max_questions: int = Field(default=32, ge=1, description="Questions in one request.")
    max_n_docs: int = Field(default=50, ge=1, description="Documents a question.")
    max_beams: int = Field(default=16, ge=1, description="num_beams of a request.")
    max_answers: int = Field(default=32, ge=1, description="Answers a question, asked for or given to be scored.")
    max_new_tokens: int = Field(default=256, ge=1, description="max_new_tokens of a request.")
    max_batch_rows: int = Field(default=128, ge=1, description="Contexts that are encoded together on the device.")
    max_decode_tokens: int = Field(
        default=200_000,
        ge=1,
        description="Cache positions of all answers that are generated together; further ones wait in the queue.",
    )

    @field_validator("retriever_url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"is no URL: {error}") from None
        if parsed.scheme not in {"http", "https"} or not parsed.host:
            raise ValueError("must begin with http:// or https:// and name a host")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _a_request_fits_the_queue(self) -> Self:
        if self.max_questions > self.max_queue:
            raise ValueError("max_questions is above max_queue: each question waits for the device by itself")
        return self

    @property
    def limits(self) -> dict[str, int | float]:
        """Every limit that a request can meet, for ``GET /info``."""
        names = (
            "max_questions",
            "max_n_docs",
            "max_beams",
            "max_answers",
            "max_new_tokens",
            "max_batch_rows",
            "max_decode_tokens",
        )
        return self.shared_limits | {name: getattr(self, name) for name in names}
