"""The log of changes: what was acknowledged is read back, what was cut off is dropped, what is damaged is refused."""

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_svc import changes as module
from retriever_svc.changes import FOLDER, HEAD, SECTOR, Change, ChangeLog, Delete, Upsert, read_changes, remove_until
from shared.errors import Conflict, StartupError
from tests.retriever_data import random_embeddings
from tests.retriever_process import ROOT

LINEAGE = "lineage"
D = 3


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)
        yield


def change(seed: int) -> Change:
    """A deletion, or passages with texts of any length."""
    dice = np.random.default_rng(seed)
    n = int(dice.integers(1, 5))
    ids = dice.choice(100, n, replace=False)
    if dice.random() < 0.3:
        return Delete(ids)
    texts = ["é" * int(dice.choice([0, 1, 40, 700])) + str(i) for i in range(n)]
    return Upsert(ids, [f"“{seed}”"] * n, texts, random_embeddings(n, D, seed=seed))


def plain(change: Change) -> list[Any]:
    if isinstance(change, Delete):
        return change.ids.tolist()
    return [change.ids.tolist(), list(change.titles), list(change.texts), change.embeddings.tolist()]


def opened(folder: Path, applied: int = 0) -> ChangeLog:
    return ChangeLog.open(folder, LINEAGE, "float32", applied=applied)


def read(folder: Path, after: int = 0, upto: int | None = None) -> list[tuple[int, Any]]:
    return [(number, plain(one)) for number, one in read_changes(folder, LINEAGE, after=after, upto=upto)]


