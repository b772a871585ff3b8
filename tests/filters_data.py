"""Passages with metadata, and conditions on them: as SQL, and as a function of a row that says what SQL means by it.

A condition is true, false or (by null) unknown, None here; it selects the rows where it is true.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

METADATA = pa.schema(
    [
        ("year", pa.int64()),
        ("lang", pa.string()),
        ("Score", pa.float64()),
        ("ok", pa.bool_()),
        ("day", pa.date32()),
        ("read at", pa.timestamp("us")),
    ]
)
LANGUAGES = ["en", "de", "it's", "", "EN", "日本語", "a%b"]
FIRST_DAY = date(2020, 1, 1)
FIRST_TIME = datetime(2020, 1, 1, tzinfo=UTC)

Row = dict[str, Any]


def random_metadata(n: int, seed: int) -> list[Row]:
    """As JSON has it, a sixth of it null."""
    dice = np.random.default_rng(seed)
    rows = [
        {
            "year": int(dice.integers(1990, 2000)),
            "lang": str(dice.choice(LANGUAGES)),
            "Score": float(dice.integers(-4, 5)) / 4,
            "ok": bool(dice.integers(2)),
            "day": (FIRST_DAY + timedelta(days=int(dice.integers(9)))).isoformat(),
            "read at": _said(FIRST_TIME + timedelta(hours=int(dice.integers(9)))),
        }
        for _ in range(n)
    ]
    return [{name: None if dice.random() < 1 / 6 else value for name, value in row.items()} for row in rows]


def metadata_columns(rows: list[Row]) -> dict[str, pa.Array]:
    """As a source has it."""
    days = [None if row["day"] is None else date.fromisoformat(row["day"]) for row in rows]
    times = [None if row["read at"] is None else datetime.fromisoformat(row["read at"]) for row in rows]
    read = {"day": pa.array(days, pa.date32()), "read at": pa.array(times, pa.timestamp("us", "UTC"))}
    return {
        name: read[name] if name in read else pa.array([row[name] for row in rows], METADATA.field(name).type)
        for name in METADATA.names
    }


def _said(time: datetime) -> str:
    return time.replace(tzinfo=None).isoformat() + "Z"


@dataclass(frozen=True)
class Condition:
    sql: str
    holds: Callable[[Row], bool | None]

    def __repr__(self) -> str:
        return self.sql


def _unless_null(column: str, test: Callable[[Any], bool]) -> Callable[[Row], bool | None]:
    return lambda row: None if row[column] is None else test(row[column])


COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def text_literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@st.composite
def _comparisons(draw: st.DrawFn) -> Condition:
    sign = draw(st.sampled_from(list(COMPARE)))
    column, sql, value = draw(
        st.one_of(
            st.integers(1988, 2001).map(lambda n: ("year", str(n), n)),
            st.sampled_from(LANGUAGES).map(lambda text: ("lang", text_literal(text), text)),
            st.integers(-5, 5).map(lambda n: ("Score", str(n / 4), n / 4)),
            st.integers(-1, 9).map(
                lambda n: ("day", f"date '{FIRST_DAY + timedelta(n)}'", (FIRST_DAY + timedelta(n)).isoformat())
            ),
            st.integers(-1, 9).map(
                lambda n: (
                    "read at",
                    f"timestamp '{_said(FIRST_TIME + timedelta(hours=n))}'",
                    _said(FIRST_TIME + timedelta(hours=n)),
                )
            ),
            st.integers(0, 400).map(lambda n: ("id", str(n), n)),
        )
    )
    name = f"`{column}`" if " " in column else column
    return Condition(f"{name} {sign} {sql}", _unless_null(column, lambda found: COMPARE[sign](found, value)))


@st.composite
def _others(draw: st.DrawFn) -> Condition:
    a, b = draw(st.integers(1990, 1999)), draw(st.integers(1990, 1999))
    lang = draw(st.sampled_from(LANGUAGES))
    languages = draw(st.lists(st.sampled_from(LANGUAGES), min_size=1, max_size=3))
    column = draw(st.sampled_from(METADATA.names))
    within = ", ".join(text_literal(one) for one in languages)
    return draw(
        st.sampled_from(
            [
                Condition("ok", lambda row: row["ok"]),
                Condition(f"`{column}` IS NULL", lambda row: row[column] is None),
                Condition(f"`{column}` is not null", lambda row: row[column] is not None),
                Condition(f"year BETWEEN {a} AND {b}", _unless_null("year", lambda n: a <= n <= b)),
                Condition(f"year in ({a}, {b})", _unless_null("year", lambda n: n in (a, b))),
                Condition(f"year not in ({a}, {b})", _unless_null("year", lambda n: n not in (a, b))),
                Condition(f"lang in ({within})", _unless_null("lang", lambda found: found in languages)),
                Condition("lang LIKE 'e%'", _unless_null("lang", lambda found: found.startswith("e"))),
                Condition("lang ilike 'E%'", _unless_null("lang", lambda found: found.lower().startswith("e"))),
                Condition(
                    f"lower(lang) = lower({text_literal(lang)})",
                    _unless_null("lang", lambda found: found.lower() == lang.lower()),
                ),
                Condition(f"year - {a} > 2", _unless_null("year", lambda n: n - a > 2)),
                Condition("contains(text, '1')", lambda row: "1" in row["text"]),
                Condition("title = 'Title 3'", lambda row: row["title"] == "Title 3"),
            ]
        )
    )


def both(a: Condition, b: Condition) -> Condition:
    def holds(row: Row) -> bool | None:
        held = (a.holds(row), b.holds(row))
        return False if False in held else None if None in held else True

    return Condition(f"({a.sql} AND {b.sql})", holds)


def either(a: Condition, b: Condition) -> Condition:
    def holds(row: Row) -> bool | None:
        held = (a.holds(row), b.holds(row))
        return True if True in held else None if None in held else False

    return Condition(f"({a.sql} or {b.sql})", holds)


def negated(a: Condition) -> Condition:
    return Condition(f"NOT ({a.sql})", lambda row: None if (held := a.holds(row)) is None else not held)


def conditions() -> st.SearchStrategy[Condition]:
    return st.recursive(
        st.one_of(_comparisons(), _others()),
        lambda inner: st.one_of(
            st.builds(both, inner, inner), st.builds(either, inner, inner), st.builds(negated, inner)
        ),
        max_leaves=5,
    )
