"""Filters against brute force, and what a filter may not say."""

import itertools
import threading
from functools import partial
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_svc.build import Options, build_collection
from retriever_svc.changes import Delete, Upsert
from retriever_svc.collection import Collection
from retriever_svc.expressions import for_lance
from retriever_svc.metadata import from_json
from retriever_svc.passages import matching_rows
from retriever_svc.ranking import inner_products
from retriever_svc.rebuild import rebuild
from shared.documents import passage_of
from shared.errors import InvalidRequest
from tests.filters_data import (
    METADATA,
    Condition,
    Row,
    both,
    conditions,
    either,
    metadata_columns,
    negated,
    random_metadata,
)
from tests.retriever_data import passage_table, random_embeddings, source_of, text, title

D = 8
KINDS = ["flat", "flat-fp16", "hnsw", "ivf-flat"]  # ivf-pq takes seconds to train


def table_with_metadata(n: int, seed: int) -> pa.Table:
    table = passage_table(random_embeddings(n, D, seed=seed))
    for name, column in metadata_columns(random_metadata(n, seed)).items():
        table = table.append_column(name, column)
    return table


def upsert(ids: np.ndarray, seed: int) -> tuple[Upsert, list[Row]]:
    rows = random_metadata(len(ids), seed)
    words = [(title(i), text(i)) for i in ids.tolist()]
    change = Upsert(
        ids.astype(np.int64),
        [one[0] for one in words],
        [one[1] for one in words],
        random_embeddings(len(ids), D, seed=seed),
        from_json(rows, METADATA),
    )
    return change, rows


def _within(within: tuple[int, ...], negative: bool, row: Row) -> bool | None:
    return None if row["year"] is None else (row["year"] in within) is not negative


class Model:
    """What the collection holds, by id."""

    def __init__(self, n: int, seed: int) -> None:
        self.rows: dict[int, Row] = {}
        self.embeddings: dict[int, np.ndarray] = {}
        self.put(np.arange(n), random_metadata(n, seed), random_embeddings(n, D, seed=seed))

    def put(self, ids: np.ndarray, rows: list[Row], embeddings: np.ndarray) -> None:
        for i, row, embedding in zip(ids.tolist(), rows, embeddings, strict=True):
            self.rows[i] = {**row, "id": i, "title": title(i), "text": text(i)}
            self.embeddings[i] = embedding

    def delete(self, ids: np.ndarray) -> None:
        for i in ids.tolist():
            self.rows.pop(i, None)
            self.embeddings.pop(i, None)

    def matching(self, condition: Condition) -> np.ndarray:
        return np.array(sorted(i for i, row in self.rows.items() if condition.holds(row) is True), np.int64)

    def best(self, condition: Condition, query_D: np.ndarray, n_docs: int) -> list[int]:
        ids = self.matching(condition)
        scores = inner_products(query_D, np.array([self.embeddings[i] for i in ids.tolist()]).reshape(-1, D))
        best: list[int] = ids[np.lexsort((ids, -scores))][:n_docs].tolist()
        return best


