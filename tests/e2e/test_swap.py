"""An alias moves, and generations take over, under load: `make swap` sends more."""

from pathlib import Path

import pytest

from tests.swap import SWAPS, run

pytestmark = pytest.mark.slow


def test_no_answer_fails_or_mixes_while_an_alias_moves_or_a_generation_takes_over(tmp_path: Path) -> None:
    phases = run(tmp_path, 300)
    assert [phase.faults for phase in phases.values()] == [[], [], []]
    assert [phase.done for phase in phases.values()] == [0, SWAPS, 2]
    assert phases["while the alias moves"].seen == {"one", "other"}
