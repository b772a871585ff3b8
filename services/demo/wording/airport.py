"""Wording of facts about one airport."""

from collections.abc import Mapping

from services.demo.wording.patterns import Wording

FACTS: Mapping[str, Wording] = {
    "iata": Wording(
        statements=(
            "Its IATA code is {v}.",
            "The IATA code of {n} is {v}.",
            "Travellers know it by the code {v}.",
            "It has the code {v}.",
        ),
        questions=(
            "What is the IATA code of {n}?",
            "What is the airport code of {n}?",
            "Which code does {n} have?",
            "code of {n}",
            "iata code of {n}",
        ),
        held_out=(),
        noun_phrases=(
            "IATA code",
            "airport code",
            "code",
            "iata code",
        ),
    ),
    "city": Wording(
        statements=(
            "{n} serves {v}.",
            "It serves the city of {v}.",
            "The airport is in {v}.",
            "It is the airport of {v}.",
        ),
        questions=(
            "Which city does {n} serve?",
            "In which city is {n}?",
            "What city is {n} in?",
            "Which city is served by {n}?",
            "city of {n}",
        ),
        held_out=(),
        noun_phrases=("city",),
    ),
    "country": Wording(
        statements=(
            "{n} is an airport in {v}.",
            "It is located in {v}.",
            "The airport lies in {v}.",
            "It belongs to {v}.",
        ),
        questions=(
            "Which country is {n} in?",
            "In what country is {n}?",
            "Where is {n}?",
            "country of {n}",
            "Where is {n} located?",
        ),
        held_out=(),
        noun_phrases=("country",),
    ),
    "elevation": Wording(
        statements=(
            "Its elevation is {v}.",
            "It lies {v} above sea level.",
            "The runway is at {v}.",
            "It sits at an elevation of {v}.",
        ),
        questions=(
            "What is the elevation of {n}?",
            "How high is {n}?",
            "How far above sea level is {n}?",
            "elevation of {n}",
        ),
        held_out=(),
        noun_phrases=("elevation",),
    ),
    "icao": Wording(
        statements=(
            "Its ICAO code is {v}.",
            "The ICAO code is {v}.",
        ),
        questions=(
            "What is the ICAO code of {n}?",
            "icao code of {n}",
            "Which ICAO code does {n} have?",
        ),
        held_out=(),
        noun_phrases=(
            "ICAO code",
            "icao code",
        ),
    ),
    "timezone": Wording(
        statements=(
            "It is in the {v} time zone.",
            "The time zone is {v}.",
        ),
        questions=(
            "What time zone is {n} in?",
            "Which time zone does {n} use?",
            "timezone of {n}",
        ),
        held_out=(),
        noun_phrases=("timezone",),
    ),
}
