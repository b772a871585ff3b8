"""What the retriever measures of itself, beside what the chassis measures of every request."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class RetrieverMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.queries = Counter("rag_retriever_queries", "Query vectors searched.", ["collection"], registry=registry)
        self.batch_vectors = Histogram(
            "rag_retriever_batch_vectors", "Query vectors in one search.", buckets=BATCH_SIZES, registry=registry
        )
        self.batch_requests = Histogram(
            "rag_retriever_batch_requests", "Requests in one search.", buckets=BATCH_SIZES, registry=registry
        )
        self.search_seconds = Histogram(
            "rag_retriever_search_seconds", "Search and ranking of one batch.", buckets=SECONDS, registry=registry
        )
        self.passages_seconds = Histogram(
            "rag_retriever_passages_seconds", "Reading the passages of one batch.", buckets=SECONDS, registry=registry
        )
        self._queue_depth = Gauge("rag_retriever_queue_depth", "Requests waiting for a search.", registry=registry)
        self.passages = Gauge(
            "rag_retriever_passages", "Passages served.", ["collection", "generation"], registry=registry
        )

    def watch_queue(self, depth: Callable[[], int]) -> None:
        self._queue_depth.set_function(depth)
