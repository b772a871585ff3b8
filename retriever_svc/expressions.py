"""What a filter may say. Lance evaluates it; here stands what Lance is given.

Its planner is not made for what strangers write: some expressions of 2000 characters end the process (a thousand
additions overflow its stack) or take it seconds (functions in functions, chains of comparisons), and its functions can
fill the memory. So: only columns of the collection, the words of a condition, and functions that make nothing larger
and are the same at any time; and a bound for whatever nests or chains.

And it merges lists: of ``year NOT IN (1, 2) OR year NOT IN (3, 4)`` it makes TRUE, and selects rows whose year is null.
So each list stands in a call that it does not look into.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from shared.errors import InvalidRequest
from shared.schemas import LONGEST_FILTER

PARAM = "filter"
FUNCTIONS = {
    "lower", "upper", "length", "char_length", "contains", "starts_with", "ends_with", "abs", "coalesce", "date_part",
}  # fmt: skip
KEYWORDS = {
    "and", "or", "not", "in", "is", "null", "like", "ilike", "between", "true", "false", "date", "timestamp",
}  # fmt: skip
MOST_NESTED = 12
MOST_FUNCTIONS_NESTED = 3
MOST_ARITHMETIC = 16
MOST_CONDITIONS = 200

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<string>'(?:[^']|'')*')
    | (?P<quoted>`[^`]*`)
    | (?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)
    | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<comparison><=|>=|<>|!=|==|=|<|>)
    | (?P<arithmetic>[+*-])
    | (?P<open>\()
    | (?P<close>\))
    | (?P<comma>,)
    )""",
    re.VERBOSE | re.ASCII,
)


class _Token(NamedTuple):
    kind: str
    text: str


def for_lance(expression: str, columns: Iterable[str]) -> str:
    """The expression as Lance is given it.

    Raises: InvalidRequest: Lance should not be asked it; param ``filter``, with the columns there are.
    """
    names = {name.lower(): name for name in columns}
    try:
        tokens = list(_tokens(expression))
        if not tokens:
            raise ValueError("it is empty")
        _check_names(tokens, names)
        _check_shape(tokens)
        has_lists = sum(token.text.lower() == "in" for token in tokens) > 1
        return _with_lists_apart(tokens) if has_lists else expression
    except ValueError as error:
        raise refused(str(error), names.values()) from None


def refused(why: str, columns: Iterable[str]) -> InvalidRequest:
    return InvalidRequest(f"filter: {why}; the columns are {', '.join(columns)}", param=PARAM)


def _tokens(expression: str) -> Iterator[_Token]:
    if len(expression) > LONGEST_FILTER:
        raise ValueError(f"{len(expression)} characters, at most {LONGEST_FILTER} are taken")
    if "\x00" in expression:
        raise ValueError("it holds a character 0")
    at, end, before = 0, len(expression.rstrip()), ""
    while at < end:
        found = _TOKEN.match(expression, at)
        if found is None:
            rest = expression[at:].lstrip()
            hint = ": strings stand in 'single quotes', names in `backticks`" if rest[0] in "\"'`" else ""
            raise ValueError(f"{rest[:20]!r} is not understood{hint}")
        kind = str(found.lastgroup)
        text = found[kind]
        adjacent = found.start(kind) == at
        # e'…', 1a, --: SQL reads these as one thing, another one than stands here.
        if adjacent and (before, kind) in {("word", "string"), ("number", "word"), ("arithmetic", "arithmetic")}:
            raise ValueError(f"a blank is missing before {text[:20]!r}")
        yield _Token(kind, text)
        at, before = found.end(), kind


def _check_names(tokens: list[_Token], names: dict[str, str]) -> None:
    """Raises: ValueError: an unknown column or function."""
    for i, (kind, text) in enumerate(tokens):
        if kind == "word":
            _check_word(text, names, called=i + 1 < len(tokens) and tokens[i + 1].kind == "open")
        elif kind == "quoted" and text[1:-1].lower() not in names:
            raise ValueError(f"there is no column {text}")


def _check_word(text: str, names: dict[str, str], *, called: bool) -> None:
    word = text.lower()
    if called and word not in {"and", "or", "not", "in", "between"}:
        if word not in FUNCTIONS:
            raise ValueError(f"there is no function `{text[:64]}`; there are {', '.join(sorted(FUNCTIONS))}")
    elif word not in KEYWORDS and word not in names:
        raise ValueError(f"there is no column `{text[:64]}`")


def _check_shape(tokens: list[_Token]) -> None:
    """Raises: ValueError: something nests or chains beyond its bound."""
    functions: list[bool] = []  # of each parenthesis that is open, whether it is a function's
    compared = [False]  # of each too, whether a comparison stands in the present condition
    nots, before = 0, ""
    for kind, text in tokens:
        word = text.lower() if kind == "word" else ""
        nots = nots + 1 if word == "not" else 0
        if kind == "open":
            functions.append(before in FUNCTIONS)
            compared.append(False)
        elif kind == "close":
            if not functions:
                raise ValueError("a parenthesis is closed that was not opened")
            functions.pop()
            compared.pop()
        elif word in {"and", "or"}:
            compared[-1] = False
        elif kind == "comparison" or word == "is":
            if compared[-1]:
                raise ValueError("comparisons follow each other; join them by AND")
            compared[-1] = True
        if max(len(functions), nots) > MOST_NESTED or sum(functions) > MOST_FUNCTIONS_NESTED:
            raise ValueError("it is nested too deeply")
        before = word
    if functions:
        raise ValueError("a parenthesis is not closed")
    if sum(token.kind == "arithmetic" for token in tokens) > MOST_ARITHMETIC:
        raise ValueError(f"more than {MOST_ARITHMETIC} sums and products")
    if sum(token.text.lower() in {"and", "or"} for token in tokens) > MOST_CONDITIONS:
        raise ValueError(f"more than {MOST_CONDITIONS} conditions")


@dataclass
class _Condition:
    """``begin``: its first word's place."""

    begin: int
    compared: bool = False
    between: bool = False
    """Whether an AND is to come that joins its bounds."""


def _with_lists_apart(tokens: list[_Token]) -> str:
    """Each ``x IN (…)`` as ``coalesce(x IN (…), NULL)``, which has the same value.

    Raises: ValueError: a list follows another comparison, so that x may be all of that.
    """
    said: list[str] = []
    present = [_Condition(0)]  # the one, and those around it: a level for each parenthesis that is open
    lists: list[int | None] = []  # of each such parenthesis: where its condition begins, if it is a list's
    before = ""
    for kind, text in tokens:
        word, here = text.lower() if kind == "word" else "", present[-1]
        said.append(text)
        if kind == "open":
            lists.append(here.begin if before == "in" else None)
            present.append(_Condition(len(said)))
        elif kind == "close":
            present.pop()
            if (begin := lists.pop()) is not None:
                said.insert(begin, "coalesce(")
                said.append(", NULL)")
        elif word == "and" and here.between:
            here.between = False
        elif kind == "comma" or word in {"and", "or"} or (word == "not" and here.begin == len(said) - 1):
            present[-1] = _Condition(len(said))
        elif kind == "comparison" or word in {"is", "in", "like", "ilike", "between"}:
            if word == "in" and here.compared:
                raise ValueError("a list follows another comparison; join them by AND, or put that in parentheses")
            here.compared, here.between = True, word == "between"
        before = word
    return " ".join(said)
