"""Which questions share a lane, and the lanes that are kept for the next questions of their form.

What fits no lane takes the ordinary way, :func:`generator_svc.engine.decoding.step`: sampling, whose draws depend on
the rows that are left, and what would take too much room.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from generator_svc.engine.backend import Task
from generator_svc.engine.lane import Form, Lane, LaneDecoding
from generator_svc.engine.options import HONOURED
from generator_svc.engine.search import BeamSearch, RowSearch

if TYPE_CHECKING:
    from generator_svc.engine.decoder import Bart

MOST_DOCUMENTS, MOST_NODES = 512, 2048  # of a lane, and of a document's tree
MOST_USED = 64  # at once
MOST_PADDING = 4  # places for a token of a context: what the scheduler counts bounds what the lanes hold
MOST_IDLE, IDLE_BYTES = 16, 512 * 2**20  # kept for questions to come, and what their caches may hold

MakeSearch = Callable[[Task, int], BeamSearch | RowSearch]
"""(a question, how many problems) → a search for such questions."""


def form_of(task: Task) -> Form | None:
    """None where a question must go the ordinary way."""
    config = task.config
    if config.do_sample or task.nodes > MOST_NODES:
        return None
    brings_own = task.prefix_allowed_tokens is not None or task.processors or task.stopping or config.max_time
    return Form(
        strategy=task.strategy,
        documents=len(task.contexts),
        rows=int(config.num_beams or 1),
        length=int(config.max_length or 0),
        rules=tuple(repr(getattr(config, name, None)) for name in sorted(HONOURED)),
        own=id(task) if brings_own else 0,
    )


def room_for(questions: int) -> int:
    """Of a lane for so many: few sizes, and at most a quarter for nothing."""
    step = 1 << max(0, (questions - 1).bit_length() - 3)
    return -(-questions // step) * step


class Lanes:
    """The lanes of one generator.

    Args:
        capture: as for :class:`~generator_svc.engine.lane.Lane`.
    """

    def __init__(self, bart: "Bart", make_search: MakeSearch, *, capture: bool) -> None:
        self._bart, self._make_search, self._capture = bart, make_search, capture
        self._idle: list[Lane] = []
        self._used = 0

    def begin(self, tasks: Sequence[Task]) -> list[LaneDecoding | None]:
        """The decodings of these questions, whose documents are yet to be encoded; None for the ordinary way."""
        together: dict[Form, list[int]] = {}
        for at, task in enumerate(tasks):
            if (form := form_of(task)) is not None:
                together.setdefault(form, []).append(at)
        found: list[LaneDecoding | None] = [None] * len(tasks)
        for form, members in together.items():
            most = max(1, MOST_DOCUMENTS // form.documents)
            for start in range(0, len(members), most):
                if self._used == MOST_USED:
                    return found
                part = members[start : start + most]
                lengths = [len(context) for at in part for context in tasks[at].contexts]
                if len(lengths) * max(lengths) > MOST_PADDING * sum(lengths):
                    continue
                for at, decoding in zip(part, self._begin(form, [tasks[at] for at in part]), strict=True):
                    found[at] = decoding
        return found

    def _begin(self, form: Form, tasks: Sequence[Task]) -> list[LaneDecoding]:
        longest = max(len(context) for task in tasks for context in task.contexts)
        questions, source = room_for(len(tasks)), -(-longest // 64) * 64
        size = (form, questions, source)
        lane = next((lane for lane in self._idle if (lane.form, lane.questions, lane.source) == size), None)
        if lane is None:
            self._make_room(questions * form.documents * source * self._bart.source_bytes)
            lane = Lane(self._bart, *size, partial(self._make_search, tasks[0]), capture=self._capture)
        else:
            self._idle.remove(lane)
        decodings = lane.begin(tasks)
        self._used += 1
        # whoever holds a document holds its group
        weakref.finalize(decodings[0].caches[0].group, self._release, lane).atexit = False
        return decodings

    def _release(self, lane: Lane) -> None:
        self._used -= 1
        if not lane.form.own:
            self._make_room(lane.bytes)
            self._idle.append(lane)

    def _make_room(self, wanted: int) -> None:
        """Gives up those that have waited longest, so that one with so many bytes is no more than are kept."""
        while self._idle and (
            len(self._idle) >= MOST_IDLE or wanted + sum(lane.bytes for lane in self._idle) > IDLE_BYTES
        ):
            del self._idle[0]
