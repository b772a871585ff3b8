"""The retriever service behind transformers' own RAG models, for scripts and trainings that use those.

    retriever = RemoteRagRetriever.from_pretrained("facebook/rag-token-nq", url="http://127.0.0.1:8001")
    model = RagTokenForGeneration.from_pretrained("facebook/rag-token-nq")
    model.set_retriever(retriever)

(``from_pretrained(…, retriever=retriever)`` copies the retriever and, in transformers 5.23, fails on a checkpoint whose
generation_config.json is not derived from its config.json, with transformers' own retriever as well.)

Shapes: B questions, N documents of each, D dimension, S tokens of the longest context.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import PreTrainedTokenizerBase, RagConfig, RagRetriever, RagTokenizer

from generator_svc.contexts import ContextForm, build_contexts, cleaned_up, pad_contexts
from services.client import RagClient
from shared.errors import EncoderMismatch, InvalidRequest
from shared.retrieval import Float32Array, Int64Array, RetrieveResult
from shared.schemas import SearchParams

DEFAULT_URL = "http://127.0.0.1:8001"

Contexts = tuple[Tensor, Tensor] | tuple[list[list[int]], list[list[int]]]


class RemoteRagRetriever(RagRetriever):
    """A ``transformers.RagRetriever`` whose index is a retriever service. Close it, or use it with ``with``.

    Contexts are those of the generator service, which differ from transformers' in three ways: the question is cleaned
    up as it was when checkpoints were trained, a passage that is too long gives way to the question, and padding goes
    to the longest of a batch.

    Args:
        url, api_key, timeout_s: of the service, as :class:`services.client.RagClient` has them.
        collection: its name, or an alias.
        encoder: fingerprint of the question encoder that it must be for, as `rag info` shows it; None: any.
        filter, search_params: of every request.
        init_retrieval: whether the service is asked at once: what is wrong is said before a model is loaded.

    Raises:
        RagError: what the service answers, here and in every other method, or that nothing answers.
        EncoderMismatch: the collection is for another question encoder.
    """

    def __init__(
        self,
        config: RagConfig,
        question_encoder_tokenizer: PreTrainedTokenizerBase,
        generator_tokenizer: PreTrainedTokenizerBase,
        *,
        url: str = DEFAULT_URL,
        collection: str = "default",
        api_key: str | None = None,
        timeout_s: float | None = 60.0,
        encoder: str | None = None,
        filter: str | None = None,  # noqa: A002  as in a request
        search_params: SearchParams | None = None,
        init_retrieval: bool = True,
    ) -> None:
        # transformers' own would build an index, with packages that are not needed here
        self.config, self.n_docs, self.index = config, config.n_docs, None
        self.question_encoder_tokenizer, self.generator_tokenizer = question_encoder_tokenizer, generator_tokenizer
        self.ctx_encoder_tokenizer, self.return_tokenized_docs = None, False
        self._service: dict[str, Any] = {"retriever_url": url, "api_key": api_key, "timeout_s": timeout_s}
        self._collection, self._encoder = collection, encoder
        self._filter, self._search_params = filter, search_params
        if init_retrieval:
            try:
                self.init_retrieval()
            except BaseException:
                self.close()
                raise

    @classmethod
    def from_pretrained(
        cls,
        retriever_name_or_path: str,
        indexed_dataset: object = None,
        *,
        config: RagConfig | None = None,
        **service: Any,
    ) -> Self:
        """With the configuration and the tokenizers of a RAG checkpoint: a folder, or an id on the Hugging Face hub.

        Args:
            service: what the class takes by name.
        """
        if indexed_dataset is not None:
            reason = "the passages are the service's; `rag index import` makes a collection of a dataset"
            raise InvalidRequest(reason, param="indexed_dataset")
        config = config or RagConfig.from_pretrained(retriever_name_or_path)
        tokenizer = RagTokenizer.from_pretrained(retriever_name_or_path, config=config)  # type: ignore[no-untyped-call]
        return cls(config, tokenizer.question_encoder, tokenizer.generator, **service)

    def init_retrieval(self) -> None:
        """Asks the service something."""
        self._ask(np.zeros((1, self.config.retrieval_vector_size), dtype=np.float32), 1)

    def retrieve(
        self, question_hidden_states: npt.NDArray[np.floating[Any]], n_docs: int
    ) -> tuple[Float32Array, Int64Array, list[dict[str, Any]]]:
        """The documents nearest to vectors (B, D), in as few requests as the service's limits allow.

        Returns: ``retrieved_doc_embeds`` (B, N, D), ``doc_ids`` (B, N), and for each question ``id``, ``title`` and
            ``text`` of its documents, as lists, and their ``embeddings`` (N, D).

        Raises:
            InvalidRequest: a question has fewer documents, which transformers' models cannot take.
        """
        at_once = max(1, min(self._limits["max_batch_vectors"], self._limits["max_documents"] // max(1, n_docs)))
        starts = range(0, len(question_hidden_states), at_once)
        found = [self._ask(question_hidden_states[start : start + at_once], n_docs) for start in starts]
        ids = [row for part in found for row in part.doc_ids]
        if ids and (fewest := min(map(len, ids))) < n_docs:
            reason = f"`{self._collection}` has {fewest} documents for a question, fewer than the {n_docs} asked for"
            raise InvalidRequest(reason, param="n_docs")
        embeds = [row for part in found for row in part.doc_embeds or ()]
        docs = [
            {
                "id": [passage.id for passage in passages],
                "title": [passage.title for passage in passages],
                "text": [passage.text for passage in passages],
                "embeddings": vectors,
            }
            for passages, vectors in zip((row for part in found for row in part.docs or ()), embeds, strict=True)
        ]
        return np.array(embeds), np.array(ids), docs

    def postprocess_docs(
        self,
        docs: Sequence[dict[str, Any]],
        input_strings: Sequence[str],
        prefix: str | None,
        n_docs: int,
        return_tensors: str | None = None,
    ) -> Contexts:
        """Token ids and mask of each document with its question, (B·N, S)."""
        form = ContextForm.of(self.config, self.config.max_combined_length)
        form = form if prefix is None else replace(form, prefix=prefix)
        contexts = [
            context.input_ids
            for found, question in zip(docs, input_strings, strict=True)
            for context in build_contexts(
                list(zip(found["title"], found["text"], strict=True))[:n_docs],
                cleaned_up(question),
                form,
                self.generator_tokenizer,
            )
        ]
        ids, mask = pad_contexts(contexts, self.generator_tokenizer.pad_token_id)
        return (ids, mask) if return_tensors else (ids.tolist(), mask.tolist())

    def close(self) -> None:
        """Ends the connections; a question asked later begins others."""
        if "_client" in vars(self):
            self._client.close()
            del self._client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has connections of its own: `from_pretrained` of transformers' models makes one, and so do workers."""
        return {name: value for name, value in vars(self).items() if name != "_client"}

    @cached_property
    def _client(self) -> RagClient:
        return RagClient(**self._service)

    @cached_property
    def _limits(self) -> dict[str, int]:
        return {name: int(limit) for name, limit in self._client.info("retriever").limits.items()}

    def _ask(self, vectors: npt.NDArray[np.floating[Any]], n_docs: int) -> RetrieveResult:
        found = self._client.retrieve(
            vectors,
            n_docs=n_docs,
            collection=self._collection,
            filter=self._filter,
            search_params=self._search_params,
        )
        if self._encoder not in {None, found.index.encoder}:
            reason = f"`{self._collection}` is for the question encoder {found.index.encoder}, not for {self._encoder}"
            raise EncoderMismatch(reason)
        return found
