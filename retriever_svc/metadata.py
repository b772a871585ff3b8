"""Metadata of passages: the columns of a collection beside id, title, text and embedding, for filters to tell by.

Six types, whatever width a source has them in; every value may be null. On the wire dates are ``2026-01-31`` and
timestamps, which are UTC, ``2026-01-31T12:00:00Z``. A float that is not a number is null, as dataframes mean it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import structlog

from shared.errors import InvalidRequest
from shared.schemas import INT64_MAX, MetadataType, MetadataValue

PASSAGE_COLUMNS = ("id", "title", "text", "embedding")
NO_METADATA = pa.schema([])
MOST_COLUMNS = 64
# What Lance reads as one name between backticks.
NAME = re.compile(r"[^`.\"'\\\x00-\x1f]{1,64}")

ARROW_TYPES: dict[MetadataType, pa.DataType] = {
    "string": pa.string(),
    "integer": pa.int64(),
    "float": pa.float64(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
}
_IS: dict[MetadataType, Callable[[pa.DataType], bool]] = {
    "string": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind),
    "integer": pa.types.is_integer,
    "float": pa.types.is_floating,
    "boolean": pa.types.is_boolean,
    "date": pa.types.is_date,
    "timestamp": pa.types.is_timestamp,
}
# Python, and with it JSON's writers, know the years 1 to 9999.
_LIMITS = {
    "date": (pa.scalar(date.min), pa.scalar(date.max)),
    "timestamp": (pa.scalar(datetime.min, pa.timestamp("us")), pa.scalar(datetime.max, pa.timestamp("us"))),
}
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_INTEGER = re.compile(r"[+-]?[0-9]{1,40}")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")

log = structlog.get_logger(__name__)


def type_of(kind: pa.DataType) -> MetadataType | None:
    """None for what cannot be metadata: lists, structs, bytes, decimals."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return next((name for name in get_args(MetadataType) if _IS[name](kind)), None)


def metadata_schema(schema: pa.Schema) -> pa.Schema:
    """The metadata columns of a source or a table, in the types in which they are stored.

    A column of another type, or whose name begins with ``_``, is left out.

    Raises: InvalidRequest: names that cannot be told apart or written in a filter, or too many.
    """
    extra = [field for field in schema if field.name not in PASSAGE_COLUMNS]
    kinds = [(field.name, None if field.name.startswith("_") else type_of(field.type)) for field in extra]
    fields = [pa.field(name, ARROW_TYPES[kind]) for name, kind in kinds if kind is not None]
    if left_out := [name for name, kind in kinds if kind is None]:
        log.info("columns_left_out", columns=left_out)
    if len(fields) > MOST_COLUMNS:
        raise InvalidRequest(f"{len(fields)} metadata columns, at most {MOST_COLUMNS} are taken", param=fields[-1].name)
    seen = set(PASSAGE_COLUMNS)
    for field in fields:
        if NAME.fullmatch(field.name) is None:
            raise InvalidRequest(f"{field.name!r} cannot be named in a filter; rename the column", param=field.name)
        if field.name.lower() in seen:  # filters do not care for upper and lower case
            raise InvalidRequest(f"{field.name!r} is there twice, but for upper and lower case", param=field.name)
        seen.add(field.name.lower())
    return pa.schema(fields)


def schema_of(types: Mapping[str, MetadataType]) -> pa.Schema:
    """Metadata columns of these types.

    Raises: InvalidRequest: as :func:`metadata_schema`, or a name is a passage's own field or begins with ``_``.
    """
    schema = metadata_schema(pa.schema([(name, ARROW_TYPES[kind]) for name, kind in types.items()]))
    for name in types:
        if name not in schema.names:
            raise InvalidRequest(f"{name!r} is a passage's own field, or begins with `_`", param=name)
    return schema


def of_table(schema: pa.Schema, wanted: pa.Schema | None, *, all_there: bool = True) -> pa.Schema:
    """The metadata columns of a table: those `wanted`, in their types, or all that can be.

    Raises: InvalidRequest: as :func:`metadata_schema`, or one that is wanted is not there, or of another type.
    """
    if wanted is None:
        try:
            return metadata_schema(schema)
        except InvalidRequest as error:
            reason = f"{error.message}; or name the columns to keep, `--metadata year=integer`"
            raise InvalidRequest(reason, param=error.param) from None
    kept = wanted if all_there else pa.schema([field for field in wanted if field.name in schema.names])
    for field in kept:
        if schema.names.count(field.name) != 1:
            raise InvalidRequest(f"there is no one column {field.name!r}; there are {schema.names}", param=field.name)
        _check_type(field, schema.field(field.name).type)
    return kept


def types_of(schema: pa.Schema) -> dict[str, MetadataType]:
    """Type by column."""
    return {field.name: kind for field in schema if (kind := type_of(field.type)) is not None}


