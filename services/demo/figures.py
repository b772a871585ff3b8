"""Figures, codes and positions drawn at random in the form of real ones."""

import random
import re
import string
from collections.abc import Callable, Mapping


def _count(rng: random.Random, real: str) -> str:
    digits = rng.choice((3, 4, 5, 6, 7, 8))
    number = f"{rng.randint(10 ** (digits - 1), 10**digits - 1):,}"
    return re.sub(r"^[\d,]+", number, real)


def _amount(rng: random.Random, real: str) -> str:
    number = f"{rng.uniform(0.1, 10 ** rng.randint(1, 4)):,.{rng.randint(0, 4)}f}"
    return re.sub(r"^-?[\d.,]+", ("-" if real.startswith("-") else "") + number, real)


def _digits(rng: random.Random, real: str) -> str:
    return re.sub(r"\d", lambda _: rng.choice(string.digits), real)


def _letters(rng: random.Random, real: str) -> str:
    drawn = re.sub("[A-Z]", lambda _: rng.choice(string.ascii_uppercase), real)
    return re.sub("[a-z]", lambda _: rng.choice(string.ascii_lowercase), drawn)


def _small(rng: random.Random, _real: str) -> str:
    return str(rng.randint(1, 150))


def _year(rng: random.Random, _real: str) -> str:
    return str(rng.randint(1600, 2029))


FIGURES: Mapping[str, Callable[[random.Random, str], str]] = {
    **dict.fromkeys(
        (
            "population",
            "area",
            "population_density",
            "capital_population",
            "largest_city_population",
            "second_city_population",
            "elevation",
        ),
        _count,
    ),
    **dict.fromkeys(("mass", "melting_point", "boiling_point", "density", "electronegativity"), _amount),
    **dict.fromkeys(("coordinates", "capital_coordinates", "calling_code", "iso_number"), _digits),
    **dict.fromkeys(("iata", "icao", "iso2", "iso3", "currency_code", "tld", "symbol"), _letters),
    "discovery_year": _year,
    **dict.fromkeys(("number", "neighbour_count", "period", "group"), _small),
}
"""By fact: draws a value like the real one that it is given."""
