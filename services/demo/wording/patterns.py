"""The shape of one fact's wording."""

from dataclasses import dataclass

NAME = "{n}"


@dataclass(frozen=True)
class Wording:
    """Every way in which one fact is stated and asked for."""

    statements: tuple[str, ...]
    """Sentences with `{v}`; those with `{n}` can open a passage."""
    questions: tuple[str, ...]
    """Paraphrases that the models are trained on."""
    held_out: tuple[str, ...] = ()
    """Paraphrases that they never see in training."""
    noun_phrases: tuple[str, ...] = ()
    """What the fact is called; fills generic frames such as `Tell me the {p} of {n}.`"""
