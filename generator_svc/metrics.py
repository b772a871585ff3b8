"""What Prometheus reads of the generator, besides the chassis' own."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class GeneratorMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.stage_seconds = Histogram(
            "generator_stage_duration_seconds",
            "Time a request spent in each stage, waiting included.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._questions = Counter(
            "generator_questions",
            "Questions answered, or left open for lack of probability.",
            ["outcome"],
            registry=registry,
        )
        self._truncated = Counter(
            "generator_truncated_passages", "Passages cut so that the question fits.", registry=registry
        )
        self._running = Gauge(
            "generator_running_questions", "Questions that are being generated, together.", registry=registry
        )
        self._tokens = Gauge(
            "generator_decode_tokens", "What they take of the budget max_decode_tokens.", registry=registry
        )

    def watch_decoding(self, running: Callable[[], int], tokens: Callable[[], int]) -> None:
        self._running.set_function(running)
        self._tokens.set_function(tokens)

    def answered(self, *, abstained: bool, truncated: int) -> None:
        """One question went out, `truncated` of its passages cut."""
        self._questions.labels("abstained" if abstained else "answered").inc()
        self._truncated.inc(truncated)
