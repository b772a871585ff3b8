"""From a question to an answer with its evidence, in five steps.

1. encode: question to vector. 2. retrieve: vector to documents, over HTTP. 3. assemble: documents and question to
contexts; document scores are the inner products q·d. 4. generate, or score given answers. 5. answer: text,
probabilities, documents with prior and posterior.

Every question of a request is a job of its own in each step, so that a short list of documents, a refusal or a seed
concerns its own question only; the device worker puts jobs together again, those of other requests included.

Shapes: N documents of a question, D dimension of the embedding space.
"""

import asyncio
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from generator_svc.answers import EncodedAnswer
from generator_svc.checkpoint import Checkpoint
from generator_svc.contexts import Context
from generator_svc.limits import check_answers, check_choices, check_questions, choose_n_docs, generation_options
from generator_svc.metrics import GeneratorMetrics
from generator_svc.retriever_client import RetrieverClient
from generator_svc.settings import GeneratorSettings
from generator_svc.stages import (
    Assemble,
    Encode,
    EncodedQuestion,
    Generate,
    Job,
    Outcome,
    Score,
    ScoredAnswer,
    Tokenize,
)
from generator_svc.timings import Timings
from shared.deadline import Deadline
from shared.errors import InvalidRequest, RagError, UpstreamError
from shared.retrieval import Float32Array, RetrieveQuery
from shared.schemas import (
    Answer,
    AnswerRequest,
    AnswerResponse,
    AnswerToken,
    Document,
    EncodeRequest,
    IndexInfo,
    OwnPassage,
    Passage,
    QuestionResult,
    Retrieving,
    ScoreRequest,
    ScoreResponse,
    SearchRequest,
    SearchResponse,
    SearchResult,
    Strategy,
)
from shared.worker import DeviceWorker


@dataclass(frozen=True)
class Evidence:
    """The documents that one question is answered from; ``doc_scores`` (N,) float32."""

    passages: Sequence[Passage | OwnPassage]
    doc_scores: Float32Array

    def documents(self, contexts: Sequence[Context] | None = None) -> list[Document]:
        """As they go to the caller, with p(z|x)."""
        priors = _softmax(self.doc_scores)
        cut = [False] * len(self.passages) if contexts is None else [context.truncated for context in contexts]
        return [
            Document(
                id=passage.id,
                title=passage.title,
                text=passage.text,
                score=float(score),
                prior=float(prior),
                truncated=truncated,
            )
            for passage, score, prior, truncated in zip(self.passages, self.doc_scores, priors, cut, strict=True)
        ]


@dataclass(frozen=True)
class EncodedQuestions:
    """``vectors`` (B, D) float32, made from ``tokens`` tokens in all, and the time it took."""

    vectors: Float32Array
    tokens: int
    timings_ms: dict[str, float]


class Listener(Protocol):
    """Who follows an answer while it is made."""

    def documents(self, documents: Sequence[Document], context_tokens: int) -> None:
        """What the question is answered from, once it is known; the generator reads it in so many tokens."""

    def text(self, piece: str) -> None:
        """The next piece of the answer's text; called in the worker's thread."""