def files(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER / LINEAGE).glob("*.log"))


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """hypothesis runs many examples within one tmp_path."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


Appends = list[list[int]]
"""Seeds of the changes of each append."""

appends = st.lists(st.lists(st.integers(0, 10_000), min_size=1, max_size=4), min_size=1, max_size=4)


def written(folder: Path, groups: Appends, rolls: Sequence[int] = ()) -> tuple[list[Any], list[int]]:
    """The log of these appends, a new file before those in ``rolls``.

    Returns: its changes, and how long the last file was before each append to it and after the last.
    """
    log, expected, sizes = opened(folder), [], [0]
    for i, group in enumerate(groups):
        if i in rolls:
            log.roll()
            sizes = [0]
        changes = [change(seed) for seed in group]
        assert log.append(changes) == len(expected) + len(group)
        expected += [(len(expected) + 1 + at, plain(one)) for at, one in enumerate(changes)]
        sizes.append(files(folder)[-1].stat().st_size)
    log.close()
    return expected, sizes


def acknowledged_at(groups: Appends, sizes: list[int], size: int) -> int:
    """How many changes were acknowledged once the last file had ``size`` bytes."""
    whole = len(groups) - sum(size < end for end in sizes[1:])  # those in earlier files are
    return sum(map(len, groups[:whole]))


# --- what was written ----------------------------------------------------------------------------------------


@given(appends, st.sets(st.integers(0, 3)), st.data())
def test_every_change_is_read_back_in_order_whatever_the_files(groups: Appends, rolls: set[int], data: Any) -> None:
    with temporary_folder() as folder:
        expected, _ = written(folder, groups, sorted(rolls))
        after = data.draw(st.integers(0, len(expected)))
        upto = data.draw(st.integers(after, len(expected)))
        assert read(folder) == expected
        assert read(folder, after, upto) == expected[after:upto]
        log = opened(folder)
        assert log.last == len(expected)
        log.close()


@given(appends, st.sets(st.integers(0, 3)), st.data())
def test_files_are_removed_once_no_change_in_them_is_needed(groups: Appends, rolls: set[int], data: Any) -> None:
    with temporary_folder() as folder:
        expected, _ = written(folder, groups, sorted(rolls))
        applied = data.draw(st.integers(0, len(expected)))
        before = files(folder)
        remove_until(folder, LINEAGE, applied)
        assert read(folder, applied) == expected[applied:]
        left = files(folder)
        assert left == before[len(before) - len(left) :]
        assert len(left) == 1 or int(left[1].stem) > applied + 1
        log = opened(folder, applied)
        assert log.append([change(1)]) == len(expected) + 1
        log.close()
        assert len(read(folder, applied)) == len(expected) - applied + 1


def test_changes_that_were_removed_are_missed_by_who_needs_them(tmp_path: Path) -> None:
    written(tmp_path, [[1], [2], [3]], rolls=[1, 2])
    remove_until(tmp_path, LINEAGE, 2)
    with pytest.raises(StartupError, match="the changes 2 to 2 are missing"):
        read(tmp_path, after=1)
    with pytest.raises(StartupError, match="the changes 1 to 2 are missing"):
        read(tmp_path)


def test_numbers_go_on_where_a_generation_took_all_changes_and_the_files_are_gone(tmp_path: Path) -> None:
    log = opened(tmp_path, applied=7)
    assert log.append([change(1), change(2)]) == 9
    log.close()
    assert [number for number, _ in read(tmp_path, after=7)] == [8, 9]


# --- what a crash left ---------------------------------------------------------------------------------------


def check_reopened(folder: Path, expected: list[Any]) -> None:
    """Exactly ``expected`` is there before the log is opened for writing, after that, and after one more append."""
    assert read(folder) == expected
    log = opened(folder)
    assert log.last == len(expected)
    assert read(folder) == expected
    assert log.append([change(99)]) == len(expected) + 1
    log.close()
    assert read(folder) == [*expected, (len(expected) + 1, plain(change(99)))]


@pytest.mark.parametrize("rolls", [(), (1,)], ids=["one file", "two files"])
def test_a_log_cut_off_at_any_byte_lacks_the_appends_that_were_not_whole_and_no_other(
    tmp_path: Path, rolls: tuple[int, ...]
) -> None:
    short = [seed for seed in range(100) if len(repr(plain(change(seed)))) < 150]
    groups = [short[:2], short[2:3], short[3:5]]
    expected, sizes = written(tmp_path, groups, rolls)
    path = files(tmp_path)[-1]
    content, first = path.read_bytes(), int(path.stem) - 1
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        kept = acknowledged_at(groups, sizes, size)
        assert kept >= first
        assert read(tmp_path) == expected[:kept]
        log = opened(tmp_path)
        assert log.last == kept
        log.close()
        assert path.stat().st_size == max(end for end in sizes if end <= size)
    path.write_bytes(content[:-1])
    check_reopened(tmp_path, expected[: -len(groups[-1])])


@given(appends, st.integers(1, 3000))
def test_zeros_at_the_end_are_dropped(groups: Appends, zeros: int) -> None:
    with temporary_folder() as folder:
        expected, _ = written(folder, groups)
        with files(folder)[-1].open("ab") as file:
            file.write(bytes(zeros))
        check_reopened(folder, expected)


@given(appends, st.data())
def test_after_a_power_cut_any_sector_of_the_last_append_may_be_missing(groups: Appends, data: Any) -> None:
    """What an fsync did not wait for reaches the disk in any order; what is not there reads as zeros."""
    with temporary_folder() as folder:
        expected, sizes = written(folder, groups)
        path = files(folder)[-1]
        content, begins = bytearray(path.read_bytes()), sizes[-2]
        size = data.draw(st.integers(begins, len(content)))
        for sector in range(begins // SECTOR, -(-size // SECTOR)):
            if data.draw(st.booleans()):
                start = max(begins, sector * SECTOR)
                end = min(size, (sector + 1) * SECTOR)
                content[start:end] = bytes(end - start)
        path.write_bytes(content[:size])
        intact = size == sizes[-1] and bytes(content) == path.read_bytes() and len(read(folder)) == len(expected)
        check_reopened(folder, expected if intact else expected[: -len(groups[-1])])


# --- damage --------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(appends.filter(lambda groups: len(groups) > 1), st.sets(st.integers(1, 3)), st.data())
def test_a_flipped_bit_in_any_record_but_the_last_is_refused_by_the_name_of_the_file(
    groups: Appends, rolls: set[int], data: Any
) -> None:
    with temporary_folder() as folder:
        _, sizes = written(folder, groups, sorted(rolls))
        paths = files(folder)
        path = data.draw(st.sampled_from(paths))
        content = bytearray(path.read_bytes())
        end = sizes[-2] if path == paths[-1] else len(content)
        if not end:  # the last file holds the last record alone
            return
        at = data.draw(st.integers(0, end - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        with pytest.raises(StartupError, match=path.name):
            read(folder)
        with pytest.raises(StartupError, match=path.name):
            opened(folder)
        assert path.read_bytes() == content


@given(appends, st.data())
def test_a_flipped_bit_in_the_last_record_costs_no_other(groups: Appends, data: Any) -> None:
    """It cannot be told from one that was being written; where its head is damaged, it is refused."""
    with temporary_folder() as folder:
        expected, sizes = written(folder, groups)
        path = files(folder)[-1]
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(sizes[-2], len(content) - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        if at >= sizes[-2] + HEAD.size:
            check_reopened(folder, expected[: -len(groups[-1])])
        else:
            with pytest.raises(StartupError, match=path.name):
                opened(folder)


@given(appends.filter(lambda groups: len(groups) > 1), st.data())
def test_a_lost_sector_among_what_was_acknowledged_is_refused(groups: Appends, data: Any) -> None:
    with temporary_folder() as folder:
        _, sizes = written(folder, groups)
        path = files(folder)[-1]
        content = bytearray(path.read_bytes())
        start = data.draw(st.sampled_from(sizes[:-2]))
        end = min(sizes[-2], start + data.draw(st.integers(HEAD.size, 2 * SECTOR)))
        content[start:end] = bytes(end - start)
        path.write_bytes(content)
        with pytest.raises(StartupError, match=path.name):
            read(folder)
        with pytest.raises(StartupError, match=path.name):
            opened(folder)


def test_a_file_cut_off_that_another_follows_is_refused(tmp_path: Path) -> None:
    written(tmp_path, [[1], [2], [3]], rolls=[2])
    first = files(tmp_path)[0]
    os.truncate(first, first.stat().st_size - 1)
    with pytest.raises(StartupError, match=first.name):
        read(tmp_path)
    with pytest.raises(StartupError, match=first.name):
        opened(tmp_path)


# --- one writer ----------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from retriever_svc.changes import ChangeLog
log = ChangeLog.open(Path(sys.argv[1]), "lineage", "float32", applied=0)
print("held", flush=True)
time.sleep(60)
"""


