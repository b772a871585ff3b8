"""Settings of the retriever service: environment variables with the prefix ``RETRIEVER_``."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from retriever_svc.devices import CUDA_MAX_HITS, Device, GpuStorage
from shared.settings import ServiceSettings

DEMO_PASSAGES = Path(__file__).parent.parent / "services" / "demo" / "data" / "passages.parquet"


class RetrieverSettings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="RETRIEVER_")

    port: int = Field(default=8001, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    data_dir: Path = Field(default=Path("data"), description="Folder that holds the collections.")
    seed: Path = Field(
        default=DEMO_PASSAGES,
        description="Parquet file from which the collection `default` is made where there is none.",
    )
    device: Device = Field(default="auto", description="Where faiss searches: auto takes a GPU where it sees one.")
    gpu_storage: GpuStorage = Field(
        default="float32", description="Embeddings on the GPU; float16 halves its memory, near the cut it may miss one."
    )
    faiss_threads: int = Field(default=0, ge=0, le=1024, description="Threads of a search on the CPU; 0 chooses.")
    max_batch_size: int = Field(default=128, ge=1, description="Query vectors that share one search.")
    max_batch_vectors: int = Field(default=1024, ge=1, description="Query vectors of one request.")
    max_n_docs: int = Field(default=1000, ge=1, le=CUDA_MAX_HITS, description="Documents per query.")
    keep_generations: int = Field(
        default=2, ge=2, le=100, description="Newest generations of a collection that stay on the disk, for a rollback."
    )
    rebuild_after: int = Field(
        default=20_000,
        ge=1,
        description="Passages written or deleted since a generation, after which the next is built in the background.",
    )
    canary_fraction: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Share of the queries that is searched again, exactly, in the background, to know the recall of "
        "indexes that are not exact; 0: none.",
    )
    canary_k: int = Field(
        default=5,
        ge=1,
        le=100,
        description="Documents of a query that count for the recall, where it asks for as many.",
    )
    canary_window: int = Field(default=1000, ge=1, le=100_000, description="Last queries that the recall is about.")
    canary_min_recall: float = Field(default=0.9, ge=0, le=1, description="Recall below which the log warns.")
    max_documents: int = Field(
        default=50_000, ge=1, description="Documents of one response: query vectors times n_docs."
    )
