"""Passages in TSV and CSV, read by the ``csv`` module as DPR reads its ``psgs_w100.tsv``.

The header names the columns: ``title``, ``text``, ``id`` where there are ids, and metadata; others are passed over.
DPR's file may lack its header, its columns are then id, text, title (DPR's ``CsvCtxSrc``).
"""

import csv
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from retriever_svc.formats.lines import LINE_LIMIT, read_lines
from retriever_svc.formats.passages import INTEGER, Row, metadata_of_row, parse_id, refusal
from retriever_svc.metadata import of_cell, types_of
from shared.schemas import MetadataType

DPR_COLUMNS = ["id", "text", "title"]
END = "end of the file"
"""A line put after the last: where it is no record of its own, a quote was never closed."""


def read_tsv(path: Path, metadata: pa.Schema, all_there: bool) -> Iterator[tuple[str, Row]]:
    """Rows of a TSV file. Line ends are read as Python's text mode does, which is how DPR opens the file.

    Raises: InvalidRequest: names line and column.
    """
    return _read(path, _translated(path), "\t", types_of(metadata), all_there)


def read_csv(path: Path, metadata: pa.Schema, all_there: bool) -> Iterator[tuple[str, Row]]:
    """Rows of a CSV file; a quoted field keeps its line ends.

    Raises: InvalidRequest: names line and column.
    """
    return _read(path, (line for _, line in read_lines(path)), ",", types_of(metadata), all_there)


def _translated(path: Path) -> Iterator[str]:
    for _, line in read_lines(path):
        if "\r" not in line:
            yield line
            continue
        parts = line.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        yield from (f"{part}\n" for part in parts[:-1])


def _read(
    path: Path, lines: Iterator[str], delimiter: str, types: dict[str, MetadataType], all_there: bool
) -> Iterator[tuple[str, Row]]:
    records = _records(path, lines, delimiter)
    line, header = next(records, (0, []))
    if not header:
        raise refusal(path, "is empty, where a header with title and text is expected")
    if delimiter == "\t" and len(header) == len(DPR_COLUMNS) and INTEGER.fullmatch(header[0]):
        columns = DPR_COLUMNS
        if types and all_there:
            raise refusal(path, "has no header that could name metadata", min(types))
        yield f"line {line}", _row(path, line, header, columns, types)
    else:
        columns = [name.strip() for name in header]
        for name in ("title", "text", *types):
            if columns.count(name) != 1 and (all_there or name not in types or name in columns):
                raise refusal(path, f"the header must name one column `{name}`; it has {str(columns)[:200]}", name)
        if columns.count("id") > 1:
            raise refusal(path, "the header names `id` more than once", "id")
    for line, record in records:
        yield f"line {line}", _row(path, line, record, columns, types)


def _row(path: Path, line: int, record: list[str], columns: list[str], types: dict[str, MetadataType]) -> Row:
    if len(record) != len(columns):
        missing = columns[len(record)] if len(record) < len(columns) else None
        says = f"line {line} has {len(record)} columns, expected are {len(columns)}: {', '.join(columns)}"
        raise refusal(path, says, missing)
    passage_id = parse_id(path, f"line {line}", record[columns.index("id")]) if "id" in columns else None
    row = dict(zip(columns, record, strict=True)) if types else {}
    kept = metadata_of_row(path, f"line {line}", row, types, of_cell)
    return Row(passage_id, record[columns.index("title")], record[columns.index("text")], kept)


def _records(path: Path, lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """``(line, fields)``, the line being the one where the record begins; blank lines are passed over."""

    at_end = False

    def with_end() -> Iterator[str]:
        nonlocal at_end
        yield from lines
        at_end = True
        yield END

    # The module's limit holds for the whole process. It is a limit on memory, which LINE_LIMIT keeps in its place.
    csv.field_size_limit(LINE_LIMIT)
    reader = csv.reader(with_end(), delimiter=delimiter)
    begins = 1
    try:
        for record in reader:
            if at_end:
                if begins < reader.line_num:
                    raise refusal(path, f"a quote in the record that begins in line {begins} is never closed")
            elif record:
                yield begins, record
            begins = reader.line_num + 1
    except csv.Error as error:
        raise refusal(path, f"the record that begins in line {begins} cannot be read: {error}") from error
