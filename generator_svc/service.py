"""What a running generator holds, and how it starts, stops and reports on itself."""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import replace

import tokenizers
import torch
import transformers
from prometheus_client import CollectorRegistry

from generator_svc.checkpoint import load_checkpoint
from generator_svc.limits import most_new_tokens
from generator_svc.metrics import GeneratorMetrics
from generator_svc.pipeline import Pipeline
from generator_svc.readiness import RetrieverWatch
from generator_svc.retriever_client import RetrieverClient
from generator_svc.settings import GeneratorSettings
from generator_svc.stages import Generate, Job, Later, Outcome, Stages, batch_key, batch_size
from shared.door import Door
from shared.errors import StartupError
from shared.metrics import WorkerMetrics
from shared.schemas import ServiceInfo
from shared.telemetry import current_trace
from shared.version import VERSION
from shared.worker import DeviceWorker

CPU_CONCURRENCY, GPU_CONCURRENCY = 2, 64


class GeneratorService:
    """The model in its worker's thread, the way to the retriever, and the pipeline over both.

    `stages` and `pipeline` are there once `start` has returned.
    """

    stages: Stages
    pipeline: Pipeline

    def __init__(self, settings: GeneratorSettings) -> None:
        self._settings = settings
        self._watch: RetrieverWatch | None = None

    async def start(self, registry: CollectorRegistry, door: Door) -> None:
        """Load, warm up, open the door as wide as the device is, and begin to watch the retriever, there or not.

        Raises:
            StartupError: the checkpoint or the device cannot be used.
        """
        settings = self._settings
        metrics = self._metrics = GeneratorMetrics(registry)
        self._worker: DeviceWorker[Job, Outcome] = DeviceWorker(
            self._run,
            name="generator",
            setup=self._load,
            key=batch_key,
            size=batch_size,
            max_batch_size=settings.max_batch_rows,
            max_wait_ms=settings.max_wait_ms,
            max_queue=settings.max_queue,
            metrics=WorkerMetrics(registry, "generator"),
            trace=lambda job: job.trace if isinstance(job, Generate) else current_trace(),
            step=self._step,
            admits=self._admits,
        )
        await self._worker.start()
        checkpoint, scheduler = self.stages.checkpoint, self.stages.scheduler
        metrics.watch_device(checkpoint.device)
        self._door = door
        door.max_inside = settings.max_concurrent or concurrency(checkpoint.device)
        metrics.watch_decoding(lambda: scheduler.running, lambda: scheduler.tokens)
        self._retriever = RetrieverClient(settings, settings.index_encoder or checkpoint.encoder)
        self.pipeline = Pipeline(settings, checkpoint, self._worker, self._retriever, metrics)
        self._watch = RetrieverWatch(self._retriever, settings.readiness_interval_s)
        await self._watch.start()

    async def stop(self) -> None:
        if self._watch is not None:
            await self._watch.stop()
        await self._worker.stop()
        await self._retriever.aclose()

    def problems(self) -> list[str]:
        """Why a question cannot be answered now; empty when it can."""
        if self._watch is None:
            return ["the service is starting"]
        return [problem for problem in (self._worker.failure, self._watch.problem) if problem is not None]

    def info(self) -> ServiceInfo:
        checkpoint, encoder = self.stages.checkpoint, self.stages.encoder
        return ServiceInfo(
            service="generator",
            version=VERSION,
            versions={
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            },
            device=str(checkpoint.device),
            limits={
                **self._settings.limits,
                "max_concurrent": self._door.max_inside,
                "max_concurrent_per_client": self._door.max_inside_a_client,
                # The checkpoint's own bounds, where they are narrower.
                "max_new_tokens": most_new_tokens(self._settings, checkpoint),
                "max_source_tokens": checkpoint.max_source_tokens,
            },
            model={
                "name": checkpoint.name,
                "strategies": list(checkpoint.strategies),
                "n_docs": checkpoint.config.n_docs,
                "dtype": str(checkpoint.dtype).removeprefix("torch."),
                "encoder": checkpoint.encoder,
                "index_encoder": self._retriever.encoder,
                "dimension": encoder.dimension,
            },
        )

    # In the worker's thread; the stages are there once `_load` has run.

    def _run(self, jobs: list[Job]) -> Sequence[Outcome | Later]:
        return self.stages.run(jobs)

    def _step(self) -> bool:
        return self.stages.step()

    def _admits(self, jobs: list[Job]) -> bool:
        return self.stages.admits(jobs)

    def _load(self) -> None:
        settings = self._settings
        if settings.torch_threads:
            torch.set_num_threads(settings.torch_threads)
        checkpoint = load_checkpoint(
            settings.checkpoint,
            device=choose_device(settings.device),
            dtype=getattr(torch, settings.dtype),
            any_strategy=settings.any_strategy,
        )
        if settings.model_name is not None:
            checkpoint = replace(checkpoint, name=settings.model_name)
        self.stages = Stages(checkpoint, settings.max_decode_tokens, self._metrics, cuda_graphs=settings.cuda_graphs)
        self.stages.warm_up()
        _trim_memory()


def _trim_memory() -> None:
    """Gives back what loading has freed: the C library keeps it, a tenth of BART-large's weights and more."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it
        trim(0)


def concurrency(device: torch.device) -> int:
    """Requests that a device works on at once: what keeps it busy. On a CPU more only share the cores."""
    return GPU_CONCURRENCY if device.type == "cuda" else max(CPU_CONCURRENCY, os.cpu_count() or 1)


def choose_device(setting: str) -> torch.device:
    """Raises: StartupError: no such device here."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if setting == "auto" else setting
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise StartupError(f"the device {name!r} cannot be used: {error}; set GENERATOR_DEVICE=cpu") from error
    return device
