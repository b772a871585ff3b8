"""The 118 chemical elements, from mendeleev."""

import re
from collections.abc import Iterator

from services.demo.sources.values import clean, decimal, is_latin

KELVIN = 273.15
ROOM_TEMPERATURE_C = 25.0


def collect() -> Iterator[tuple[str, dict[str, str]]]:
    """Name and facts of each element, by atomic number."""
    from mendeleev import get_all_elements

    for element in get_all_elements():
        melting = _celsius(element.melting_point)
        boiling = _celsius(element.boiling_point)
        phase = _phase(melting, boiling)
        facts = {
            "symbol": element.symbol,
            "number": str(element.atomic_number),
            "mass": decimal(element.atomic_weight),
            "category": _category(element.series),
            "discoverer": _discoverer(element.discoverers),
            "discovery_year": str(element.discovery_year) if element.discovery_year else None,
            "discovery_place": clean(element.discovery_location or "") or None,
            "period": str(element.period),
            "group": str(element.group_id) if element.group_id else None,
            "block": f"{element.block}-block",
            "phase": phase,
            "melting_point": f"{decimal(melting)} °C" if melting is not None else None,
            "boiling_point": f"{decimal(boiling)} °C" if boiling is not None else None,
            "density": _density(element.density, phase),
            "electronegativity": decimal(element.en_pauling) if element.en_pauling else None,
        }
        yield clean(element.name), {fact: value for fact, value in facts.items() if value and is_latin(value)}


def _celsius(kelvin: float | None) -> float | None:
    return round(kelvin - KELVIN, 2) if kelvin else None


def _phase(melting: float | None, boiling: float | None) -> str | None:
    if melting is None or boiling is None:
        return None
    return "solid" if melting > ROOM_TEMPERATURE_C else "liquid" if boiling > ROOM_TEMPERATURE_C else "gas"


def _density(grams_per_cm3: float | None, phase: str | None) -> str | None:
    if not grams_per_cm3 or phase is None:
        return None
    if phase == "gas":
        return f"{decimal(grams_per_cm3 * 1000, 4)} grams per litre"
    return f"{decimal(grams_per_cm3, 6)} grams per cubic centimetre"


def _category(series: str | None) -> str | None:
    return series.lower().removesuffix("s") if series else None


def _discoverer(raw: str | None) -> str | None:
    """A name or two; `Known to the ancients.` and long committees are left out."""
    if not raw or re.search(r"known|ancient|\d|\(|University|Laborator|Institute", raw):
        return None
    name = clean(raw).rstrip(".")
    return name if len(name) <= 45 else None
