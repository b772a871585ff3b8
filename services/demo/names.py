"""Invented names that look like real ones."""

import random
from collections import defaultdict
from collections.abc import Sequence

MIN_LENGTH, MAX_LENGTH = 3, 24  # characters


class MarkovNames:
    """Letter chains of a given order, learnt from real names."""

    def __init__(self, names: Sequence[str], order: int) -> None:
        """Count which letter follows each run of `order` letters."""
        self._order = order
        self._next: dict[str, list[str]] = defaultdict(list)
        for name in names:
            padded = "^" * order + name + "$"
            for i in range(len(name) + 1):
                self._next[padded[i : i + order]].append(padded[i + order])

    def sample(self, rng: random.Random) -> str:
        """A name of 3 to 24 characters, without a comma; now and then it is a real one."""
        while True:
            state, name = "^" * self._order, ""
            while (char := rng.choice(self._next[state])) != "$" and len(name) <= MAX_LENGTH:
                name += char
                state = (state + char)[-self._order :]
            if MIN_LENGTH <= len(name) <= MAX_LENGTH and "," not in name:
                return name[0].upper() + name[1:]
