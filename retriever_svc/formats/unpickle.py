"""Legacy pickles read without running anything: plain containers, strings, numbers and numeric numpy arrays only.

A pickle is a program that may call whatever it can import. Here it can import the few names that DPR's files need,
and each of them stands for a function of this module that checks its arguments; numpy's own ``__setstate__`` sees
nothing but a checked shape, dtype and bytes. Every other name is refused, by module and attribute, before it is
imported.
"""

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from retriever_svc.formats.pickle_scan import scan
from shared.errors import InvalidRequest

DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|[SU][0-9]{1,6})")
PLAIN = (str, bytes, int, float, type(None))
MAX_DIMENSIONS = 4
BROKEN = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


def safe_load(path: Path) -> Any:
    """What a pickle file holds: any protocol, None, bool, int, float, str, bytes, list, tuple, dict, set, ndarray.

    Raises: InvalidRequest: names the module and attribute that the pickle asks for and may not have, or says what is
        damaged. Nothing that the file names has run.
    """
    try:
        scan(path)
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except _Refused as refused:
        raise InvalidRequest(
            f"{path} asks for `{refused}`, which is refused: only plain containers and numeric numpy arrays are read "
            "from a pickle",
            param="source",
        ) from None
    except BROKEN as error:
        raise InvalidRequest(f"{path} cannot be read as a pickle: {error}", param="source") from error


class _Refused(Exception):
    """A name outside the list; the message is ``module.attribute``."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = ALLOWED.get((module, name))
        if allowed is None:
            raise _Refused(f"{module}.{name}")
        return allowed


class _Name:
    """What a pickle gets for a name: it can be called or handed on, and nothing can be set on it."""

    __slots__ = ("_call", "name")
    name: str
    _call: Callable[..., Any] | None

    def __init__(self, name: str, call: Callable[..., Any] | None = None) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        if self._call is None:
            raise pickle.UnpicklingError(f"`{self.name}` may not be called")
        return self._call(*args)

    def __setattr__(self, attribute: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError(f"`{attribute}` may not be set on `{self.name}`")

    def __setstate__(self, state: object) -> NoReturn:
        raise pickle.UnpicklingError(f"`{self.name}` has no state to set")


class _Dtype:
    """Stands for numpy.dtype while loading: a plain number or string of fixed width, never an object or a record."""

    __slots__ = ("real",)
    real: np.dtype[Any]

    def __init__(self, code: object = None, *_align_and_copy: object) -> None:
        if not isinstance(code, str) or not DTYPE.fullmatch(code):
            raise pickle.UnpicklingError(f"a numpy array of dtype {str(code)[:20]!r} is not read")
        object.__setattr__(self, "real", np.dtype(code))

    def __setattr__(self, attribute: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError("nothing may be set on a dtype")

    def __setstate__(self, state: Any) -> None:
        order, *rest = state[1:]
        if order not in ("<", ">", "|", "=") or rest[:3] != [None, None, None]:
            raise pickle.UnpicklingError("a numpy dtype with fields is not read")
        object.__setattr__(self, "real", self.real.newbyteorder(order))


class _Array(npt.NDArray[Any]):
    """An array that checks the state which it is given before numpy takes it."""

    def __setstate__(self, state: Any) -> None:
        shape, dtype, fortran, raw = state[-4:]
        if self.base is not None or self.size:
            raise pickle.UnpicklingError("an array is filled twice")
        _check_size(shape, dtype, raw)
        super().__setstate__((1, shape, dtype.real, fortran is True, raw))  # type: ignore[arg-type]


def _check_size(shape: Any, dtype: Any, raw: Any) -> None:
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray):
        raise pickle.UnpicklingError("a numpy array whose values are objects is not read")
    whole = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not whole or len(shape) > MAX_DIMENSIONS:
        raise pickle.UnpicklingError(f"{str(shape)[:50]} is no shape of an array")
    if math.prod(shape) * dtype.real.itemsize != len(raw):
        raise pickle.UnpicklingError(f"an array of shape {shape} and {dtype.real} has {len(raw)} bytes")


def _reconstruct(subtype: object, shape: object, code: object) -> npt.NDArray[Any]:
    if subtype is not NDARRAY or shape != (0,) or code not in (b"b", "b"):
        raise pickle.UnpicklingError("numpy's _reconstruct is called as no pickler calls it")
    return _Array((0,), np.int8)


def _from_buffer(
    buffer: Any, dtype: Any, shape: Any, order: object, axis_order: object = None
) -> npt.NDArray[np.generic]:
    if isinstance(shape, int):
        shape = (shape,)
    _check_size(shape, dtype, buffer)
    if order not in ("C", "F") or axis_order is not None:
        raise pickle.UnpicklingError("an array with another order than C or Fortran is not read")
    flat: npt.NDArray[Any] = np.frombuffer(buffer, dtype.real)
    return flat.reshape(shape, order="C" if order == "C" else "F")


def _scalar(dtype: Any, raw: Any) -> Any:
    _check_size((1,), dtype, raw)
    return np.frombuffer(raw, dtype.real)[0]


def _encode(text: object, encoding: object = None) -> bytes:
    """Protocols 0 to 2 have no bytes: they are written as text to be encoded."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("codecs.encode is called for something other than bytes")
    return text.encode("latin-1")


def _set(items: Any = ()) -> set[Any]:
    """Protocols below 4 have no opcode for sets: they are written as a call with a list."""
    if not isinstance(items, list) or not all(isinstance(item, PLAIN) for item in items):
        raise pickle.UnpicklingError("a set of something other than strings and numbers is not read")
    return set(items)


def _frozenset(items: Any = ()) -> frozenset[Any]:
    return frozenset(_set(items))


def _empty_bytes() -> bytes:
    return b""


NDARRAY = _Name("numpy.ndarray")
_MULTIARRAY: dict[str, Callable[..., Any]] = {"_reconstruct": _reconstruct, "scalar": _scalar}
ALLOWED: dict[tuple[str, str], _Name] = {
    ("numpy", "ndarray"): NDARRAY,
    ("numpy", "dtype"): _Name("numpy.dtype", _Dtype),
    ("_codecs", "encode"): _Name("_codecs.encode", _encode),
    **{
        (f"numpy.{core}.multiarray", name): _Name(name, call)
        for core in ("core", "_core")
        for name, call in _MULTIARRAY.items()
    },
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Name("_frombuffer", _from_buffer) for core in ("core", "_core")},
    **{
        (builtins, name): _Name(name, call)
        for builtins in ("builtins", "__builtin__")  # the name in Python 2 stands in protocols 0 to 2
        for name, call in (("set", _set), ("frozenset", _frozenset), ("bytes", _empty_bytes))
    },
}
