"""Passages in JSONL: an object a line with the keys ``title``, ``text``, ``id`` where there are ids, and metadata."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from retriever_svc.formats.lines import read_lines
from retriever_svc.formats.passages import Row, metadata_of_row, parse_id, refusal
from retriever_svc.metadata import stored, types_of


def read_jsonl(path: Path, metadata: pa.Schema, all_there: bool) -> Iterator[tuple[str, Row]]:
    """Rows of a JSONL file, with null where a line has no value for a column; blank lines are passed over.

    Raises: InvalidRequest: names line and key; with `all_there`, no line has the key of a column.
    """
    types = types_of(metadata)
    unmet = set(types) if all_there else set()
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
        passage_id = parse_id(path, f"line {number}", value["id"]) if "id" in value else None
        unmet -= value.keys()
        kept = metadata_of_row(path, f"line {number}", value, types, stored)
        yield f"line {number}", Row(passage_id, title, text, kept)
    if unmet:
        raise refusal(path, f"no line has the key `{min(unmet)}`", min(unmet))


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
