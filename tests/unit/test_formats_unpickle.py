"""Legacy pickles: what may be in them comes out as it went in, and nothing that they name is run."""

import os
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from retriever_svc.formats.unpickle import safe_load
from shared.errors import InvalidRequest

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
PLAIN = (type(None), bool, int, float, str, bytes, list, tuple, dict, np.ndarray, np.generic)
DTYPES = ["<f4", ">f4", "<f2", "<f8", "<i8", ">i4", "|u1", "|b1", "<U3", "|S4"]

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
        | st.sets(st.integers(), max_size=4)
        | st.frozensets(st.text(), max_size=4)
    ),
    max_leaves=12,
)


class Planted:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def load_bytes(folder: Path, data: bytes) -> Any:
    path = folder / "data.pkl"
    path.write_bytes(data)
    return safe_load(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pickles")


@given(value=plain, protocol=st.sampled_from(PROTOCOLS))
def test_plain_values_come_back(folder: Path, value: Any, protocol: int) -> None:
    assert load_bytes(folder, pickle.dumps(value, protocol)) == value


@given(
    array=hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)),
    protocol=st.sampled_from(PROTOCOLS),
    fortran=st.booleans(),
)
def test_arrays_come_back(folder: Path, array: np.ndarray, protocol: int, fortran: bool) -> None:
    array = np.asfortranarray(array) if fortran else array
    loaded, again = load_bytes(folder, pickle.dumps([array, array], protocol))
    assert loaded is again
    assert loaded.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(loaded, array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_rows_of_an_embedding_shard_come_back(folder: Path, protocol: int) -> None:
    shard = [(str(i), np.full(3, i, np.float32), np.float32(i), np.int64(i)) for i in range(300)]
    loaded = load_bytes(folder, pickle.dumps(shard, protocol))
    assert [(row[0], list(row[1]), row[2], row[3]) for row in loaded] == [
        (row[0], list(row[1]), row[2], row[3]) for row in shard
    ]


def test_names_of_older_numpy_are_known(folder: Path) -> None:
    data = pickle.dumps(np.arange(3.0), 2).replace(b"numpy._core", b"numpy.core")
    assert list(load_bytes(folder, data)) == [0, 1, 2]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("function", "named"),
    [(os.system, "system"), (eval, "eval"), (exec, "exec"), (getattr, "getattr"), (__import__, "__import__")],
)
def test_a_planted_call_is_named_and_not_run(
    folder: Path, function: Callable[..., Any], named: str, protocol: int
) -> None:
    ran = folder / "ran"
    argument = f"touch {ran}" if function is os.system else f"open({str(ran)!r}, 'w').close()"
    payload = pickle.dumps([("1", np.zeros(2)), Planted(function, argument)], protocol)
    with pytest.raises(InvalidRequest, match=rf"data\.pkl asks for `\w+\.{named}`"):
        load_bytes(folder, payload)
    assert not ran.exists()


@pytest.mark.parametrize("opcodes", [b"ios\nsystem\n", b"cos\nsystem\nq\x00o"])
def test_a_call_by_the_old_opcodes_is_refused(folder: Path, opcodes: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"`os\.system`"):
        load_bytes(folder, b"(X\x04\x00\x00\x00true" + opcodes + b".")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_array_of_objects_is_refused_before_its_objects_are_made(folder: Path, protocol: int) -> None:
    ran = folder / "ran"
    gadget = np.array([Planted(os.system, f"touch {ran}")], dtype=object)
    with pytest.raises(InvalidRequest, match=r"dtype 'O8?' is not read|`\w+\.system`"):
        load_bytes(folder, pickle.dumps(gadget, protocol))
    assert not ran.exists()
    with pytest.raises(InvalidRequest, match=r"dtype 'O8?' is not read"):
        load_bytes(folder, pickle.dumps(np.array([None], dtype=object), protocol))


@pytest.mark.parametrize("value", [np.zeros(2, "f4,i8"), np.zeros(2, "V8"), np.zeros(1, "M8[s]"), np.zeros(1, "c8")])
def test_records_dates_and_complex_numbers_are_refused(folder: Path, value: np.ndarray) -> None:
    with pytest.raises(InvalidRequest, match="is not read"):
        load_bytes(folder, pickle.dumps(value))


class Stated(Planted):
    """A call whose result is then given a state."""

    def __init__(self, call: Any, state: Any) -> None:
        self.call = (*call, state)


RECONSTRUCT, NEW_ARRAY = np.zeros(1).__reduce__()[:2]


