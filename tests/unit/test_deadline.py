import time

import pytest

from shared.deadline import Deadline
from shared.errors import DeadlineExceeded


def test_a_deadline_counts_from_the_request_and_not_from_the_default() -> None:
    assert 4 < Deadline.after(5_000, default_ms=9_000).remaining_s <= 5
    assert 8 < Deadline.after(None, default_ms=9_000).remaining_s <= 9


def test_a_passed_deadline_names_what_was_to_be_done() -> None:
    deadline = Deadline.after(1, default_ms=1)
    deadline_of_later = Deadline.after(60_000, default_ms=1)
    time.sleep(0.005)
    assert deadline.expired
    assert deadline.remaining_s < 0
    with pytest.raises(DeadlineExceeded, match="before the search could begin"):
        deadline.check("the search could begin")
    deadline_of_later.check("anything")
