"""Whose turn it is."""

from hypothesis import given
from hypothesis import strategies as st

from shared.fair_queue import FairQueue


def filled(*items: str) -> FairQueue[str]:
    """Items named for their clients: a1, a2, b1."""
    queue: FairQueue[str] = FairQueue()
    for item in items:
        queue.push(item, item[0])
    return queue


def served(queue: FairQueue[str]) -> list[str]:
    order = []
    while queue:
        order.append(queue.first)
        queue.take(queue.first)
    return order


def test_one_client_is_served_in_the_order_of_arrival() -> None:
    assert served(filled("a1", "a2", "a3")) == ["a1", "a2", "a3"]


def test_the_first_of_a_client_stands_before_the_second_of_another() -> None:
    assert served(filled("a1", "a2", "a3", "b1", "c1", "b2")) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_who_comes_later_is_not_given_what_was_missed() -> None:
    queue = filled("a1", "a2", "a3", "a4")
    for item in ("a1", "a2"):
        queue.take(item)
    for item in ("b1", "b2"):
        queue.push(item, "b")
    assert served(queue) == ["a3", "b1", "a4", "b2"]


def test_what_costs_more_has_fewer_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2"):
        queue.push(item, "a", cost=3)
    for item in ("b1", "b2", "b3", "b4"):
        queue.push(item, "b", cost=1)
    assert served(queue) == ["b1", "b2", "a1", "b3", "b4", "a2"]


def test_a_full_queue_gives_up_the_last_one_of_who_has_most() -> None:
    queue = filled("b1", "a1", "a2", "a3")
    assert queue.displaces("b", 1)
    assert queue.displaces("c", 1)
    assert not queue.displaces("a", 1)
    assert queue.last == "a3"
    assert queue.ahead("c", 1) == 2


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.1, 10), st.sampled_from(["take", "drop", "keep"]))))
def test_all_come_out_once_each_client_in_its_own_order(arrivals: list[tuple[str, float, str]]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    out: list[tuple[str, int]] = []
    dropped = set()
    for index, (client, cost, then) in enumerate(arrivals):
        queue.push((client, index), client, cost)
        if then == "take":
            out.append(queue.first)
            queue.take(queue.first)
        elif then == "drop":
            dropped.add(queue.last)
            queue.remove(queue.last)
    while queue:
        out.append(queue.first)
        queue.take(queue.first)
    assert sorted([*out, *dropped]) == sorted((client, index) for index, (client, _, _) in enumerate(arrivals))
    for client in "abc":
        own = [index for owner, index in out if owner == client]
        assert own == sorted(own)
