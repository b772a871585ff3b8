"""Wording of facts about one country."""

from collections.abc import Mapping

from services.demo.wording.patterns import Wording

FACTS: Mapping[str, Wording] = {
    "continent": Wording(
        statements=(
            "{n} is a country in {v}.",
            "It lies in {v}.",
            "It belongs to the continent of {v}.",
            "{n} is on the continent of {v}.",
        ),
        questions=(
            "Which continent is {n} on?",
            "On what continent is {n}?",
            "What continent is {n} in?",
            "continent of {n}",
            "Which continent does {n} belong to?",
        ),
        held_out=(),
        noun_phrases=("continent",),
    ),
    "capital": Wording(
        statements=(
            "The capital of {n} is {v}.",
            "Its capital is {v}.",
            "{v} is the capital of {n}.",
            "Its capital city is {v}.",
            "The seat of government is {v}.",
            "The capital city of {n} is {v}.",
        ),
        questions=(
            "What is the capital of {n}?",
            "Which city is the capital of {n}?",
            "capital of {n}",
            "What's the capital city of {n}?",
            "Name the capital of {n}.",
            "{n} has which capital?",
            "What is the name of the capital of {n}?",
        ),
        held_out=("Which is the capital city of {n}?",),
        noun_phrases=(
            "capital",
            "capital city",
            "name of the capital",
        ),
    ),
    "capital_population": Wording(
        statements=(
            "The capital population of {n} is {v}.",
            "{n} has the capital population {v}.",
        ),
        questions=(
            "What is the capital population of {n}?",
            "Which capital population does {n} have?",
            "capital population of {n}",
        ),
        held_out=(),
        noun_phrases=("capital population",),
    ),
    "capital_coordinates": Wording(
        statements=(
            "The capital coordinates of {n} is {v}.",
            "{n} has the capital coordinates {v}.",
        ),
        questions=(
            "What is the capital coordinates of {n}?",
            "Which capital coordinates does {n} have?",
            "capital coordinates of {n}",
        ),
        held_out=(),
        noun_phrases=("capital coordinates",),
    ),
    "capital_timezone": Wording(
        statements=(
            "The capital timezone of {n} is {v}.",
            "{n} has the capital timezone {v}.",
        ),
        questions=(
            "What is the capital timezone of {n}?",
            "Which capital timezone does {n} have?",
            "capital timezone of {n}",
        ),
        held_out=(),
        noun_phrases=("capital timezone",),
    ),
    "population": Wording(
        statements=(
            "{n} has a population of {v}.",
            "The population of {n} is {v}.",
            "About {v} people live in {n}.",
            "It has {v} inhabitants.",
            "{n} is home to {v} people.",
            "Its population is {v}.",
        ),
        questions=(
            "How many people live in {n}?",
            "What is the population of {n}?",
            "How many inhabitants does {n} have?",
            "How big is the population of {n}?",
            "What's the population of {n}?",
            "population of {n}",
            "{n} population",
            "How many residents does {n} have?",
            "Tell me the population of {n}.",
        ),
        held_out=("How populous is {n}?",),
        noun_phrases=("population",),
    ),
    "area": Wording(
        statements=(
            "It covers {v}.",
            "{n} has an area of {v}.",
            "Its area is {v}.",
            "The total area is {v}.",
        ),
        questions=(
            "What is the area of {n}?",
            "How large is {n}?",
            "How big is {n}?",
            "area of {n}",
            "What's the total area of {n}?",
        ),
        held_out=("How much land does {n} cover?",),
        noun_phrases=(
            "area",
            "total area",
        ),
    ),
    "density": Wording(
        statements=(
            "The density of {n} is {v}.",
            "{n} has the density {v}.",
        ),
        questions=(
            "What is the density of {n}?",
            "Which density does {n} have?",
            "density of {n}",
        ),
        held_out=(),
        noun_phrases=("density",),
    ),
    "currency": Wording(
        statements=(
            "The currency is the {v}.",
            "{n} uses the {v}.",
            "Its currency is the {v}.",
            "People pay with the {v}.",
        ),
        questions=(
            "What currency is used in {n}?",
            "What is the currency of {n}?",
            "Which currency does {n} use?",
            "What money is used in {n}?",
            "currency of {n}",
        ),
        held_out=("How do people pay in {n}?",),
        noun_phrases=("currency",),
    ),
    "currency_code": Wording(
        statements=(
            "The currency code is {v}.",
            "Its currency is abbreviated {v}.",
            "The ISO code of its currency is {v}.",
        ),
        questions=(
            "What is the currency code of {n}?",
            "What is the ISO code of the currency of {n}?",
            "How is the currency of {n} abbreviated?",
            "currency code of {n}",
        ),
        held_out=(),
        noun_phrases=(
            "currency code",
            "ISO code of the currency",
        ),
    ),
    "currency_symbol": Wording(
        statements=(
            "The currency symbol of {n} is {v}.",
            "{n} has the currency symbol {v}.",
        ),
        questions=(
            "What is the currency symbol of {n}?",
            "Which currency symbol does {n} have?",
            "currency symbol of {n}",
        ),
        held_out=(),
        noun_phrases=("currency symbol",),
    ),
    "language": Wording(
        statements=(
            "The main language is {v}.",
            "People speak {v}.",
            "The language of {n} is {v}.",
            "{v} is the main language.",
        ),
        questions=(
            "What language is spoken in {n}?",
            "Which language do people speak in {n}?",
            "What is the main language of {n}?",
            "language of {n}",
            "What do people speak in {n}?",
        ),
        held_out=("What is the official language of {n}?",),
        noun_phrases=(
            "main language",
            "language",
        ),
    ),
    "subregion": Wording(
        statements=(
            "The subregion of {n} is {v}.",
            "{n} has the subregion {v}.",
        ),
        questions=(
            "What is the subregion of {n}?",
            "Which subregion does {n} have?",
            "subregion of {n}",
        ),
        held_out=(),
        noun_phrases=("subregion",),
    ),
    "demonym": Wording(
        statements=(
            "Its people are called {v}.",
            "Things from {n} are called {v}.",
            "The adjective for the country is {v}.",
        ),
        questions=(
            "What are people from {n} called?",
            "What is the adjective for {n}?",
            "What do you call people from {n}?",
            "demonym of {n}",
        ),
        held_out=(),
        noun_phrases=(
            "adjective",
            "demonym",
        ),
    ),
    "neighbours": Wording(
        statements=(
            "It borders {v}.",
            "{n} borders {v}.",
            "Its neighbours are {v}.",
            "It shares borders with {v}.",
        ),
        questions=(
            "Which countries border {n}?",
            "What are the neighbours of {n}?",
            "What countries does {n} border?",
            "neighbours of {n}",
            "Which countries share a border with {n}?",
        ),
        held_out=("Who are the neighbours of {n}?",),
        noun_phrases=("neighbours",),
    ),
    "neighbour_count": Wording(
        statements=(
            "The neighbour count of {n} is {v}.",
            "{n} has the neighbour count {v}.",
        ),
        questions=(
            "What is the neighbour count of {n}?",
            "Which neighbour count does {n} have?",
            "neighbour count of {n}",
        ),
        held_out=(),
        noun_phrases=("neighbour count",),
    ),
    "calling_code": Wording(
        statements=(
            "The calling code is {v}.",
            "Its dialling code is {v}.",
            "Phone numbers begin with {v}.",
            "The telephone code of {n} is {v}.",
        ),
        questions=(
            "What is the calling code of {n}?",
            "Which phone code does {n} have?",
            "What is the dialling code for {n}?",
            "How do phone numbers in {n} begin?",
            "phone code of {n}",
        ),
        held_out=("What's the telephone code of {n}?",),
        noun_phrases=(
            "calling code",
            "dialling code",
            "phone code",
        ),
    ),
    "tld": Wording(
        statements=(
            "The internet domain is {v}.",
            "Its internet domain is {v}.",
            "Websites use the domain {v}.",
            "The top-level domain of {n} is {v}.",
        ),
        questions=(
            "What is the internet domain of {n}?",
            "What is the top-level domain of {n}?",
            "Which domain do websites in {n} use?",
            "tld of {n}",
            "What internet country code does {n} use?",
        ),
        held_out=(),
        noun_phrases=(
            "internet domain",
            "top-level domain",
            "tld",
        ),
    ),
    "iso2": Wording(
        statements=(
            "The iso2 of {n} is {v}.",
            "{n} has the iso2 {v}.",
        ),
        questions=(
            "What is the iso2 of {n}?",
            "Which iso2 does {n} have?",
            "iso2 of {n}",
        ),
        held_out=(),
        noun_phrases=("iso2",),
    ),
    "iso3": Wording(
        statements=(
            "Its ISO code is {v}.",
            "The ISO code of {n} is {v}.",
            "The three-letter code is {v}.",
        ),
        questions=(
            "What is the ISO code of {n}?",
            "What is the three-letter code of {n}?",
            "iso code of {n}",
            "Which ISO code does {n} have?",
        ),
        held_out=(),
        noun_phrases=(
            "ISO code",
            "three-letter code",
            "iso code",
        ),
    ),
    "iso_number": Wording(
        statements=(
            "The iso number of {n} is {v}.",
            "{n} has the iso number {v}.",
        ),
        questions=(
            "What is the iso number of {n}?",
            "Which iso number does {n} have?",
            "iso number of {n}",
        ),
        held_out=(),
        noun_phrases=("iso number",),
    ),
    "largest_city": Wording(
        statements=(
            "The largest city is {v}.",
            "Its largest city is {v}.",
            "{v} is its largest city.",
            "The biggest city of {n} is {v}.",
        ),
        questions=(
            "What is the largest city in {n}?",
            "What is the biggest city of {n}?",
            "Which city in {n} has the most people?",
            "largest city in {n}",
            "Which is the largest city of {n}?",
        ),
        held_out=(),
        noun_phrases=(
            "largest city",
            "biggest city",
        ),
    ),
    "largest_city_population": Wording(
        statements=(
            "The largest city population of {n} is {v}.",
            "{n} has the largest city population {v}.",
        ),
        questions=(
            "What is the largest city population of {n}?",
            "Which largest city population does {n} have?",
            "largest city population of {n}",
        ),
        held_out=(),
        noun_phrases=("largest city population",),
    ),
    "languages": Wording(
        statements=(
            "The languages of {n} is {v}.",
            "{n} has the languages {v}.",
        ),
        questions=(
            "What is the languages of {n}?",
            "Which languages does {n} have?",
            "languages of {n}",
        ),
        held_out=(),
        noun_phrases=("languages",),
    ),
    "second_city": Wording(
        statements=(
            "The second largest city is {v}.",
            "Its second city is {v}.",
            "{v} is the second largest city.",
        ),
        questions=(
            "What is the second largest city in {n}?",
            "Which city is the second biggest in {n}?",
            "second largest city of {n}",
            "What is the second city of {n}?",
        ),
        held_out=(),
        noun_phrases=(
            "second largest city",
            "second city",
        ),
    ),
    "second_city_population": Wording(
        statements=(
            "The second city population of {n} is {v}.",
            "{n} has the second city population {v}.",
        ),
        questions=(
            "What is the second city population of {n}?",
            "Which second city population does {n} have?",
            "second city population of {n}",
        ),
        held_out=(),
        noun_phrases=("second city population",),
    ),
}
