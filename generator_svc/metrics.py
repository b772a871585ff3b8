"""What Prometheus reads of the generator, besides the chassis' own."""

from collections.abc import Callable

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.gpu_memory import GpuMemory

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_STAGES = ("encode", "retrieve", "assemble", "generate", "prefill", "decode", "score")


class GeneratorMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        stage = Histogram(
            "generator_stage_duration_seconds",
            "Time a request spent in each stage, waiting included; prefill and decode are parts of generate.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._stage = {name: stage.labels(name) for name in _STAGES}
        self._first_token = Histogram(
            "generator_time_to_first_token_seconds",
            "From a request's arrival to the first step that decoded its question.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._generated = Counter("generator_generated_tokens", "Tokens of the answers given.", registry=registry)
        self._context = Counter("generator_context_tokens", "Tokens of contexts that were encoded.", registry=registry)
        questions = Counter(
            "generator_questions",
            "Questions answered, or left open for lack of probability.",
            ["outcome"],
            registry=registry,
        )
        self._questions = {outcome: questions.labels(outcome) for outcome in ("answered", "abstained")}
        self._truncated = Counter(
            "generator_truncated_passages", "Passages cut so that the question fits.", registry=registry
        )
        self._running = Gauge(
            "generator_running_questions", "Questions that are encoded, decoded or scored.", registry=registry
        )
        self._tokens = Gauge(
            "generator_decode_tokens", "What they take of the budget max_decode_tokens.", registry=registry
        )

    def watch_decoding(self, running: Callable[[], int], tokens: Callable[[], int]) -> None:
        self._running.set_function(running)
        self._tokens.set_function(tokens)

    def watch_device(self, device: torch.device) -> None:
        """The GPU's memory, where there is one."""
        if device.type == "cuda":
            GpuMemory(self._registry, lambda: {str(device): _memory(device)})

    def stage(self, name: str, seconds: float) -> None:
        self._stage[name].observe(seconds)

    def context(self, tokens: int) -> None:
        self._context.inc(tokens)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def generated(self, tokens: int) -> None:
        self._generated.inc(tokens)

    def answered(self, *, abstained: bool, truncated: int) -> None:
        """One question went out, `truncated` of its passages cut."""
        self._questions["abstained" if abstained else "answered"].inc()
        self._truncated.inc(truncated)


def _memory(device: torch.device) -> dict[str, int]:
    free, total = torch.cuda.mem_get_info(device)
    return {
        "total": total,
        "used": total - free,
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
    }
