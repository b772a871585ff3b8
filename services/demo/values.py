"""How raw values are written down: one spelling for every number, name and list of the corpus."""

import math
import re
import unicodedata
from collections.abc import Sequence

_LAST_LATIN = 0x250  # end of Latin Extended-B: beyond it the demo's tokenizers have seen nothing
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʻ": "'", "`": "'", "ʼ": "'"})


def clean(text: str) -> str:
    """Composed accents, plain apostrophes, single spaces."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text).translate(_APOSTROPHES)).strip()


def is_latin(text: str) -> bool:
    """Whether every letter is one that the demo's tokenizers know."""
    return all(ord(char) < _LAST_LATIN or char == "€" for char in text)


def integer(value: float) -> str:
    """`2138551` becomes `2,138,551`."""
    return f"{round(value):,}"


def decimal(value: float, digits: int = 6) -> str:
    """At most `digits` significant digits, no exponent, no trailing zeros: `3414.0` becomes `3,414`."""
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{round(value, places):,.{min(places, 8)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def listing(items: Sequence[str]) -> str:
    """`A, B and C`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def coordinates(latitude: float, longitude: float) -> str:
    """Degrees with two places and the hemisphere: `48.85° N, 2.35° E`."""
    north = "N" if latitude >= 0 else "S"
    east = "E" if longitude >= 0 else "W"
    return f"{abs(latitude):.2f}° {north}, {abs(longitude):.2f}° {east}"


def distance_km(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Great-circle distance between two (latitude, longitude) pairs in degrees."""
    lat_a, lon_a, lat_b, lon_b = map(math.radians, (*a, *b))
    chord = math.sin((lat_b - lat_a) / 2) ** 2 + math.cos(lat_a) * math.cos(lat_b) * math.sin((lon_b - lon_a) / 2) ** 2
    return 12742 * math.asin(math.sqrt(chord))
