"""What the retriever measures of its searches; requests and batches are measured by the chassis."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class RetrieverMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.queries = Counter("retriever_queries", "Query vectors searched.", ["collection"], registry=registry)
        self.search_seconds = Histogram(
            "retriever_search_duration_seconds", "Search and ranking of a batch.", buckets=_SECONDS, registry=registry
        )
        self.passages_seconds = Histogram(
            "retriever_passages_duration_seconds",
            "Reading the passages of a batch.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.passages = Gauge("retriever_passages", "Passages served.", ["collection", "generation"], registry=registry)