def test_a_log_has_one_writer_until_that_dies(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(Conflict, match=f"another process writes to the collection `{tmp_path.name}`"):
                opened(tmp_path)
            assert read(tmp_path) == []  # a reader needs no lock
        finally:
            process.kill()
    opened(tmp_path).close()


def test_a_damaged_log_is_not_held(tmp_path: Path) -> None:
    written(tmp_path, [[1], [2]])
    path = files(tmp_path)[0]
    content = path.read_bytes()
    path.write_bytes(b"\xff" + content[1:])
    with pytest.raises(StartupError):
        opened(tmp_path)
    path.write_bytes(content)
    opened(tmp_path).close()


# --- a disk that does not take it ----------------------------------------------------------------------------


class Disk:
    """Stands in for the calls that write, and fails on demand.

    ``room``: bytes that it takes yet, None for any; ``chunk``: bytes that one write takes at most.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self.chunk = 2**20
        self.failing_syncs = self.failing_truncates = 0
        disk = self

        class File(module.FileIO):
            def write(self, data: Any) -> int:
                taken = min(len(data), disk.chunk, len(data) if disk.room is None else disk.room)
                if not taken:
                    raise OSError(errno.ENOSPC, "No space left on device")
                if disk.room is not None:
                    disk.room -= taken
                return super().write(data[:taken])

            def truncate(self, size: int | None = None) -> int:
                if disk.failing_truncates:
                    disk.failing_truncates -= 1
                    raise OSError(errno.EIO, "Input/output error")
                return super().truncate(size)

        fsync: Callable[[int], None] = os.fsync

        def failing(descriptor: int) -> None:
            if disk.failing_syncs:
                disk.failing_syncs -= 1
                raise OSError(errno.EIO, "Input/output error")
            fsync(descriptor)

        monkeypatch.setattr(module, "FileIO", File)
        monkeypatch.setattr(os, "fsync", failing)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("takes", [0, 1, HEAD.size, 200])
@pytest.mark.parametrize("first", [True, False], ids=["first append", "later append"])
def test_a_full_disk_leaves_the_log_as_it_was_and_the_next_append_works(
    tmp_path: Path, disk: Disk, takes: int, first: bool
) -> None:
    log = opened(tmp_path)
    if not first:
        log.append([change(1)])
    before = read(tmp_path)
    disk.room = takes
    with pytest.raises(OSError, match="No space left"):
        log.append([change(2), change(3)])
    disk.room = None
    assert read(tmp_path) == before
    assert log.append([change(4)]) == len(before) + 1
    log.close()
    assert read(tmp_path) == [*before, (len(before) + 1, plain(change(4)))]


def test_a_write_that_the_disk_takes_in_parts_is_whole(tmp_path: Path, disk: Disk) -> None:
    log = opened(tmp_path)
    disk.chunk = 10
    log.append([change(1)])
    log.close()
    assert read(tmp_path) == [(1, plain(change(1)))]


def test_a_failed_fsync_takes_the_append_back(tmp_path: Path, disk: Disk) -> None:
    log = opened(tmp_path)
    log.append([change(1)])
    disk.failing_syncs = 1
    with pytest.raises(OSError, match="Input/output"):
        log.append([change(2)])
    assert read(tmp_path) == [(1, plain(change(1)))]
    assert log.append([change(3)]) == 2
    log.close()
    check_reopened(tmp_path, [(1, plain(change(1))), (2, plain(change(3)))])


@pytest.mark.parametrize("fails", ["failing_truncates", "failing_syncs"])
def test_where_an_append_cannot_be_taken_back_no_other_is_taken_until_the_log_is_opened_again(
    tmp_path: Path, disk: Disk, fails: str
) -> None:
    log = opened(tmp_path)
    log.append([change(1)])
    disk.room = 5
    setattr(disk, fails, 1)
    with pytest.raises(OSError, match="No space left"):
        log.append([change(2)])
    disk.room = None
    for _ in range(2):
        with pytest.raises(OSError, match="takes no writes since an earlier one failed"):
            log.append([change(3)])
    log.roll()
    with pytest.raises(OSError, match="takes no writes"):
        log.append([change(3)])
    log.close()
    check_reopened(tmp_path, [(1, plain(change(1)))])


def test_nothing_that_was_refused_is_written_when_the_log_is_closed(tmp_path: Path, disk: Disk) -> None:
    log = opened(tmp_path)
    log.append([change(1)])
    disk.room, disk.failing_truncates = 100, 1
    with pytest.raises(OSError, match="No space left"):
        log.append([change(2)])
    disk.room = None
    log.close()
    assert read(tmp_path) == [(1, plain(change(1)))]


def test_a_new_file_whose_name_is_not_on_the_disk_takes_no_change(tmp_path: Path, disk: Disk) -> None:
    """Its name could be lost in a power cut, and every change in it."""
    log = opened(tmp_path)
    for _ in range(2):
        disk.failing_syncs = 1
        with pytest.raises(OSError, match="Input/output"):
            log.append([change(1)])
        assert disk.failing_syncs == 0
        assert read(tmp_path) == []
    assert log.append([change(2)]) == 1
    log.close()
    assert read(tmp_path) == [(1, plain(change(2)))]
