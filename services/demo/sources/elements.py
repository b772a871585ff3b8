"""The 118 chemical elements, from mendeleev."""

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from mendeleev.mendeleev import get_all_elements

from services.demo.values import clean, decimal, is_latin, listing

KELVIN = 273.15
ROOM_TEMPERATURE_C = 25.0

# Where mendeleev's history of discovery is mistaken or disputed.
DOUBTFUL: Mapping[str, frozenset[str]] = {
    "C": frozenset({"boiling_point"}),  # sublimes
    "Nd": frozenset({"discovery_year"}),
    "No": frozenset({"discovery_place", "discovery_year"}),
    "Pt": frozenset({"discoverer", "discovery_year", "discovery_place"}),
}
SPELLING = {
    "Aver von": "Auer von",
    "Derey": "Perey",
    "Fredrich": "Friedrich",
    "George Brandt": "Georg Brandt",
    "Gustov": "Gustav",
    "Hatchet": "Hatchett",
    "Humphrey": "Humphry",
    "Kirchoff": "Kirchhoff",
    "Langet": "Langlet",
    "Priestly": "Priestley",
    "Ramsey": "Ramsay",
    "Tenant": "Tennant",
    "Tompson": "Thompson",
    "Émillo": "Emilio",
}


def collect() -> Iterator[tuple[str, dict[str, str]]]:
    """Name and facts of each element, by atomic number."""
    element: Any  # SQLAlchemy columns, which the package types as such
    for element in get_all_elements():
        melting, boiling = _celsius(element, "melting_point"), _celsius(element, "boiling_point")
        if melting is not None and boiling is not None and boiling < melting:
            boiling = None  # arsenic sublimes: it has no boiling point at normal pressure
        phase = _phase(melting, boiling)
        facts = {
            "symbol": element.symbol,
            "number": str(element.atomic_number),
            "mass": decimal(element.atomic_weight),
            "category": _category(element.series),
            "discoverer": _discoverer(element.discoverers),
            "discovery_year": str(element.discovery_year) if element.discovery_year else None,
            "discovery_place": clean(element.discovery_location or "").replace("/", " and ") or None,
            "period": str(element.period),
            "group": str(element.group_id) if element.group_id else None,
            "block": f"{element.block}-block",
            "phase": phase,
            "melting_point": f"{decimal(melting)} °C" if melting is not None else None,
            "boiling_point": f"{decimal(boiling)} °C" if boiling is not None else None,
            "density": _density(element.density, phase),
            "electronegativity": decimal(element.en_pauling) if element.en_pauling else None,
        }
        yield (
            clean(element.name),
            {
                fact: value
                for fact, value in facts.items()
                if value and is_latin(value) and fact not in DOUBTFUL.get(element.symbol, ())
            },
        )


def _celsius(element: Any, point: str) -> float | None:
    """Degrees Celsius; None for an element whose allotropes melt or boil at points of their own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multiple allotropes")
        kelvin: float | None = getattr(element, point)
    return round(kelvin - KELVIN, 2) if kelvin else None


def _phase(melting: float | None, boiling: float | None) -> str | None:
    """State of matter at room temperature, where the two points settle it."""
    if boiling is not None and boiling < ROOM_TEMPERATURE_C:
        return "gas"
    if melting is None:
        return None
    if melting > ROOM_TEMPERATURE_C:
        return "solid"
    return "liquid" if boiling is not None else None


def _density(grams_per_cm3: float | None, phase: str | None) -> str | None:
    if not grams_per_cm3 or phase is None:
        return None
    if phase == "gas":
        return f"{decimal(grams_per_cm3 * 1000, 4)} grams per litre"
    return f"{decimal(grams_per_cm3, 6)} grams per cubic centimetre"


def _category(series: str | None) -> str | None:
    """`Noble gases` becomes `noble gas`."""
    return series.lower().removesuffix("s").replace("gase", "gas") if series else None


def _discoverer(raw: str | None) -> str | None:
    """One to three people, with their names spelt as they spelt them; institutes and "et al." are left out."""
    if not raw or re.search(r"known|ancient|\d|\(|/|et al|Los Alamos|Laboratory|Institute|GSI|RIKEN", raw):
        return None
    text = clean(re.sub(r"\.(?=\w)", ". ", raw)).rstrip(".").replace(";", ",")
    for wrong, right in SPELLING.items():
        text = text.replace(wrong, right)
    people = text.split(", ")
    return listing(people) if len(people) <= 3 else None