class Pipeline:
    def __init__(
        self,
        settings: GeneratorSettings,
        checkpoint: Checkpoint,
        worker: DeviceWorker[Job, Outcome],
        retriever: RetrieverClient,
        metrics: GeneratorMetrics,
    ) -> None:
        self._settings = settings
        self._checkpoint = checkpoint
        self._worker = worker
        self._retriever = retriever
        self._metrics = metrics

    async def answer(
        self, request: AnswerRequest, deadline: Deadline, listener: Listener | None = None
    ) -> AnswerResponse:
        """Raises: RagError: what is refused, and what any step ran into."""
        timings = Timings(self._metrics)
        check_questions(request, self._settings)
        n_docs = choose_n_docs(request, self._checkpoint.config.n_docs, self._settings)
        strategy = self._checkpoint.strategy(request.strategy)
        options = generation_options(request, strategy, self._settings, self._checkpoint)
        check_choices(request, self._settings)

        evidence, index = await self._evidence(request, n_docs, deadline, timings)  # 1 encode, 2 retrieve
        with timings.step("assemble"):
            contexts = await self._assemble(request.questions, evidence, deadline)
        if listener is not None:
            context_tokens = sum(len(context.input_ids) for context in contexts[0])
            listener.documents(evidence[0].documents(contexts[0]), context_tokens)
        if request.choices is not None:
            with timings.step("score"):
                given = [list(request.choices)] * len(evidence)
                answers = await self._score(evidence, contexts, given, strategy, deadline)
        else:
            with timings.step("generate"):
                on_text = None if listener is None else listener.text
                jobs = [
                    Generate(context, found.doc_scores, options, on_text, timings.began_s)
                    for context, found in zip(contexts, evidence, strict=True)
                ]
                answers = await self._run(jobs, deadline)
        results = [
            _result(question, found, read, given, request)
            for question, found, read, given in zip(request.questions, evidence, contexts, answers, strict=True)
        ]
        for result, read in zip(results, contexts, strict=True):
            self._metrics.answered(abstained=result.abstained, truncated=sum(context.truncated for context in read))
        return AnswerResponse(
            model=self._checkpoint.name,
            strategy=strategy,
            results=results,
            index=index,
            timings_ms=timings.total(),
        )

    async def score(self, request: ScoreRequest, deadline: Deadline) -> ScoreResponse:
        """log p(y|x) and p(z|x,y) of given answers. Raises: RagError."""
        timings = Timings(self._metrics)
        check_questions(request, self._settings)
        check_answers(request, self._settings)
        n_docs = choose_n_docs(request, self._checkpoint.config.n_docs, self._settings)
        strategy = self._checkpoint.strategy(request.strategy)

        evidence, index = await self._evidence(request, n_docs, deadline, timings)
        with timings.step("assemble"):
            contexts = await self._assemble(request.questions, evidence, deadline)
        with timings.step("score"):
            answers = await self._score(evidence, contexts, request.answers_by_question, strategy, deadline)
        results = [
            _result(question, found, read, given)
            for question, found, read, given in zip(request.questions, evidence, contexts, answers, strict=True)
        ]
        return ScoreResponse(
            model=self._checkpoint.name,
            strategy=strategy,
            results=results,
            index=index,
            timings_ms=timings.total(),
        )

    async def search(self, request: SearchRequest, deadline: Deadline) -> SearchResponse:
        """Passages for a text, without generation. Raises: RagError."""
        timings = Timings(self._metrics)
        check_questions(request, self._settings)
        n_docs = choose_n_docs(request, self._checkpoint.config.n_docs, self._settings)
        evidence, index = await self._retrieve(request, n_docs, deadline, timings)
        results = [
            SearchResult(question=question, documents=found.documents())
            for question, found in zip(request.questions, evidence, strict=True)
        ]
        return SearchResponse(results=results, index=index, timings_ms=timings.total())

    async def encode(self, request: EncodeRequest, deadline: Deadline) -> EncodedQuestions:
        """Raises: RagError."""
        timings = Timings(self._metrics)
        check_questions(request, self._settings)
        with timings.step("encode"):
            encoded: list[EncodedQuestion] = await self._run([Encode(text) for text in request.questions], deadline)
        vectors = np.stack([question.vector for question in encoded])
        return EncodedQuestions(vectors, sum(question.tokens for question in encoded), timings.total())

    async def _evidence(
        self, request: AnswerRequest | ScoreRequest, n_docs: int, deadline: Deadline, timings: Timings
    ) -> tuple[list[Evidence], IndexInfo | None]:
        if request.passages is not None:
            own = Evidence(request.passages, _own_scores(request.passages))
            return [own] * len(request.questions), None
        evidence, index = await self._retrieve(request, n_docs, deadline, timings)
        if not all(found.passages for found in evidence):
            if request.filter is not None:
                raise InvalidRequest(f"no passage of {index.collection!r} fulfils the filter", param="filter")
            raise UpstreamError(f"collection {index.collection!r} holds no passages: there is nothing to answer from")
        return evidence, index

    async def _retrieve(
        self, request: Retrieving, n_docs: int, deadline: Deadline, timings: Timings
    ) -> tuple[list[Evidence], IndexInfo]:
        questions = request.questions
        with timings.step("encode"):
            encoded: list[EncodedQuestion] = await self._run([Encode(question) for question in questions], deadline)
            vectors = [question.vector for question in encoded]
        with timings.step("retrieve"):
            query = RetrieveQuery(
                np.stack(vectors),
                n_docs=n_docs,
                collection=request.collection,
                search_params=request.search_params,
                filter=request.filter,
            )
            result = await self._retriever.retrieve(query, deadline)
        if result.doc_embeds is None or result.docs is None or len(result.docs) != len(questions):
            raise UpstreamError("the retriever left out what was asked for")
        found = zip(result.docs, result.doc_embeds, vectors, strict=True)
        return [Evidence(docs, embeds_ND @ vector_D) for docs, embeds_ND, vector_D in found], result.index

    async def _assemble(
        self, questions: Sequence[str], evidence: Sequence[Evidence], deadline: Deadline
    ) -> list[list[Context]]:
        jobs = [
            Assemble(question, [(passage.title, passage.text) for passage in found.passages])
            for question, found in zip(questions, evidence, strict=True)
        ]
        contexts: list[list[Context]] = await self._run(jobs, deadline)
        return contexts

    async def _score(
        self,
        evidence: Sequence[Evidence],
        contexts: Sequence[Sequence[Context]],
        answers: Sequence[Sequence[str]],
        strategy: Strategy,
        deadline: Deadline,
    ) -> list[list[ScoredAnswer]]:
        """The probabilities of given answers, a list for each question."""
        tokenized: list[list[EncodedAnswer]] = await self._run([Tokenize(given) for given in answers], deadline)
        jobs = [
            Score(read, found.doc_scores, strategy, given)
            for read, found, given in zip(contexts, evidence, tokenized, strict=True)
        ]
        scored: list[list[ScoredAnswer]] = await self._run(jobs, deadline)
        return scored

    async def _run(self, jobs: Iterable[Job], deadline: Deadline) -> Any:
        """What the jobs gave, in order; the first error is raised, and what still waits then is dropped."""
        tasks = [asyncio.ensure_future(self._worker.submit(job, deadline)) for job in jobs]
        try:
            outcomes = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, RagError):
                raise _of_item(outcome, index if len(outcomes) > 1 else None)
        return outcomes


