"""A folder that ``datasets.Dataset.save_to_disk`` wrote, read without ``datasets``.

state.json           the Arrow files by name, in order
dataset_info.json    the columns (the Arrow files carry their schema themselves)
data-*.arrow         Arrow streams
dataset_dict.json    instead of these, where the folder holds several splits as folders of their own
"""

import json
from pathlib import Path
from typing import Any

from retriever_svc.formats.arrow_files import ShardedTable, open_shards
from retriever_svc.formats.passages import refusal

STATE, SPLITS = "state.json", "dataset_dict.json"


def is_saved_dataset(path: Path) -> bool:
    return (path / STATE).is_file() or (path / SPLITS).is_file()


def open_saved_dataset(folder: Path) -> ShardedTable:
    """The rows of a saved data set; of a saved ``DatasetDict`` where it has one split only.

    Raises: InvalidRequest: the folder has several splits, is damaged, or was saved with an indices mapping.
    """
    if not (folder / STATE).is_file():
        folder = folder / _only_split(folder)
    state = _read_json(folder / STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise refusal(
            folder, "was saved with an indices mapping: call `flatten_indices()` in `datasets` and save it again"
        )
    files = state.get("_data_files")
    if not isinstance(files, list) or not files:
        raise refusal(folder / STATE, "names no data files under `_data_files`")
    return open_shards([_data_file(folder, file) for file in files])


def _only_split(folder: Path) -> str:
    splits = _read_json(folder / SPLITS).get("splits")
    if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
        raise refusal(folder / SPLITS, "names no splits")
    if len(splits) != 1:
        raise refusal(folder, f"holds the splits {', '.join(splits)}; give the folder of one of them")
    return _plain_name(folder / SPLITS, splits[0])


def _data_file(folder: Path, file: Any) -> Path:
    if not isinstance(file, dict) or not isinstance(file.get("filename"), str):
        raise refusal(folder / STATE, f"has an entry without a file name: {str(file)[:100]}")
    if file.get("skip") or file.get("take"):
        raise refusal(folder / STATE, "takes a part of a file: load it in `datasets` and save it again")
    return folder / _plain_name(folder / STATE, file["filename"])


def _plain_name(path: Path, name: str) -> str:
    """A name inside the folder: a file of a data set must not point at another folder."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise refusal(path, f"names {name!r}, which is no name inside the folder")
    return name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise refusal(path, f"cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise refusal(path, "holds no JSON object")
    return value
