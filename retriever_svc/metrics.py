"""What the retriever measures of its searches and shows of its indexes; the chassis measures requests and batches."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from retriever_svc.collection import Collection
from shared.gpu_memory import GpuMemory, nvml_memory

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_BUILD = ("collection", "generation", "kind", "dtype", "device", "encoder")


class RetrieverMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.queries = Counter("retriever_queries", "Query vectors searched.", ["collection"], registry=registry)
        stage = Histogram(
            "retriever_stage_duration_seconds",
            "Time of a batch's stages: search (with ranking), take (reading its passages).",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.search_seconds = stage.labels("search")
        self.take_seconds = stage.labels("take")
        self._builds = Counter(
            "retriever_builds", "Generations built while serving.", ["collection", "outcome"], registry=registry
        )
        self.recall = Gauge(
            "retriever_recall",
            "Share of the true best documents that the queries compared last found.",
            ["collection"],
            registry=registry,
        )
        self.canary = Counter(
            "retriever_canary_queries",
            "Queries sampled for the recall: compared with exact search, skipped as others waited, or failed.",
            ["collection", "outcome"],
            registry=registry,
        )

    def watch_builds(self, collection: str) -> Callable[[str], None]:
        """Where the builds of a collection are counted: done or failed."""
        outcomes = {outcome: self._builds.labels(collection, outcome) for outcome in ("done", "failed")}
        return lambda outcome: outcomes[outcome].inc()

    def watch_gpus(self, devices: Iterable[str]) -> None:
        """The memory of GPUs, if an index is on one: faiss itself does not tell it."""
        if any(device != "cpu" for device in devices):
            GpuMemory(self._registry, nvml_memory)

    def watch_indexes(self, collections: Callable[[], Mapping[str, Collection]]) -> None:
        self._registry.register(_Indexes(collections))


class _Indexes(Collector):
    """Read when Prometheus asks: what no longer serves leaves no series behind."""

    def __init__(self, collections: Callable[[], Mapping[str, Collection]]) -> None:
        self._collections = collections

    def collect(self) -> Iterable[GaugeMetricFamily]:
        passages = GaugeMetricFamily("retriever_index_passages", "Passages that can be found.", labels=["collection"])
        changes = GaugeMetricFamily(
            "retriever_index_pending_changes",
            "Passages written or deleted since the generation was built.",
            labels=["collection"],
        )
        version = GaugeMetricFamily(
            "retriever_index_version", "Number of the last change that searches see.", labels=["collection"]
        )
        info = GaugeMetricFamily("retriever_index_info", "1; the labels tell which generation serves.", labels=_BUILD)
        for name, collection in list(self._collections().items()):
            about = collection.info
            passages.add_metric([name], about.count)
            changes.add_metric([name], collection.delta.size)
            version.add_metric([name], about.version)
            info.add_metric([name, about.generation, about.kind, about.dtype, about.device, about.encoder], 1)
        return [passages, changes, version, info]
