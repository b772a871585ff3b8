"""A pickle file looked through before it is loaded: cut short, or made to use up memory?

Python's unpickler allocates what a pickle announces: a memo entry with the number 2**32 - 1 takes 64 GB, whatever the
size of the file. The opcodes and their arguments are therefore walked once, without creating an object; a pickle
that passes takes memory in proportion to its size. The opcodes are those of :mod:`pickletools`.
"""

import mmap
import pickletools
from pathlib import Path

from shared.errors import InvalidRequest

ARGUMENT = {ord(op.code): op.arg.n if op.arg else 0 for op in pickletools.opcodes}
"""Length of an opcode's argument, or one of pickletools' negative codes for where the length stands."""

LENGTH_BYTES = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4}
LENGTH_BYTES |= {pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8}
TWO_LINES = frozenset(b"ci")  # GLOBAL and INST: a module and a name
MEMOIZE, PUT, STOP = 0x94, ord("p"), ord(".")
NUMBERED_PUTS = {ord("q"): 1, ord("r"): 4}
KNOWN_BY_MEMO = frozenset({MEMOIZE, PUT, *NUMBERED_PUTS})


def scan(path: Path) -> None:
    """Walk the opcodes of a pickle file.

    Raises: InvalidRequest: the file is empty, is cut short, is no pickle, or numbers its memo in no order.
    """
    with path.open("rb") as file:
        try:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise InvalidRequest(f"{path} is empty, where a pickle is expected", param="source") from error
        with view:
            _walk(path, view)


def _walk(path: Path, data: mmap.mmap) -> None:
    size, at, memoized = len(data), 0, 0
    while at < size:
        op = data[at]
        if op == STOP:
            return
        end = _end_of_argument(path, data, op, at + 1)
        if end > size:
            break
        if op in KNOWN_BY_MEMO:
            number = memoized if op == MEMOIZE else _memo_number(path, data, op, at + 1, end)
            if not 0 <= number <= memoized + 1:  # picklers count from 0, and that of Python 2 from 1
                raise InvalidRequest(
                    f"{path} numbers memo entry {memoized} as {number} at byte {at}: refused, as no pickler writes it",
                    param="source",
                )
            memoized += 1
        at = end
    raise InvalidRequest(f"{path} is cut short: the pickle goes on beyond its {size} bytes", param="source")


def _end_of_argument(path: Path, data: mmap.mmap, op: int, start: int) -> int:
    """Where the next opcode stands; beyond the end of the data where the argument does not end before it."""
    length = ARGUMENT.get(op)
    if length is None:
        raise InvalidRequest(f"{path} is no pickle: byte {start - 1} is {op:#04x}, no opcode", param="source")
    if length >= 0:
        return start + length
    if width := LENGTH_BYTES.get(length):
        return start + width + int.from_bytes(data[start : start + width], "little")
    end = start
    for _ in range(2 if op in TWO_LINES else 1):
        end = data.find(b"\n", end) + 1
        if not end:
            return len(data) + 1
    return end


def _memo_number(path: Path, data: mmap.mmap, op: int, start: int, end: int) -> int:
    if op in NUMBERED_PUTS:
        return int.from_bytes(data[start:end], "little")
    digits = data[start : min(end, start + 20)].strip()
    if not digits.isdigit():
        raise InvalidRequest(f"{path} numbers a memo entry as {digits!r} at byte {start - 1}", param="source")
    return int(digits)