@pytest.mark.parametrize(
    "value",
    [
        Planted(np.ndarray, (1 << 40,)),
        Planted(RECONSTRUCT, np.ndarray, (1 << 40,), b"b"),
        Planted(RECONSTRUCT, np.dtype, (0,), b"b"),
        Stated((RECONSTRUCT, NEW_ARRAY), (1, (1 << 40,), np.dtype("f4"), False, b"1234")),
        Stated((RECONSTRUCT, NEW_ARRAY), (1, (-1,), np.dtype("f4"), False, b"")),
        Stated((RECONSTRUCT, NEW_ARRAY), (1, (1,), np.dtype("f4"), False, [1.0])),
        Stated((RECONSTRUCT, NEW_ARRAY), (1,)),
        Stated((np.dtype, ("f4", False, True)), (3, "<", None, ("a",), {"a": 1}, 4, 4, 0)),
        Stated((np.dtype, ("f4", False, True)), {"real": 1}),
        Planted(np.dtype, "O"),
        Planted(np.dtype, [("a", "O")]),
    ],
)
def test_numpys_own_names_take_only_what_a_pickler_writes(folder: Path, value: Any) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read as a pickle"):
        load_bytes(folder, pickle.dumps(value))


@pytest.mark.parametrize("state", [b"}X\x01\x00\x00\x00aK\x01s", b"N}X\x05\x00\x00\x00_callK\x01s\x86"])
def test_nothing_can_be_set_on_a_name(folder: Path, state: bytes) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read as a pickle"):
        load_bytes(folder, b"\x80\x02cnumpy\ndtype\n" + state + b"b.")
    assert load_bytes(folder, pickle.dumps(np.arange(2.0))).tolist() == [0, 1]


@pytest.mark.parametrize(
    "put", [b"r" + struct.pack("<I", 2**32 - 1), b"q\xff", b"p4294967295\n", b"p-1\n", b"p" + b"9" * 40 + b"\n"]
)
def test_a_memo_bomb_is_refused(folder: Path, put: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"numbers (a )?memo entry|numbers memo"):
        load_bytes(folder, b"\x80\x02]" + put + b".")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"few.",  # announces bytes that are not there
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N",
        b"\x80\x04\x96" + struct.pack("<Q", 2**40),
        b"\x80\x04T\xff\xff\xff\x7f.",
        b"cos\n",
        b"PK\x03\x04",
        b"\xffnot a pickle",
        b"K\x01",
        b"(.",
        b".",
        b"e.",
        b"\x80\x04h\x05.",
        b"\x80\x63N.",
        b"L" + b"9" * 5000 + b"L\n.",
        b"\x82\x01.",
        b"Ps\n.",
        b"\x97.",
        b"N}N}ss.",
        b"}]Ns.",
    ],
)
def test_what_is_no_whole_pickle_is_refused(folder: Path, data: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"data\.pkl"):
        load_bytes(folder, data)


@given(cut=st.integers(0, 10_000), protocol=st.sampled_from(PROTOCOLS))
def test_a_file_cut_short_is_refused(folder: Path, cut: int, protocol: int) -> None:
    data = pickle.dumps([(str(i), np.full(2, i, np.float32)) for i in range(20)], protocol)
    with pytest.raises(InvalidRequest, match=r"data\.pkl"):
        load_bytes(folder, data[: cut % len(data)])


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), protocol=st.sampled_from(PROTOCOLS))
def test_a_damaged_file_is_refused_or_read_as_plain_data(folder: Path, at: int, byte: int, protocol: int) -> None:
    data = bytearray(pickle.dumps([("1", np.full(2, 1, np.float32), {"a": (1, None)})] * 3, protocol))
    data[at % len(data)] = byte
    with suppress(InvalidRequest):
        assert isinstance(load_bytes(folder, bytes(data)), PLAIN)


@pytest.mark.parametrize(
    "nested",
    [
        b"}N" + b"\x85" * 100_000 + b"Ns.",
        b"}" + b"(" * 100_000 + b"t" * 100_000 + b"Ns.",
        b"}Nq\x00" + b"0h\x00\x85q\x00" * 100_000 + b"Ns.",
        b"})" + b"2\x86" * 100_000 + b"Ns.",
        b"}N" + b"\x85Nb" * 100_000 + b"Ns.",
        b"}N" + b"\x85(e" * 100_000 + b"Ns.",
        b"\x8f(" + b"(" * 100_000 + b"\x91" * 100_000 + b"\x90.",
    ],
)
def test_a_key_that_would_overflow_the_stack_is_refused(folder: Path, nested: bytes) -> None:
    with pytest.raises(InvalidRequest, match="nests tuples more than 100 deep"):
        load_bytes(folder, b"\x80\x04" + nested)


def test_lists_may_nest_deeply(folder: Path) -> None:
    loaded = load_bytes(folder, b"\x80\x04" + b"]" * 5000 + b"a" * 4999 + b".")
    for _ in range(4999):
        (loaded,) = loaded
    assert loaded == []


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"none\.pkl"):
        safe_load(tmp_path / "none.pkl")
