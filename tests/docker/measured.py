"""Figures that are printed as a table at the end of the run."""

from typing import NamedTuple


class Figure(NamedTuple):
    name: str
    value: str


FIGURES: list[Figure] = []


def measured(name: str, value: str) -> None:
    FIGURES.append(Figure(name, value))
