"""The canary compares an answer with brute force over what could be found when it was given."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from retriever_svc.build import Options, build_collection
from retriever_svc.canary import FEWEST_TO_WARN, MOST_WAITING, Canary
from retriever_svc.changes import Delete, Upsert
from retriever_svc.collection import Collection
from retriever_svc.exact import SLICE_NUMBERS, Best, slices
from retriever_svc.metadata import from_json
from retriever_svc.metrics import RetrieverMetrics
from retriever_svc.ranking import inner_products
from retriever_svc.settings import RetrieverSettings
from shared.documents import passage_of
from shared.retrieval import RetrieveQuery
from shared.schemas import SearchParams
from tests.filters_data import metadata_columns, random_metadata
from tests.retriever_data import passage_table, random_embeddings, source_of

N, D = 700, 8
NARROW = SearchParams(nprobe=1, over_fetch=1)
EMBEDDINGS = random_embeddings(N, D)
METADATA = random_metadata(N, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection whose index looks at one list of seventeen."""
    folder = tmp_path_factory.mktemp("canary") / "narrow"
    table = passage_table(EMBEDDINGS)
    for name, column in metadata_columns(METADATA).items():
        table = table.append_column(name, column)
    build_collection(folder, source_of(table, 100), options=Options("ivf-flat", NARROW))
    return folder


def canary_of(serves: bool = True, **changes: Any) -> tuple[Canary, CollectorRegistry]:
    registry = CollectorRegistry()
    options = {"canary_fraction": 1.0, **changes}
    return Canary(RetrieverSettings(**options), RetrieverMetrics(registry), at_once, lambda _: serves), registry


async def at_once(function: Callable[[], Any]) -> Any:
    return function()


def counted(registry: CollectorRegistry, outcome: str) -> float:
    labels = {"collection": "narrow", "outcome": outcome}
    return registry.get_sample_value("retriever_canary_queries_total", labels) or 0.0


async def until(done: Callable[[], bool]) -> None:
    while not done():  # noqa: ASYNC110  what is awaited shows in the metrics
        await asyncio.sleep(0.001)


def run(canary: Canary, work: Callable[[], Awaitable[None]]) -> None:
    async def running() -> None:
        await canary.start()
        try:
            await asyncio.wait_for(work(), 60)
        finally:
            await canary.stop()

    asyncio.run(running())


def change(collection: Collection, dice: np.random.Generator) -> None:
    """Write and delete some."""
    ids = dice.choice(2 * N, 20, replace=False)
    rows = random_metadata(20, int(dice.integers(1000)))
    metadata = from_json(rows, collection.passages.metadata)
    embeddings = dice.standard_normal((20, D)).astype(np.float32)
    collection.apply(collection.applied + 1, Upsert(ids, [""] * 20, [""] * 20, embeddings, metadata))
    collection.apply(collection.applied + 1, Delete(dice.choice(2 * N, 60, replace=False)))


def findable(collection: Collection, year: int | None) -> np.ndarray:
    """The embeddings that a search of now may return."""
    rows = [row for i in range(2 * N) if (row := collection.delta.row_of(i)) is not None]
    years = [passage_of(passage).metadata["year"] for passage in collection.take(np.array(rows)).to_pylist()]
    kept = [row for row, found in zip(rows, years, strict=True) if year is None or (found or 0) >= year]
    base = [row for row in kept if row < N]
    added = [row for row in kept if row >= N]
    return np.concatenate(
        [
            collection.index.embeddings(np.array(base, np.int64)),
            collection.delta.embeddings(np.array(added, np.int64)) if added else np.empty((0, D), np.float32),
        ]
    )


@given(
    seed=st.integers(0, 2**32 - 1),
    n_docs=st.integers(1, 12),
    changes=st.integers(0, 3),
    year=st.none() | st.integers(1990, 2001),
)
@settings(max_examples=25)
def test_the_recall_is_that_of_brute_force_at_the_moment_of_the_answer(
    folder: Path, seed: int, n_docs: int, changes: int, year: int | None
) -> None:
    dice = np.random.default_rng(seed)
    collection = Collection.open(folder, device="cpu")
    for _ in range(changes):
        change(collection, dice)
    query = RetrieveQuery(dice.standard_normal((1, D)).astype(np.float32), n_docs=n_docs)
    selection = None if year is None else collection.filters.select(f"year >= {year}")
    answers = collection.search(query.vectors, [n_docs], selection=selection)
    k = min(n_docs, 5)
    truth = np.sort(inner_products(query.vectors[0], findable(collection, year)))[::-1][:k]
    canary, registry = canary_of()

    async def work() -> None:
        canary.sample(collection, query, answers, selection)
        for _ in range(3):  # before the canary looks
            change(collection, dice)
        await until(lambda: counted(registry, "checked") == 1 or not len(truth))

    run(canary, work)
    recall = canary.recall(collection)
    if len(truth):
        assert recall is not None
        assert recall.queries == 1
        assert recall.estimate == np.isin(truth, answers[0].scores[:k]).mean()
    else:  # there was nothing to find
        assert recall is None


def answer(canary: Canary, collection: Collection, seed: int, n: int = 1) -> None:
    query = RetrieveQuery(random_embeddings(n, D, seed=seed), n_docs=5)
    canary.sample(collection, query, collection.search(query.vectors, [5] * n))


