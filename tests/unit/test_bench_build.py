"""The table in docs/index.md is that of the committed result, and what it says of a deviation is arithmetic."""

import json

import pytest

from benchmarks.build_data import queries, write_corpus
from benchmarks.build_tables import BEGINS, DOCS, ENDS, RESULT, deviations, renewed, worst
from retriever_svc.source import from_parquet

CELL = {
    "kind": "flat",
    "count": 1000,
    "build_s": 2.0,
    "ram_bytes": 100,
    "disk_bytes": 50,
    "p50_ms": 1.0,
    "p99_ms": 2.0,
    "recall": 1.0,
    "planned": {"build_s": 3.0, "ram": 110, "disk": 50, "query_s": 0.0008},
}


def test_the_page_shows_the_result() -> None:
    page = DOCS.read_text(encoding="utf-8")
    assert page.index(BEGINS) < page.index(ENDS)
    if RESULT.exists():
        assert renewed(page, json.loads(RESULT.read_bytes())) == page


def test_only_what_is_between_the_marks_is_renewed() -> None:
    page = renewed(f"before\n{BEGINS}old\n{ENDS}after\n", {"cells": [CELL]})
    assert page.startswith(f"before\n{BEGINS}| kind")
    assert page.endswith(f"{ENDS}after\n")
    assert "old" not in page
    assert "| `flat` | 1,000 | 2 s |" in page


def test_a_deviation_is_of_what_was_measured() -> None:
    found = deviations(CELL)
    assert found == pytest.approx({"RAM": 0.1, "disk": 0.0, "build": 0.5, "query": -0.2})
    assert worst({"cells": [{**CELL, "deviation": found}]}) == "3 of 4; not flat 1,000 build +50%"


def test_a_corpus_is_the_same_each_time_and_what_a_build_takes(tmp_path) -> None:  # noqa: ANN001
    for name in ("a", "b"):
        write_corpus(tmp_path / f"{name}.parquet", 300, 16)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    batches = list(from_parquet(tmp_path / "a.parquet").clean_batches())
    assert sum(len(batch) for batch in batches) == 300
    assert 400 < len(batches[0]["text"][0].as_py()) < 800
    assert queries(300, 16, 7).shape == (7, 16)
