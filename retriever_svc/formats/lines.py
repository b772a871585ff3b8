"""The lines of a text file, plain or gzip: strict UTF-8, one line in memory at a time."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from retriever_svc.formats.passages import refusal

LINE_LIMIT = 64 * 2**20
GZIP = b"\x1f\x8b"
BOM = "\ufeff"


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """``(number, line)`` from 1, each with its line end, ``\\n`` where the file leaves out the last one.

    Raises: InvalidRequest: the file cannot be read, is damaged gzip, or names the line that is no UTF-8 or that is
        longer than ``LINE_LIMIT`` bytes.
    """
    number = 0
    try:
        with _open(path) as file:
            while raw := file.readline(LINE_LIMIT):
                number += 1
                if len(raw) == LINE_LIMIT:
                    raise refusal(path, f"line {number} is longer than {LINE_LIMIT} bytes")
                line = raw.decode()
                if number == 1:
                    line = line.removeprefix(BOM)
                yield number, line if line.endswith("\n") else line + "\n"
    except UnicodeDecodeError as error:
        raise refusal(path, f"line {number} is not UTF-8 at byte {error.start}: {error.reason}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise refusal(path, f"cannot be read beyond line {number}: {error}") from error


def is_gzip(path: Path) -> bool:
    """Raises: OSError."""
    with path.open("rb") as file:
        return file.read(2) == GZIP


def _open(path: Path) -> gzip.GzipFile | BinaryIO:
    return gzip.open(path) if is_gzip(path) else path.open("rb")
