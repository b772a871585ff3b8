"""Fields of OpenAI's that cannot be honoured: taken where they ask for nothing, otherwise refused by name.

Clients send many of them with the value that changes nothing (``frequency_penalty=0``, ``tools=[]``); refusing those
would shut them out for no reason.
"""

from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

UNSUPPORTED = "unsupported"  # pydantic's type of such an error


class Only:
    """``Annotated[Any, Only(0, because="…")]``: a field that takes null and the values given, which mean nothing."""

    def __init__(self, *neutral: Any, because: str) -> None:
        self.neutral = (None, *neutral)
        self.because = because

    def __call__(self, value: Any) -> Any:
        if any(_same(value, neutral) for neutral in self.neutral):
            return value
        raise PydanticCustomError(UNSUPPORTED, "cannot be honoured: {because}", {"because": self.because})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.neutral), "description": f"Not supported: {self.because}."}


def _same(value: Any, neutral: Any) -> bool:
    """As JSON has it: ``0`` is ``0.0``, but ``false`` is not ``0``."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)