def _of_item(error: RagError, index: int | None) -> RagError:
    """The error, naming which of several questions it concerns."""
    error = error.copy()
    if index is not None and error.param is not None:
        error.param = f"{error.param}.{index}"
    return error


def _result(
    question: str,
    evidence: Evidence,
    contexts: Sequence[Context],
    answers: Sequence[ScoredAnswer],
    request: AnswerRequest | None = None,
) -> QuestionResult:
    """Step 5; without a request for answers, all are given as they are, in their order."""
    provenance = "answer" if request is None else request.provenance
    least = 0.0 if request is None else request.min_probability
    shares = None
    if request is not None and request.choices is not None:
        answers = sorted(answers, key=lambda answer: -answer.log_prob)
        shares = _softmax(np.array([answer.log_prob for answer in answers], np.float64)).tolist()
    given = [
        Answer(
            text=answer.text,
            log_prob=answer.log_prob,
            probability=math.exp(min(answer.log_prob, 0.0)),
            doc_posterior=None if provenance == "none" else answer.doc_posterior,
            tokens=[AnswerToken(**asdict(token)) for token in answer.tokens] if provenance == "token" else None,
            choice_probability=None if shares is None else shares[index],
        )
        for index, answer in enumerate(answers)
    ]
    kept = [
        answer
        for answer in given
        if (answer.probability if answer.choice_probability is None else answer.choice_probability) >= least
    ]
    return QuestionResult(question=question, answers=kept, abstained=not kept, documents=evidence.documents(contexts))


def _own_scores(passages: Sequence[OwnPassage]) -> Float32Array:
    with np.errstate(over="ignore"):
        scores = np.array([passage.score for passage in passages], dtype=np.float32)
    for index in np.flatnonzero(~np.isfinite(scores)):
        raise InvalidRequest("a score must be a finite float32", param=f"passages.{index}.score")
    return scores


def _softmax(scores: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    weights = np.exp(scores.astype(np.float64) - scores.max(initial=-np.inf))
    return cast("npt.NDArray[np.float64]", weights / weights.sum())