def clean_column(column: pa.Array, wanted: pa.DataType, name: str) -> pa.Array:
    """An Arrow column in its stored type.

    Raises: InvalidRequest: a value does not fit.
    """
    try:
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_timestamp(column.type):  # whatever its zone, Arrow stores UTC
            column = column.cast(pa.timestamp("us", column.type.tz)).cast(pa.int64())
        clean = column.cast(wanted)
    except pa.ArrowException as error:
        raise InvalidRequest(f"`{name}` cannot be read as {wanted}: {error}", param=name) from error
    if wanted == ARROW_TYPES["float"]:
        clean = pc.if_else(pc.is_nan(clean), None, clean)
        if pc.any(pc.is_inf(clean)).as_py():
            raise InvalidRequest(f"`{name}` holds infinity, which JSON cannot say", param=name)
    for kind in ("date", "timestamp"):
        if wanted == ARROW_TYPES[kind]:
            least, largest = _LIMITS[kind]
            outside = pc.or_(pc.less(clean, least), pc.greater(clean, largest))
            if pc.any(outside).as_py():
                raise InvalidRequest(f"`{name}` goes beyond the years 1 to 9999", param=name)
    return clean


def from_arrow(table: pa.Table, schema: pa.Schema) -> pa.RecordBatch | None:
    """The metadata columns of passages that were sent as Arrow; missing ones are null.

    Raises: InvalidRequest: a column has another type than the collection's.
    """
    columns = []
    for field in schema:
        if field.name not in table.schema.names:
            columns.append(pa.nulls(len(table), field.type))
            continue
        column = table[field.name].combine_chunks()
        _check_type(field, column.type)
        columns.append(clean_column(column, field.type, field.name))
    return pa.record_batch(columns, schema=schema) if columns else None


def _check_type(field: pa.Field, found: pa.DataType) -> None:
    kind, wanted = type_of(found), type_of(field.type)
    if kind != wanted and not pa.types.is_null(found) and (kind, wanted) != ("integer", "float"):
        raise InvalidRequest(f"{field.name}: expected {wanted}, got {found}", param=field.name)


def from_json(rows: Sequence[dict[str, Any] | None], schema: pa.Schema) -> pa.RecordBatch | None:
    """The metadata of passages that were sent as JSON; missing values are null.

    Raises: InvalidRequest: a column that the collection does not have, or a value of another type.
    """
    types = types_of(schema)
    for i, row in enumerate(rows):
        for name, value in (row or {}).items():
            where = f"passages.{i}.metadata.{name}"
            if name not in types:
                there = ", ".join(f"{known} ({kind})" for known, kind in types.items()) or "none"
                raise InvalidRequest(f"{where}: the collection has no such column; there are: {there}", param=where)
            if not _fits(value, types[name]):
                raise InvalidRequest(f"{where}: expected {EXPECTED[types[name]]} or null", param=where)
    if not types:
        return None
    columns = [
        pa.array([stored((row or {}).get(field.name), types[field.name]) for row in rows], field.type)
        for field in schema
    ]
    return pa.record_batch(columns, schema=schema)


EXPECTED: dict[MetadataType, str] = {
    "string": "a string",
    "integer": "a 64-bit integer",
    "float": "a finite number",
    "boolean": "true or false",
    "date": "a date such as 2026-01-31",
    "timestamp": "a time such as 2026-01-31T12:00:00Z",
}


def _fits(value: object, kind: MetadataType) -> bool:
    try:
        stored(value, kind)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def of_cell(text: str | None, kind: MetadataType) -> Any:
    """What a cell of a text file says; an empty one, or none, is null.

    Raises: TypeError, ValueError, OverflowError.
    """
    match kind:
        case _ if not text:
            return None
        case "integer" if _INTEGER.fullmatch(text):
            return stored(int(text), kind)
        case "float" if _FLOAT.fullmatch(text):
            return stored(float(text), kind)
        case "float" if text.lower() == "nan":
            return None
        case "boolean" if text.lower() in {"true", "false"}:
            return text.lower() == "true"
        case "integer" | "float" | "boolean":
            raise ValueError(kind)
    return stored(text, kind)


def stored(value: Any, kind: MetadataType) -> Any:
    """What a value of JSON is stored as. Raises: TypeError, ValueError, OverflowError."""
    if value is None:
        return None
    if isinstance(value, bool) != (kind == "boolean") or isinstance(value, str) != (
        kind in {"string", "date", "timestamp"}
    ):
        raise TypeError(kind)
    match kind:
        case "integer":
            whole = int(value)
            if whole != value or not -INT64_MAX - 1 <= whole <= INT64_MAX:
                raise ValueError(kind)
            return whole
        case "float":
            number = float(value)
            if not np.isfinite(number):
                raise ValueError(kind)
            return number
        case "date":
            if _DATE.fullmatch(value) is None:
                raise ValueError(kind)
            return date.fromisoformat(value)
        case "timestamp":
            time = datetime.fromisoformat(value)
            return time if time.tzinfo is None else time.astimezone(UTC).replace(tzinfo=None)
    if not isinstance(value, bool | str):
        raise TypeError(kind)
    if isinstance(value, str):
        value.encode()  # lone surrogates are no text
    return value


def to_wire(batch: pa.RecordBatch | pa.Table | None, rows: int) -> list[dict[str, MetadataValue] | None]:
    """The metadata of each row as responses have it; None where there are no such columns."""
    if batch is None or not batch.num_columns:
        return [None] * rows
    columns = [_said(batch.column(i).to_pylist(), batch.schema.field(i).type) for i in range(batch.num_columns)]
    names = batch.schema.names
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _said(values: list[Any], kind: pa.DataType) -> list[MetadataValue]:
    if kind == ARROW_TYPES["date"]:
        return [None if value is None else value.isoformat() for value in values]
    if kind == ARROW_TYPES["timestamp"]:
        return [None if value is None else f"{value.isoformat()}Z" for value in values]
    return values
