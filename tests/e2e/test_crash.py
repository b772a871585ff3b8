"""A retriever that is killed while it is written to loses nothing that it acknowledged. `make crash` does more."""

from pathlib import Path

import pytest

from tests.crash import crashes

pytestmark = pytest.mark.slow


def test_no_kill_loses_an_acknowledged_write_or_leaves_half_of_one(tmp_path: Path) -> None:
    with crashes(tmp_path, seed=0) as running:
        for what in ("all", "build", "service", "foreground", "all", "service"):
            running.kill(what)
        running.finish()
        assert running.killed.total() == 6
        assert running.acknowledged > 100
