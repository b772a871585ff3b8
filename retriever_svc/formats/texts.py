"""Passages without embeddings, in whatever form they come, told by the name of the file or of those in a folder."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from retriever_svc.formats.arrow_files import ShardedTable, open_shards, passage_batches, passage_columns, shards_of
from retriever_svc.formats.delimited import read_csv, read_tsv
from retriever_svc.formats.jsonl import read_jsonl
from retriever_svc.formats.passages import Passages, Rereadable, Row, batches_of_rows, refusal
from retriever_svc.formats.saved_dataset import is_saved_dataset, open_saved_dataset
from retriever_svc.metadata import NO_METADATA, of_table

ReadRows = Callable[[Path, pa.Schema, bool], Iterator[tuple[str, Row]]]
TEXT_FORMATS: dict[str, ReadRows] = {
    ".tsv": read_tsv,
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
}
TAKEN = (
    "taken are .tsv (DPR's psgs_w100.tsv), .csv and .jsonl, each also gzipped, .parquet, .arrow, a folder of Parquet "
    "or Arrow files, and a folder saved by `datasets`' save_to_disk"
)


def read_passages(path: Path, metadata: pa.Schema | None = None, *, all_there: bool = True) -> Passages:
    """The passages of a file or folder; ids are the row numbers where it has none.

    The batches can be read more than once, and are checked while they are read. Memory: one batch, and 8 bytes a row
    for the check that no id stands twice.

    Args:
        metadata: the columns that are kept beside; None: of a table all that can be, of text files, which say no types,
            none.
        all_there: whether the file must have all of ``metadata``; those that it has not are null, or not there.

    Raises: InvalidRequest: the form is not known, or the file is not of it; when reading, names file, line or row, and
        column.
    """
    if path.is_dir():
        return _of_table(*_open_folder(path), metadata, all_there)
    if not path.is_file():
        raise refusal(path, "there is no such file or folder")
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix.lower() in TEXT_FORMATS:
        read = TEXT_FORMATS[suffix.lower()]
        kept = NO_METADATA if metadata is None else metadata
        batches = Rereadable(lambda: batches_of_rows(path, read(path, kept, all_there), kept))
        return Passages(batches, suffix.lower().removeprefix("."), metadata=kept)
    if path.suffix in (".parquet", ".arrow"):
        return _of_table(path.suffix.removeprefix("."), open_shards([path]), metadata, all_there)
    raise refusal(path, f"is of no form that is known; {TAKEN}")


def _open_folder(folder: Path) -> tuple[str, ShardedTable]:
    if is_saved_dataset(folder):
        return "datasets", open_saved_dataset(folder)
    shards = shards_of(folder)
    if not shards:
        raise refusal(folder, f"is a folder of no form that is known; {TAKEN}")
    return shards[0].suffix.removeprefix("."), open_shards(shards)


def _of_table(form: str, table: ShardedTable, metadata: pa.Schema | None, all_there: bool) -> Passages:
    passage_columns(table)
    kept = of_table(table.schema, metadata, all_there=all_there)
    return Passages(Rereadable(lambda: passage_batches(table, kept)), form, table.count, kept)
