"""One batch of requests: one search through faiss, one read of passages, and each request gets its own answer.

Runs in the worker thread.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from retriever_svc.canary import Canary
from retriever_svc.collection import Collection
from retriever_svc.filters import Selection
from retriever_svc.metrics import RetrieverMetrics
from retriever_svc.ranking import Ranked
from shared.documents import Documents
from shared.retrieval import RetrieveQuery, RetrieveResult
from shared.telemetry import Trace, current_trace


@dataclass(frozen=True)
class SearchItem:
    """A request whose query was checked against its collection; ``selection``: of its filter, where it has one."""

    query: RetrieveQuery
    collection: Collection
    selection: Selection | None = None
    trace: Trace | None = field(default_factory=current_trace)

    @property
    def size(self) -> int:
        return len(self.query.vectors)

    @property
    def key(self) -> tuple[int, str, str | None]:
        """Items of one key may share a batch.

        A generation may be loaded twice, by a rollback to it: what is written later is in the one that serves alone.
        """
        params = self.query.search_params
        return id(self.collection), params.model_dump_json() if params else "", self.query.filter


@dataclass(frozen=True)
class Call:
    """A function for the thread that searches, which runs alone."""

    function: Callable[[], Any]


def run_batch(items: list[SearchItem | Call], metrics: RetrieverMetrics, canary: Canary | None = None) -> Sequence[Any]:
    """What the worker does: one result an item."""
    if isinstance(items[0], Call):
        return [item.function() for item in items if isinstance(item, Call)]
    return search_batch([item for item in items if isinstance(item, SearchItem)], metrics, canary)


def search_batch(
    items: list[SearchItem], metrics: RetrieverMetrics, canary: Canary | None = None
) -> list[RetrieveResult]:
    """The results of ``items``, all of one collection, in their order."""
    collection = items[0].collection
    vectors_BD = np.concatenate([item.query.vectors for item in items])
    n_docs = [item.query.n_docs for item in items for _ in range(item.size)]

    started = time.perf_counter()
    ranked = collection.search(vectors_BD, n_docs, items[0].query.search_params, items[0].selection)
    searched = time.perf_counter()
    of_batch = iter(ranked)
    answers = [list(itertools.islice(of_batch, item.size)) for item in items]
    if canary is not None:
        for item, answer in zip(items, answers, strict=True):
            canary.sample(collection, item.query, answer, item.selection)
    wanted = [
        one.rows for item, answer in zip(items, answers, strict=True) if item.query.return_passages for one in answer
    ]
    passages = collection.take(np.concatenate(wanted)) if wanted else None
    done = time.perf_counter()

    metrics.queries.labels(collection.name).inc(len(vectors_BD))
    metrics.search_seconds.observe(searched - started)
    metrics.take_seconds.observe(done - searched)
    for item in items:
        if item.trace is not None:
            about = _attributes(item, len(vectors_BD))
            item.trace.add("search", started, searched, {"db.system.name": "faiss", **about})
            item.trace.add("take", searched, done, {"db.system.name": "lance", **about})
    timings_ms = {"search": (searched - started) * 1e3, "passages": (done - searched) * 1e3}
    results, start = [], 0
    for item, answer in zip(items, answers, strict=True):
        counts = [len(one.rows) for one in answer]
        documents = None
        if item.query.return_passages and passages is not None:
            documents = Documents(passages.slice(start, sum(counts)), counts)
            start += sum(counts)
        results.append(_result(item, answer, documents, timings_ms))
    return results


def _attributes(item: SearchItem, batch_vectors: int) -> dict[str, str | int]:
    """Of a request's spans: its own query, and how many vectors shared the search."""
    return {
        "db.collection.name": item.collection.name,
        "db.operation.batch.size": item.size,
        "rag.batch.vectors": batch_vectors,
        "rag.n_docs": item.query.n_docs,
        "rag.index.generation": item.collection.generation,
        "rag.index.kind": item.collection.manifest.kind,
    }


def _result(
    item: SearchItem, ranked: list[Ranked], documents: Documents | None, timings_ms: dict[str, float]
) -> RetrieveResult:
    query, collection = item.query, item.collection
    return RetrieveResult(
        doc_ids=[one.ids for one in ranked],
        doc_scores=[one.scores for one in ranked],
        doc_embeds=[one.embeddings for one in ranked] if query.return_embeds else None,
        docs=documents,
        index=collection.index_info,
        timings_ms=timings_ms,
    )
