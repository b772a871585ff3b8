"""Passages in JSONL: an object a line with the keys ``title``, ``text``, and ``id`` where there are ids."""

import json
from collections.abc import Iterator
from pathlib import Path

from retriever_svc.formats.lines import read_lines
from retriever_svc.formats.passages import Row, parse_id, refusal


def read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a JSONL file; blank lines are passed over.

    Raises: InvalidRequest: names line and key.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise refusal(path, f"line {number} is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise refusal(path, f"line {number} holds a {type(value).__name__}, not an object with title and text")
        title, text = (_string(path, number, value, key) for key in ("title", "text"))
        yield f"line {number}", (parse_id(path, f"line {number}", value["id"]) if "id" in value else None, title, text)


def _string(path: Path, number: int, row: dict[str, object], key: str) -> str:
    if key not in row:
        raise refusal(path, f"line {number} has no key `{key}`; it has {str(list(row))[:200]}", key)
    value = row[key]
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}, not a string"
        raise refusal(path, f"`{key}` is {kind} in line {number}", key)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # an escape such as \ud800, which stands for half a character
        raise refusal(path, f"`{key}` has a lone surrogate in line {number}", key) from error
    return value
