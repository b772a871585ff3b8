"""Airports that travellers know, from airportsdata."""

import re
from collections.abc import Iterator

import airportsdata

from services.demo.facts import fold
from services.demo.sources.countries import World
from services.demo.values import clean, integer, is_latin

MAX_NAME = 50  # characters
MIN_CITY = 700_000  # people: beside "… International Airport", any airport of a city of this size counts
NO_AIRPORT = re.compile(r"heli|seaplane|base|railway|bus|station|airfield|field$|airpark|strip", re.IGNORECASE)

NOTE = re.compile(r"\(.*?\)|/")


def collect(world: World) -> Iterator[tuple[str, dict[str, str]]]:
    """Name and facts, by IATA code. The city leads the name: `Paris Charles de Gaulle International Airport`."""
    large = {
        (code, fold(city["name"]))
        for code, cities in world.cities.items()
        for city in cities
        if city["population"] >= MIN_CITY
    }
    taken: set[str] = set()
    for iata, airport in sorted(airportsdata.load("IATA").items()):
        code, city = airport["country"], clean(re.split("[/(]", airport["city"])[0])
        name = clean(NOTE.sub(" ", airport["name"]))
        known = "International" in name or ((code, fold(city)) in large and "Airport" in name)
        if not known or not city or code not in world.names or NO_AIRPORT.search(name):
            continue
        if not set(fold(city).split()) & set(re.findall(r"\w+", fold(name))):
            name = f"{city} {name}"
        if "Airport" not in name or fold(name) in taken or len(name) > MAX_NAME:
            continue
        taken.add(fold(name))
        facts = {
            "iata": iata,
            "city": city,
            "country": world.names[code],
            "elevation": f"{integer(airport['elevation'])} feet" if airport["elevation"] else "",
            "icao": airport["icao"],
            "timezone": airport["tz"].replace("_", " "),
        }
        if is_latin(name) and is_latin(city):
            yield name, {fact: value for fact, value in facts.items() if value and is_latin(value)}