def check(collection: Collection, model: Model, condition: Condition, n_docs: int, seed: int) -> None:
    queries_BD = random_embeddings(2, D, seed=seed)
    selection = collection.filters.select(condition.sql)
    matching = set(model.matching(condition).tolist())
    found = collection.search(queries_BD, [n_docs] * 2, None, selection)
    for query_D, ranked in zip(queries_BD, found, strict=True):
        assert set(ranked.ids.tolist()) <= matching
        assert len(ranked.ids) == min(n_docs, len(matching))
        if collection.manifest.kind == "flat":
            assert ranked.ids.tolist() == model.best(condition, query_D, n_docs)
        if len(ranked.rows):
            passages = map(passage_of, collection.take(ranked.rows).to_pylist())
            for passage, i in zip(passages, ranked.ids.tolist(), strict=True):
                stored = {**(passage.metadata or {}), "id": i, "title": title(i), "text": text(i)}
                assert stored == model.rows[i]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(
    n=st.integers(1, 900),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 60), conditions()), max_size=4),
    first=conditions(),
    n_docs=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_filter_selects_what_brute_force_selects_whatever_was_written(
    *,
    kind: str,
    n: int,
    steps: list[tuple[bool, int, Condition]],
    first: Condition,
    n_docs: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """``first`` is asked again after each step: what was kept of it grows with what is written."""
    folder = tmp_path_factory.mktemp("data") / "c"
    build_collection(folder, source_of(table_with_metadata(n, seed)), options=Options(kind=kind))
    collection, model = Collection.open(folder, device="cpu"), Model(n, seed)
    check(collection, model, first, n_docs, seed)
    dice = np.random.default_rng(seed)
    for number, (is_upsert, size, condition) in enumerate(steps, start=1):
        ids = dice.choice(n + 200, min(size, n), replace=False)
        if is_upsert:
            change, rows = upsert(ids, seed + number)
            collection.apply(number, change)
            model.put(ids, rows, change.embeddings)
        else:
            collection.apply(number, Delete(ids.astype(np.int64)))
            model.delete(ids)
        check(collection, model, condition, n_docs, seed + number)
        check(collection, model, first, n_docs, seed + number)


def test_metadata_survives_the_log_and_a_rebuild(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    build_collection(folder, source_of(table_with_metadata(50, 1)))
    collection, model = Collection.open(folder, device="cpu"), Model(50, 1)
    change, rows = upsert(np.arange(40, 70), 2)
    log = collection.open_log()
    log.append([change, Delete(np.array([0, 45], np.int64))])
    log.close()
    model.put(change.ids, rows, change.embeddings)
    model.delete(np.array([0, 45]))
    anything = Condition("true", lambda _: True)
    reopened = Collection.open(folder, device="cpu")
    check(reopened, model, anything, 100, 3)
    rebuilt = Collection.open(folder, generation=rebuild(folder, reopened.generation, 2), device="cpu")
    assert rebuilt.generation != reopened.generation
    assert rebuilt.delta.size == 0
    check(rebuilt, model, anything, 100, 3)
    assert rebuilt.info.metadata == {
        "year": "integer",
        "lang": "string",
        "Score": "float",
        "ok": "boolean",
        "day": "date",
        "read at": "timestamp",
    }


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    folder = tmp_path_factory.mktemp("data") / "c"
    build_collection(folder, source_of(table_with_metadata(20, 1)))
    return Collection.open(folder, device="cpu")


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "  ",
        "year =",
        "yeer = 1",
        "embedding is null",
        "_rowid > 3",
        "year",
        "year + 1",
        "year = 'x'",
        "lang = 3",
        "year = 1.5",
        "day > '2020-01-01'",
        "day = date 'x'",
        "ok and year",
        "\"lang\" = 'en'",
        "lang = e'x'",
        "lang = 'x",
        "`lang = 'x'",
        "`nope` = 1",
        "lang like 3",
        "lang like 'a!%' escape '!'",
        "(select 1) = 1",
        "id in (select id from t)",
        "exists(select 1)",
        "year = 1; drop table t",
        "year = 1 -- and more",
        "year /* */ = 1",
        "year / 0 = 1",
        "repeat(text, 1000000000) = 'x'",
        "random() > 0.5",
        "now() > `read at`",
        "current_date > day",
        "cast(lang as int) = 3",
        "date_part('nope', day) = 3",
        "lower(year) = 'x'",
        "lower() = 'x'",
        "lang || lang = 'x'",
        "year = $1",
        "year = ?",
        "t.year = 1",
        "(year = 1",
        "year = 1)",
        "lang = 'a\x00b'",
        "case when ok then ok else ok end",
        "year in ()",
    ],
)
def test_what_is_no_condition_is_refused_with_the_columns_there_are(collection: Collection, expression: str) -> None:
    with pytest.raises(InvalidRequest, match="filter: ") as refused:
        collection.filters.select(expression)
    assert refused.value.param == "filter"
    assert "the columns are id, title, text, year, lang, Score, ok, day, read at" in refused.value.message
    assert "/home/" not in refused.value.message
    assert collection.filters.kept(expression) is None


LISTS = [
    Condition(f"{left} {'not ' * negative}in ({', '.join(map(str, within))})", partial(_within, within, bool(negative)))
    for left in ("year", "year + 0")
    for within in ((1990, 1991), (1991, 1992), (1993,), (1990, 1991, 1992, 1993, 1994))
    for negative in (0, 1)
]


@pytest.mark.parametrize("first", LISTS, ids=lambda condition: condition.sql)
def test_null_is_in_no_list_and_out_of_none(first: Condition) -> None:
    """Lance's planner merges two lists, and what both let through it lets through for null as well."""
    rows = [{"year": None}, *({"year": year} for year in range(1990, 1996))]
    table = pa.table({"year": [row["year"] for row in rows]}, schema=pa.schema([("year", pa.int64())]))
    data = lance.write_dataset(table, "memory://years")
    for second, negate_first, negate_second in itertools.product(LISTS, (False, True), (False, True)):
        joined = [
            join(negated(first) if negate_first else first, negated(second) if negate_second else second)
            for join in (both, either)
        ]
        for condition in [*joined, *map(negated, joined)]:
            found = matching_rows(data, for_lance(condition.sql, ["year"]), len(rows))
            assert found.tolist() == [condition.holds(row) is True for row in rows], condition.sql


