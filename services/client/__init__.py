"""The two services from Python: typed results, numpy arrays, and the error classes of :mod:`shared.errors`.

    from services.client import RagClient

    with RagClient("http://127.0.0.1:8000") as rag:
        result = rag.answer("How many people live in Paris?").results[0]
        print(result.answers[0].text, result.answers[0].probability)

:class:`AsyncRagClient` is the same with ``async with`` and ``await``.
"""

from services.client.calls import Unreachable
from services.client.clients import AsyncRagClient, RagClient
from services.client.events import StreamEvent

__all__ = ["AsyncRagClient", "RagClient", "StreamEvent", "Unreachable"]
