"""`make bench-engine` where the machine has too little memory for transformers: it says so and goes on."""

import os
import signal

import pytest

from benchmarks.engine import measured_cell, row_of, table_of
from benchmarks.sides import Cell, KilledError, Setup, started


def test_a_rival_that_is_killed_costs_its_cell_and_no_other() -> None:
    cell, common = Cell("token", batch=1, beams=2), ("tiny", "float32", "cpu", 1)
    with started(Setup("transformers", *common)) as rival, started(Setup("ours", *common)) as engine:
        os.kill(rival.pid, signal.SIGKILL)
        theirs, ours = measured_cell(rival, engine, cell, repeats=1)
        assert theirs is None
        killed = row_of("tiny", "float32", cell, theirs=theirs, ours=ours, float32=None)
        theirs, ours = measured_cell(rival, engine, cell, repeats=1)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(KilledError, match="ours ended with exit code -9"):
            measured_cell(rival, engine, cell, repeats=1)
    assert theirs is not None
    assert theirs.sequences == ours.sequences
    measured = row_of("tiny", "float32", cell, theirs=theirs, ours=ours, float32=theirs)
    assert (killed.transformers_s, killed.ratio, killed.ours_s > 0) == (None, None, True)
    assert (measured.transformers_equal, measured.ours_equal) == (1.0, 1.0)
    assert next(iter(table_of([killed, measured]).columns[5].cells)) == "killed"
