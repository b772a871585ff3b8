"""Wording of facts about one element."""

from collections.abc import Mapping

from services.demo.wording.patterns import Wording

FACTS: Mapping[str, Wording] = {
    "symbol": Wording(
        statements=(
            "{n} is a chemical element with the symbol {v}.",
            "Its symbol is {v}.",
            "The chemical symbol of {n} is {v}.",
            "It is written {v}.",
        ),
        questions=(
            "What is the symbol of {n}?",
            "What is the chemical symbol for {n}?",
            "symbol of {n}",
            "Which symbol does {n} have?",
            "How is {n} abbreviated?",
        ),
        held_out=("What symbol stands for {n}?",),
        noun_phrases=(
            "symbol",
            "chemical symbol",
        ),
    ),
    "number": Wording(
        statements=(
            "Its atomic number is {v}.",
            "{n} has atomic number {v}.",
            "The atomic number is {v}.",
            "It has {v} protons.",
        ),
        questions=(
            "What is the atomic number of {n}?",
            "Which atomic number does {n} have?",
            "atomic number of {n}",
            "How many protons does {n} have?",
        ),
        held_out=(),
        noun_phrases=("atomic number",),
    ),
    "mass": Wording(
        statements=(
            "Its atomic mass is {v}.",
            "{n} has an atomic mass of {v}.",
            "The atomic mass is {v}.",
            "The atomic weight is {v}.",
        ),
        questions=(
            "What is the atomic mass of {n}?",
            "What is the atomic weight of {n}?",
            "atomic mass of {n}",
            "How heavy is an atom of {n}?",
        ),
        held_out=(),
        noun_phrases=(
            "atomic mass",
            "atomic weight",
        ),
    ),
    "category": Wording(
        statements=(
            "{n} is classed as {v}.",
            "It belongs to the group called {v}.",
            "Its category is {v}.",
            "It is a {v}.",
        ),
        questions=(
            "What kind of element is {n}?",
            "Which category does {n} belong to?",
            "category of {n}",
            "How is {n} classed?",
        ),
        held_out=(),
        noun_phrases=("category",),
    ),
    "discoverer": Wording(
        statements=(
            "It was discovered by {v}.",
            "{v} discovered {n}.",
            "{n} was first found by {v}.",
            "Its discoverer was {v}.",
        ),
        questions=(
            "Who discovered {n}?",
            "By whom was {n} discovered?",
            "Who was the discoverer of {n}?",
            "Who found {n}?",
            "discoverer of {n}",
        ),
        held_out=(),
        noun_phrases=("discoverer",),
    ),
    "discovery_year": Wording(
        statements=(
            "The discovery year of {n} is {v}.",
            "{n} has the discovery year {v}.",
        ),
        questions=(
            "What is the discovery year of {n}?",
            "Which discovery year does {n} have?",
            "discovery year of {n}",
        ),
        held_out=(),
        noun_phrases=("discovery year",),
    ),
    "discovery_place": Wording(
        statements=(
            "The discovery place of {n} is {v}.",
            "{n} has the discovery place {v}.",
        ),
        questions=(
            "What is the discovery place of {n}?",
            "Which discovery place does {n} have?",
            "discovery place of {n}",
        ),
        held_out=(),
        noun_phrases=("discovery place",),
    ),
    "period": Wording(
        statements=(
            "It is in period {v}.",
            "{n} stands in period {v} of the table.",
        ),
        questions=(
            "Which period is {n} in?",
            "In which period of the table is {n}?",
            "period of {n}",
        ),
        held_out=(),
        noun_phrases=("period",),
    ),
    "group": Wording(
        statements=(
            "The group of {n} is {v}.",
            "{n} has the group {v}.",
        ),
        questions=(
            "What is the group of {n}?",
            "Which group does {n} have?",
            "group of {n}",
        ),
        held_out=(),
        noun_phrases=("group",),
    ),
    "block": Wording(
        statements=(
            "The block of {n} is {v}.",
            "{n} has the block {v}.",
        ),
        questions=(
            "What is the block of {n}?",
            "Which block does {n} have?",
            "block of {n}",
        ),
        held_out=(),
        noun_phrases=("block",),
    ),
    "phase": Wording(
        statements=(
            "At room temperature it is a {v}.",
            "It is a {v} at room temperature.",
            "{n} is normally a {v}.",
        ),
        questions=(
            "Is {n} a solid, a liquid or a gas?",
            "What is the phase of {n} at room temperature?",
            "phase of {n}",
            "What state of matter is {n}?",
        ),
        held_out=(),
        noun_phrases=("phase",),
    ),
    "melting_point": Wording(
        statements=(
            "It melts at {v}.",
            "The melting point is {v}.",
            "{n} melts at {v}.",
            "Its melting point is {v}.",
        ),
        questions=(
            "What is the melting point of {n}?",
            "At what temperature does {n} melt?",
            "melting point of {n}",
            "When does {n} melt?",
        ),
        held_out=(),
        noun_phrases=("melting point",),
    ),
    "boiling_point": Wording(
        statements=(
            "It boils at {v}.",
            "The boiling point is {v}.",
            "{n} boils at {v}.",
            "Its boiling point is {v}.",
        ),
        questions=(
            "What is the boiling point of {n}?",
            "At what temperature does {n} boil?",
            "boiling point of {n}",
            "When does {n} boil?",
        ),
        held_out=(),
        noun_phrases=("boiling point",),
    ),
    "density": Wording(
        statements=(
            "Its density is {v}.",
            "{n} has a density of {v}.",
            "The density is {v}.",
        ),
        questions=(
            "What is the density of {n}?",
            "How dense is {n}?",
            "density of {n}",
        ),
        held_out=(),
        noun_phrases=("density",),
    ),
    "electronegativity": Wording(
        statements=(
            "Its electronegativity is {v}.",
            "{n} has an electronegativity of {v}.",
        ),
        questions=(
            "What is the electronegativity of {n}?",
            "electronegativity of {n}",
            "Which electronegativity does {n} have?",
        ),
        held_out=(),
        noun_phrases=("electronegativity",),
    ),
}
