"""Wording of facts about one city."""

from collections.abc import Mapping

from services.demo.wording.patterns import Wording

FACTS: Mapping[str, Wording] = {
    "population": Wording(
        statements=(
            "{n} has a population of {v}.",
            "The population of {n} is {v}.",
            "About {v} people live in {n}.",
            "{n} is home to {v} people.",
            "It has {v} inhabitants.",
            "{v} people live there.",
            "With {v} residents, it is a sizeable town.",
            "Its population is {v}.",
            "The census counts {v} inhabitants.",
        ),
        questions=(
            "How many people live in {n}?",
            "What is the population of {n}?",
            "How many inhabitants does {n} have?",
            "How big is the population of {n}?",
            "What's the population of {n}?",
            "How many residents does {n} have?",
            "population of {n}",
            "{n} population",
            "What number of people live in {n}?",
            "Tell me the population of {n}.",
            "How many people are there in {n}?",
            "How populous is {n}?",
        ),
        held_out=("Give me the number of inhabitants of {n}.",),
        noun_phrases=("population",),
    ),
    "country": Wording(
        statements=(
            "{n} is a city in {v}.",
            "{n} is located in {v}.",
            "{n} lies in {v}.",
            "It is a city in {v}.",
            "It is situated in {v}.",
            "{n} is one of the cities of {v}.",
            "The city belongs to {v}.",
        ),
        questions=(
            "Which country is {n} in?",
            "In what country is {n}?",
            "Where is {n}?",
            "In which country is {n} located?",
            "What country does {n} belong to?",
            "{n} is in which country?",
            "Where is {n} located?",
            "Where can I find the city of {n}?",
            "country of {n}",
            "What country is {n} in?",
        ),
        held_out=("In which country does {n} lie?",),
        noun_phrases=("country",),
    ),
    "continent": Wording(
        statements=(
            "It is on the continent of {v}.",
            "{n} is in {v}.",
            "The city is found in {v}.",
            "Its continent is {v}.",
        ),
        questions=(
            "Which continent is {n} on?",
            "On what continent is {n}?",
            "What continent is {n} in?",
            "On which continent can {n} be found?",
            "continent of {n}",
            "{n} is on which continent?",
        ),
        held_out=("Which continent does {n} belong to?",),
        noun_phrases=("continent",),
    ),
    "timezone": Wording(
        statements=(
            "The time zone is {v}.",
            "It uses the {v} time zone.",
            "Clocks in {n} follow {v}.",
            "Its time zone is {v}.",
            "Local time follows the {v} zone.",
        ),
        questions=(
            "What time zone is {n} in?",
            "Which time zone does {n} use?",
            "What is the time zone of {n}?",
            "timezone of {n}",
            "What timezone does {n} follow?",
            "In which time zone is {n}?",
        ),
        held_out=("Which zone do the clocks in {n} follow?",),
        noun_phrases=(
            "time zone",
            "timezone",
        ),
    ),
    "coordinates": Wording(
        statements=(
            "Its coordinates are {v}.",
            "It lies at {v}.",
            "{n} is located at {v}.",
            "The city sits at {v}.",
        ),
        questions=(
            "What are the coordinates of {n}?",
            "What is the latitude and longitude of {n}?",
            "At which coordinates does {n} lie?",
            "coordinates of {n}",
            "Give the geographic coordinates of {n}.",
        ),
        held_out=("At what coordinates is {n}?",),
        noun_phrases=(
            "latitude and longitude",
            "coordinates",
        ),
    ),
    "currency": Wording(
        statements=(
            "The local currency is the {v}.",
            "People pay with the {v}.",
            "The currency used is the {v}.",
            "Its currency is the {v}.",
        ),
        questions=(
            "What currency is used in {n}?",
            "Which currency do people use in {n}?",
            "What money is used in {n}?",
            "What is the currency of {n}?",
            "currency in {n}",
            "How do people pay in {n}?",
        ),
        held_out=("Which money do I need in {n}?",),
        noun_phrases=("currency",),
    ),
    "rank": Wording(
        statements=(
            "It is the {v} city of the country.",
            "By population it is the {v} city of the country.",
            "{n} is the country's {v} city.",
        ),
        questions=(
            "What rank does {n} have among the cities of its country?",
            "How does {n} rank by size in its country?",
            "How large is {n} compared with other cities of the country?",
        ),
        held_out=(),
        noun_phrases=(),
    ),
    "capital_of": Wording(
        statements=(
            "{n} is the capital of {v}.",
            "It is the capital of {v}.",
            "It serves as the capital of {v}.",
            "The city is the capital of {v}.",
        ),
        questions=(
            "Which country is {n} the capital of?",
            "{n} is the capital of which country?",
            "What country has {n} as its capital?",
            "Of which country is {n} the capital?",
            "Whose capital is {n}?",
        ),
        held_out=(),
        noun_phrases=(),
    ),
    "state": Wording(
        statements=(
            "It is in the state of {v}.",
            "{n} is in the US state of {v}.",
            "The city is part of {v}.",
        ),
        questions=(
            "Which state is {n} in?",
            "In which US state is {n}?",
            "What state is {n} in?",
            "What state does {n} belong to?",
            "{n} is in which state?",
        ),
        held_out=("In what state is {n} located?",),
        noun_phrases=(),
    ),
}
