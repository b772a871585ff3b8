"""An answer as it is written: the server-sent events of `/v1/answer`, read line by line."""

import json

from pydantic import ValidationError

from shared.errors import RagError, UpstreamError, error_from_wire
from shared.schemas import AnswerResponse, Document

# What a stream gives, in this order: the documents, pieces of the text where they are certain, the whole response.
StreamEvent = list[Document] | str | AnswerResponse


class EventReader:
    """Takes the lines of a stream as they come. ``ended`` once the response was among them."""

    def __init__(self) -> None:
        self.ended = False
        self._event = ""

    def read(self, line: str) -> StreamEvent | None:
        """The event that this line completes. Raises: RagError: the one that ended the stream."""
        field, _, value = line.partition(": ")
        if field == "event":
            self._event = value
        if field != "data":
            return None
        try:
            return self._parsed(value)
        except (ValueError, KeyError, ValidationError):
            raise UpstreamError("what answers there is not a generator of this version") from None

    def _parsed(self, data: str) -> StreamEvent | None:
        match self._event:
            case "documents":
                return [Document.model_validate(document) for document in json.loads(data)["documents"]]
            case "token":
                return str(json.loads(data)["text"])
            case "answer":
                self.ended = True
                return AnswerResponse.model_validate_json(data)
            case "error":
                raise error_from_wire(RagError.status, json.loads(data))
            case _:
                return None  # of a later version