@pytest.mark.parametrize(
    ("expression", "lists"),
    [
        ("year between 1 and 2 and year in (3) or ok in (true)", 2),
        ("not ((year in (1)) = ok) or lower(lang) in ('a', 'in (1')", 2),
        ("ok in (year in (1), not ok in (false))", 3),
        ("`read at` in (timestamp '2020-01-01') and year - -1 not in (-1, 2 * (1 + 1))", 2),
        ("coalesce(year in (1), ok) and (year in (1)) is null", 2),
    ],
)
def test_lists_stand_apart_and_mean_what_they_meant(collection: Collection, expression: str, lists: int) -> None:
    given_to_lance = for_lance(expression, collection.filters.columns)
    assert given_to_lance.count(", NULL)") == lists
    directly = collection.passages.matching(expression)  # no two of these lists could be merged
    assert collection.passages.matching(given_to_lance).tolist() == directly.tolist()


@pytest.mark.parametrize(
    "expression", ["year in (1) in (true) or ok", "year between 1 and 2 in (true) or ok in (true)"]
)
def test_a_list_after_another_comparison_is_refused_where_lists_must_stand_apart(expression: str) -> None:
    with pytest.raises(InvalidRequest, match="a list follows another comparison"):
        for_lance(expression, ["year", "ok"])


@pytest.mark.parametrize(
    "expression",
    [
        "1+" * 990 + "year > 3",  # ends the process where Lance gets it
        "- " * 990 + "year > 3",
        "not " * 500 + "ok",
        "not(" * 300 + "ok" + ")" * 300,
        "(" * 990 + "ok" + ")" * 990,
        "ok=" * 600 + "ok",
        "coalesce(" * 16 + "lang" + ",'')" * 16 + "='x'",
        "lower(" * 40 + "lang" + ")" * 40 + "='x'",
        "ok is not null " * 50,
        "ok and " * 500 + "ok",
        "year = 1 or " * 400 + "ok",
    ],
)
def test_what_nests_or_chains_without_end_is_refused(expression: str) -> None:
    with pytest.raises(InvalidRequest, match="filter: "):
        for_lance(expression, ["year", "lang", "ok"])


@pytest.mark.parametrize(
    "expression",
    [
        "year=1 or " * 190 + "ok",
        "ok and " * 190 + "ok",
        "year in (" + "1," * 1900 + "1)",
        "not (" * 12 + "ok" + ")" * 12,
        "1+" * 15 + "year > 3",
        "coalesce(lower(upper(lang)), 'x') = 'x'",
        " or ".join(f"(year>{i} and id<{i})" for i in range(90)),
        " and ".join(f"(year={i} or ok=(id={i}))" for i in range(90)),
        "lang like '" + "%_" * 1900 + "'",
        " and ".join(["(ok or (not ok or (year = 1 and id = 2)))"] * 40),
        " or ".join(["coalesce(coalesce(coalesce(lang,'a'),'b'),'c')='x'"] * 60),
        " or ".join(["ok=(ok=(ok=(ok=(ok=(ok=(ok=(ok=(ok=ok))))))))"] * 60),
        " or ".join(["ok in (ok in (ok in (ok in (ok in (ok in (ok in (ok)))))))"] * 60),
        " or ".join(["year in (1,2)"] * 200),
    ],
    ids=range(14),
)
def test_the_longest_that_is_taken_is_evaluated_in_a_while(collection: Collection, expression: str) -> None:
    found: list[Any] = []

    def select() -> None:
        try:
            found.append(collection.filters.select(expression))
        except InvalidRequest as error:
            found.append(error)

    thread = threading.Thread(target=select, daemon=True)  # in a thread, as in the service: its stack is smaller
    thread.start()
    thread.join(timeout=20)
    assert found


def test_only_the_conditions_last_used_are_kept(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    filters = collection.filters
    monkeypatch.setattr(filters, "_most", 2)
    one = filters.select("year = 1990")
    filters.select("year = 1991")
    assert filters.select("year = 1990") is one
    filters.select("year = 1992")
    assert filters.kept("year = 1990") is one
    assert filters.kept("year = 1991") is None
