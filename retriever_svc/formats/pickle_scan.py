"""A pickle file looked through before it is loaded: cut short, or made to crash what loads it?

Python's unpickler allocates what a pickle announces (a memo entry with the number 2**32 - 1 takes 64 GB, whatever the
size of the file), and hashing a key of a million nested tuples overflows the stack of the process. The opcodes are
therefore walked once, without creating an object; a pickle that passes takes memory in proportion to its size, and
nests its tuples no deeper than ``DEPTH_LIMIT``. What the opcodes are and do to the stack is :mod:`pickletools`' record.
"""

import mmap
import pickletools
from pathlib import Path
from typing import NoReturn

from shared.errors import InvalidRequest

DEPTH_LIMIT = 100
ABSENT = 255

BY_NAME = {op.name: ord(op.code) for op in pickletools.opcodes}
ARGUMENT = {ord(op.code): op.arg.n if op.arg else 0 for op in pickletools.opcodes}
"""Length of an opcode's argument, or one of pickletools' negative codes for where the length stands."""

LENGTH_BYTES = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4}
LENGTH_BYTES |= {pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8}
TWO_LINES = frozenset(BY_NAME[name] for name in ("GLOBAL", "INST"))  # a module and a name


def _stack_effect(op: pickletools.OpcodeInfo) -> tuple[bool, int, int]:
    """Whether everything down to a mark is taken, how many below that, and how many objects are left."""
    names = [slot.name for slot in op.stack_before]
    marked = "mark" in names
    return marked, names.index("mark") if marked else len(names), len(op.stack_after)


EFFECT = {ord(op.code): _stack_effect(op) for op in pickletools.opcodes}
MARK, POP, STOP = BY_NAME["MARK"], BY_NAME["POP"], BY_NAME["STOP"]
PUTS = frozenset(BY_NAME[name] for name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
GETS = frozenset(BY_NAME[name] for name in ("GET", "BINGET", "LONG_BINGET"))
IN_DIGITS = frozenset(BY_NAME[name] for name in ("GET", "PUT"))
NESTING = frozenset(BY_NAME[name] for name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"))


def scan(path: Path) -> None:
    """Walk the opcodes of a pickle file.

    Raises: InvalidRequest: the file is empty, is cut short, is no pickle, numbers its memo in no order, or nests its
        tuples too deeply.
    """
    with path.open("rb") as file:
        try:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise InvalidRequest(f"{path} is empty, where a pickle is expected", param="source") from error
        with view:
            _walk(path, view)


def _walk(path: Path, data: mmap.mmap) -> None:
    size, at = len(data), 0
    stack = _Depths(path)
    while at < size:
        op = data[at]
        if op == STOP:
            return
        end = _end_of_argument(path, data, op, at + 1)
        if end > size:
            break
        if op in PUTS:
            stack.put(_memo_number(path, data, op, at + 1, end))
        elif op in GETS:
            stack.get(_memo_number(path, data, op, at + 1, end))
        else:
            stack.take(op)
        at = end
    raise InvalidRequest(f"{path} is cut short: the pickle goes on beyond its {size} bytes", param="source")


class _Depths:
    """The unpickler's stack and memo with, in place of each object, how deeply tuples are nested in it at most."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack: list[int] = []
        self._below: list[list[int]] = []  # what stands below each mark
        self._memo = bytearray()  # a byte an entry: a pickle of all of Wikipedia has 80 million

    def take(self, op: int) -> None:
        """Any opcode but those of the memo."""
        marked, taken, left = EFFECT[op]
        stack = self._stack
        if not taken and not marked:
            if op == MARK:
                self._below.append(stack)
                self._stack = []
            elif left:
                stack.append(0)
            return
        if op == POP and not stack and self._below:  # of a mark
            self._stack = self._below.pop()
            return
        depth = 0
        if marked:
            if not self._below:
                self._refuse("looks for a mark that is not there")
            depth = max(stack, default=0)
            stack = self._stack = self._below.pop()
        if taken:
            if len(stack) < taken:
                self._refuse("takes from an empty stack")
            depth = max(depth, *stack[-taken:])
            del stack[-taken:]
        if op in NESTING:
            depth += 1
            if depth > DEPTH_LIMIT:
                self._refuse(f"nests tuples more than {DEPTH_LIMIT} deep")
        stack.extend([depth] * left)

    def put(self, number: int | None) -> None:
        """``number`` is None where the opcode counts by itself."""
        memo = self._memo
        count = len(memo)
        if number is None:
            number = count
        if not self._stack:
            self._refuse("takes from an empty stack")
        if number < count:
            memo[number] = self._stack[-1]
        elif number <= count + 1:  # picklers count from 0, and that of Python 2 from 1
            memo.extend([ABSENT] * (number - count))
            memo.append(self._stack[-1])
        else:
            self._refuse(f"numbers memo entry {count} as {number}, as no pickler writes it")

    def get(self, number: int | None) -> None:
        if number is None or number >= len(self._memo) or self._memo[number] == ABSENT:
            self._refuse(f"asks for memo entry {number}, which is not there")
        self._stack.append(self._memo[number])

    def _refuse(self, says: str) -> NoReturn:
        raise InvalidRequest(f"{self._path} is refused: the pickle {says}", param="source")


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


def _memo_number(path: Path, data: mmap.mmap, op: int, start: int, end: int) -> int | None:
    if op not in IN_DIGITS:
        return int.from_bytes(data[start:end], "little") if end > start else None
    digits = data[start : min(end, start + 20)].strip()
    if not digits.isdigit():
        raise InvalidRequest(f"{path} numbers a memo entry as {digits!r} at byte {start - 1}", param="source")
    return int(digits)
