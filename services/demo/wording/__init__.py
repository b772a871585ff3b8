"""How the demo speaks: statements for passages and paraphrases for questions, one module a kind of entity.

`{n}` stands for the entity's name (or a pronoun, where the name was just given), `{v}` for the fact's value, `{a}`
for the indefinite article that fits the value. The questions in `held_out` are never trained on: they measure how
well the model understands a wording that it has not seen.
"""

from collections.abc import Mapping

from services.demo.facts import Kind
from services.demo.wording import airport, city, country, element
from services.demo.wording.patterns import NAME, Wording

__all__ = ["NAME", "PRONOUNS", "WORDINGS", "Wording"]

WORDINGS: Mapping[Kind, Mapping[str, Wording]] = {
    "city": city.FACTS,
    "country": country.FACTS,
    "element": element.FACTS,
    "airport": airport.FACTS,
}

PRONOUNS: Mapping[Kind, tuple[str, ...]] = {
    "city": ("It", "The city", "The place"),
    "country": ("It", "The country", "The nation"),
    "element": ("It", "The element"),
    "airport": ("It", "The airport"),
}
