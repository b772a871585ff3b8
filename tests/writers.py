"""Concurrent writers over HTTP, and a ledger of what their collection must hold, whatever was killed meanwhile.

An answer names the number of its change, so that acknowledged changes have an order. A change that was sent and not
answered may have been stored or not: it fills a gap in the numbers or it is nowhere. Anything between is a loss.
"""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.arrow import vector_array, write_stream
from shared.retrieval import RetrieveQuery
from shared.vectors import ARROW_TYPE, query_to_wire, result_from_wire
from tests.retriever_data import random_embeddings

LARGEST_UPSERT = 200
ALL = 2048  # documents that one search may return: setting max_n_docs of the service

Stored = tuple[str, str, bytes]
"""Title, text and embedding of a passage."""


class Loss(AssertionError):
    """What was acknowledged is not there, or half of what was not."""


@dataclass
class Write:
    """One request: passages to store, or ids to delete where there are no embeddings. Its tag is in every title."""

    tag: str
    ids: list[int | None]
    embeddings: npt.NDArray[np.float32] | None

    def title(self, row: int) -> str:
        return f"{self.tag}-{row}"

    def text(self, row: int) -> str:
        return f"Row {row} of “{self.tag}”. " * (1 + row % 3)

    def send(self, http: httpx.Client, collection: str, *, arrow: bool) -> Any:
        """What the service answered. Raises: httpx.TransportError: nothing."""
        path = f"/v1/collections/{collection}/passages"
        if self.embeddings is None:
            response = http.post(f"{path}/delete", json={"ids": self.ids})
        elif arrow:
            columns = {
                "id": pa.array(self.ids, pa.int64()),
                "title": pa.array([self.title(row) for row in range(len(self.ids))]),
                "text": pa.array([self.text(row) for row in range(len(self.ids))]),
                "embedding": vector_array(self.embeddings),
            }
            response = http.post(path, content=write_stream(columns, {}), headers={"Content-Type": ARROW_TYPE})
        else:
            passages = [
                {"title": self.title(row), "text": self.text(row), "embedding": embedding}
                | ({} if self.ids[row] is None else {"id": self.ids[row]})
                for row, embedding in enumerate(self.embeddings.tolist())
            ]
            response = http.post(path, json={"passages": passages})
        assert response.is_success, response.text
        return response.json()

    def apply(self, state: dict[int, Stored], dtype: str) -> None:
        if self.embeddings is None:
            for passage_id in self.ids:
                state.pop(passage_id or 0, None)
            return
        stored = self.embeddings.astype(dtype).astype(np.float32)
        for row, passage_id in enumerate(self.ids):
            assert passage_id is not None
            state[passage_id] = (self.title(row), self.text(row), stored[row].tobytes())

    def found_in(self, state: dict[int, Stored]) -> "Write":
        """The same with the ids that it was given, as far as they can be seen; -1 where they cannot."""
        by_title = {stored[0]: passage_id for passage_id, stored in state.items()}
        ids = [by_title.get(self.title(row), -1) if i is None else i for row, i in enumerate(self.ids)]
        return Write(self.tag, list(ids), self.embeddings)


@dataclass
class Ledger:
    """What a collection holds after its first ``version`` changes, and what was asked since."""

    name: str
    dtype: str
    state: dict[int, Stored]
    version: int = 0
    acknowledged: dict[int, Write] = field(default_factory=dict)
    unanswered: list[Write] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def settle(self, version: int, found: dict[int, Stored]) -> tuple[int, int, int]:
        """Compare with what the collection holds now, and go on from there.

        Returns: how many writes were acknowledged, how many without an answer are there, how many are not.
        Raises: Loss.
        """
        last = max(self.acknowledged, default=self.version)
        if version < last:
            raise Loss(f"{self.name}: change {last} was acknowledged, the collection is at {version}")
        gaps = [n for n in range(self.version + 1, version + 1) if n not in self.acknowledged]
        if len(gaps) > len(self.unanswered):
            raise Loss(f"{self.name}: {len(gaps)} changes more than {len(self.unanswered)} without an answer")
        candidates = [write.found_in(found) for write in self.unanswered]
        for chosen in itertools.permutations(candidates, len(gaps)):
            if self._replayed(dict(zip(gaps, chosen, strict=True)), version) == found:
                counts = len(self.acknowledged), len(gaps), len(self.unanswered) - len(gaps)
                self.state, self.version, self.acknowledged, self.unanswered = found, version, {}, []
                return counts
        expected = self._replayed(dict(zip(gaps, candidates, strict=False)), version)
        differ = sorted(i for i in expected.keys() | found.keys() if expected.get(i) != found.get(i))
        raise Loss(
            f"{self.name} at change {version}, without an answer {[write.tag for write in self.unanswered]}: "
            f"{len(differ)} passages differ in any order, such as "
            + "; ".join(f"{i}: {_short(expected.get(i))} is {_short(found.get(i))}" for i in differ[:5])
        )

    def _replayed(self, gaps: dict[int, Write], version: int) -> dict[int, Stored]:
        state, writes = dict(self.state), self.acknowledged | gaps
        for number in range(self.version + 1, version + 1):
            writes[number].apply(state, self.dtype)
        return state