def test_an_index_that_finds_too_little_is_noticed_once(folder: Path) -> None:
    collection = Collection.open(folder, device="cpu")
    canary, registry = canary_of()

    async def work() -> None:
        for seed in range(FEWEST_TO_WARN + 10):
            answer(canary, collection, seed)
            await until(lambda seed=seed: counted(registry, "checked") == seed + 1)

    with structlog.testing.capture_logs() as logs:
        run(canary, work)
    recall = canary.recall(collection)
    assert recall is not None
    assert (recall.at_k, recall.queries, recall.low) == (5, FEWEST_TO_WARN + 10, True)
    assert recall.estimate < 0.8
    assert registry.get_sample_value("retriever_recall", {"collection": "narrow"}) == recall.estimate
    (warning,) = [entry for entry in logs if entry["event"] == "recall_is_low"]
    assert (warning["collection"], warning["log_level"], warning["threshold"]) == ("narrow", "warning", 0.9)


def test_the_recall_is_that_of_the_last_queries(folder: Path) -> None:
    collection = Collection.open(folder, device="cpu")
    canary, registry = canary_of(canary_window=3)

    async def work() -> None:
        for seed in range(8):
            answer(canary, collection, seed)
            await until(lambda seed=seed: counted(registry, "checked") == seed + 1)

    run(canary, work)
    again, registry = canary_of(canary_window=3)

    async def the_last() -> None:
        for seed in range(5, 8):
            answer(again, collection, seed)
        await until(lambda: counted(registry, "checked") == 3)

    run(again, the_last)
    assert canary.recall(collection) == again.recall(collection)


def test_what_comes_faster_than_it_is_compared_is_skipped(folder: Path) -> None:
    collection = Collection.open(folder, device="cpu")
    canary, registry = canary_of()

    async def work() -> None:
        answer(canary, collection, 0, n=MOST_WAITING + 7)
        await until(lambda: counted(registry, "checked") == MOST_WAITING)

    run(canary, work)
    assert counted(registry, "skipped") == 7


def test_a_generation_that_serves_no_more_is_compared_with_itself_and_judges_no_other(folder: Path) -> None:
    collection = Collection.open(folder, device="cpu")
    canary, registry = canary_of(serves=False)

    async def work() -> None:
        answer(canary, collection, 0)
        await until(lambda: counted(registry, "checked") == 1)

    run(canary, work)
    assert canary.recall(collection) is None
    assert registry.get_sample_value("retriever_recall", {"collection": "narrow"}) is None


def test_an_exact_index_and_a_fraction_of_none_cost_nothing(folder: Path, tmp_path: Path) -> None:
    build_collection(tmp_path / "narrow", source_of(passage_table(EMBEDDINGS)))
    exact = Collection.open(tmp_path / "narrow", device="cpu")
    off, of_off = canary_of(canary_fraction=0.0)
    on, of_on = canary_of()

    async def work() -> None:
        answer(off, Collection.open(folder, device="cpu"), 0)
        answer(on, exact, 0)

    run(off, work)
    run(on, work)
    for registry in (of_off, of_on):
        assert [counted(registry, outcome) for outcome in ("checked", "skipped")] == [0, 0]


def test_a_sample_is_about_as_large_as_the_fraction_says(folder: Path) -> None:
    collection = Collection.open(folder, device="cpu")
    canary, registry = canary_of(canary_fraction=0.25)

    async def work() -> None:
        await asyncio.sleep(0)
        answer(canary, collection, 0, n=2000)
        await until(lambda: counted(registry, "checked") == MOST_WAITING)

    run(canary, work)
    assert 400 < counted(registry, "checked") + counted(registry, "skipped") < 600


def test_a_failure_is_counted_and_the_next_query_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = Collection.open(folder, device="cpu")
    canary, registry = canary_of()

    async def work() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(collection.delta, "alive_at", lambda _: 1 / 0)
            answer(canary, collection, 0)
            await until(lambda: counted(registry, "failed") == 1)
        answer(canary, collection, 1)
        await until(lambda: counted(registry, "checked") == 1)

    run(canary, work)


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 200), k=st.integers(1, 20), found=st.integers(0, 20))
def test_the_best_of_many_slices_are_the_best(seed: int, n: int, k: int, found: int) -> None:
    dice = np.random.default_rng(seed)
    embeddings = (dice.integers(-2, 3, (n, 4)) / 2).astype(np.float32)  # full of equal scores
    query = dice.standard_normal(4).astype(np.float32)
    best = Best(query, k)
    for part in np.array_split(embeddings, 1 + int(dice.integers(8))):
        best.see(part)
    truth = np.sort(inner_products(query, embeddings))[::-1][:k]
    if n:
        assert best.recall(truth[:found]) == min(found, len(truth)) / len(truth)
        assert best.recall(truth - 1) == np.mean(truth - 1 >= truth[-1])
    else:
        assert best.recall(truth) is None


@pytest.mark.parametrize(("count", "dimension"), [(0, 8), (5, 8), (10_000, 768), (7, 2 * SLICE_NUMBERS)])
def test_slices_cover_every_row_once(count: int, dimension: int) -> None:
    rows: list[int] = []
    parts: Iterator[slice] = slices(count, dimension)
    for part in parts:
        assert (part.stop - part.start) * dimension <= max(SLICE_NUMBERS, dimension)
        rows += range(part.start, part.stop)
    assert rows == list(range(count))