def _short(stored: Stored | None) -> str:
    return "absent" if stored is None else repr(stored[0])


def read_all(http: httpx.Client, name: str, dimension: int) -> tuple[int, dict[int, Stored]]:
    """The last change of a collection and all that it holds, by one search for everything.

    Raises: Loss: the service contradicts itself.
    """
    info = http.get(f"/v1/collections/{name}").raise_for_status().json()
    if not info["count"]:
        return info["version"], {}
    query = RetrieveQuery(np.ones((1, dimension), np.float32), n_docs=ALL, collection=name)
    body, content_type = query_to_wire(query, "arrow")
    response = http.post("/v1/retrieve", content=body, headers={"Content-Type": content_type, "Accept": ARROW_TYPE})
    result = result_from_wire(response.raise_for_status().content, response.headers["content-type"])
    assert result.docs is not None
    assert result.doc_embeds is not None
    rows = zip(result.docs[0], result.doc_embeds[0], strict=True)
    state = {passage.id: (passage.title, passage.text, embedding.tobytes()) for passage, embedding in rows}
    assert info["count"] <= ALL, "more than one search returns"
    if not len(state) == len(result.doc_ids[0]) == info["count"]:
        raise Loss(f"{name} counts {info['count']} passages, a search for all finds {len(result.doc_ids[0])}")
    return info["version"], state


class Writers:
    """Threads that write to all collections at once until they are stopped or the service is gone."""

    def __init__(self, url: str, ledgers: Sequence[Ledger], *, n: int, n_ids: int, dimension: int, tag: str) -> None:
        self._url, self._ledgers, self._n_ids, self._dimension = url, ledgers, n_ids, dimension
        self._stopping = threading.Event()
        self.failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(f"{tag}w{i}",)) for i in range(n)]

    def start(self) -> "Writers":
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Once every request under way is answered, or cannot be. Raises: what a writer raised."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        if self.failures:
            raise self.failures[0]

    def _run(self, name: str) -> None:
        dice = np.random.default_rng(list(name.encode()))
        try:
            with httpx.Client(base_url=self._url, timeout=120) as http:
                for number in itertools.count():
                    if self._stopping.is_set() or not self._write(http, dice, f"{name}-{number}"):
                        return
        except BaseException as error:  # noqa: BLE001  raised again by who stops them
            self.failures.append(error)

    def _write(self, http: httpx.Client, dice: np.random.Generator, tag: str) -> bool:
        """Whether the service is still there."""
        ledger = self._ledgers[dice.integers(len(self._ledgers))]
        write = self._draw(dice, tag, list(ledger.state))
        try:
            answer = write.send(http, ledger.name, arrow=bool(dice.random() < 0.5))
        except httpx.ConnectError:  # never sent
            return False
        except httpx.TransportError:
            with ledger.lock:
                ledger.unanswered.append(write)
            return False
        write.ids = answer["ids"]
        with ledger.lock:
            if answer["version"] in ledger.acknowledged:
                raise Loss(f"{ledger.name}: two answers with change {answer['version']}")
            ledger.acknowledged[answer["version"]] = write
        return True

    def _draw(self, dice: np.random.Generator, tag: str, known: Sequence[int]) -> Write:
        largest = int(dice.choice([1, 20, LARGEST_UPSERT]))  # one as often as hundreds
        n = int(dice.integers(1, largest + 1))
        if dice.random() < 0.3 or len(known) > 1.3 * self._n_ids:  # it grows by passages that were sent without an id
            there = dice.choice(known, min(n, len(known)), replace=False) if known else []
            return Write(tag, [*(int(i) for i in there), int(dice.integers(2 * self._n_ids))], None)
        chosen = dice.choice(self._n_ids, n, replace=False).tolist()
        ids = [None if dice.random() < 0.005 else i for i in chosen]
        return Write(tag, ids, random_embeddings(n, self._dimension, seed=int(dice.integers(2**32))))
