"""What the device worker's thread does: the stages of an answer that need a tokenizer or torch.

One job is one question at one stage. Jobs of a kind and with equal options share a batch; each gets its own result,
or the error that is its own.

Shapes: B questions, N documents, D dimension, S source tokens, T target tokens.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from generator_svc.answers import AnswerCodec, EncodedAnswer
from generator_svc.checkpoint import Checkpoint
from generator_svc.contexts import Context, ContextForm, build_contexts, question_form
from generator_svc.engine import Evidence, RagEngine, Task
from generator_svc.engine.heads import padded
from generator_svc.engine.scheduler import Scheduler, Scoring, cache_tokens
from generator_svc.metrics import GeneratorMetrics
from generator_svc.question_encoder import QuestionEncoder
from shared.errors import InferenceError, RagError
from shared.retrieval import Float32Array
from shared.schemas import Strategy
from shared.telemetry import Trace, current_trace
from shared.worker import Deferred


@dataclass(frozen=True)
class Encode:
    """A question → its vector."""

    question: str


@dataclass(frozen=True)
class Assemble:
    """A question and its passages, each (title, text) → a context for each."""

    question: str
    passages: Sequence[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Generate:
    """Contexts and their scores, (N,) float32 → answers, best first.

    ``options`` are those of :meth:`generator_svc.engine.RagEngine.task`. ``on_text`` is called in the worker's thread
    with each piece of text, where an answer is certain as it is written. ``asked_s`` is when the request came, on
    ``time.perf_counter``.
    """

    contexts: Sequence[Context]
    doc_scores: Float32Array
    options: Mapping[str, Any]
    on_text: Callable[[str], None] | None = None
    asked_s: float = field(default_factory=time.perf_counter)
    trace: Trace | None = field(default_factory=current_trace)


@dataclass(frozen=True)
class Tokenize:
    """Answers to be scored → the same with their tokens."""

    answers: Sequence[str]


@dataclass(frozen=True, eq=False)
class Score:
    """Contexts, their scores and answers → the same answers with their probabilities."""

    contexts: Sequence[Context]
    doc_scores: Float32Array
    strategy: Strategy
    answers: Sequence[EncodedAnswer]


@dataclass(frozen=True)
class EncodedQuestion:
    """``vector`` (D,) float32; ``tokens`` of the question were read for it, special ones included."""

    vector: Float32Array
    tokens: int


@dataclass(frozen=True)
class ScoredToken:
    """``log_prob`` is its share of log p(y|x); ``doc_posterior`` (N,) is p(z|x,y_≤i)."""

    text: str
    log_prob: float
    doc_posterior: list[float]


@dataclass(frozen=True)
class ScoredAnswer:
    """``log_prob`` is log p(y|x); ``doc_posterior`` (N,) is p(z|x,y)."""

    text: str
    log_prob: float
    doc_posterior: list[float]
    tokens: list[ScoredToken]


_NOT_FINITE = "the model's probabilities are not finite; it may need another dtype: bfloat16 or float32"

Job = Encode | Assemble | Generate | Tokenize | Score
Outcome = EncodedQuestion | list[Context] | list[EncodedAnswer] | list[ScoredAnswer] | RagError
Later = Deferred[Outcome]
Kind = TypeVar("Kind")
Made = TypeVar("Made")


def batch_key(job: Job) -> object:
    """Jobs with equal keys may run together."""
    match job:
        case Score(strategy=strategy):
            return Score, strategy
        case _:
            return type(job)


def batch_size(job: Job) -> int:
    """Rows that a job adds to a batch."""
    match job:
        case Assemble(passages=passages):
            return len(passages)
        case Generate() | Score():
            return len(job.contexts)
        case _:
            return 1


class _Caller:
    """Who waits for what comes of a job, and not for anything before."""

    def __init__(self) -> None:
        self.later: Later = Deferred()

    @property
    def wanted(self) -> bool:
        return self.later.wanted

    def encoded(self, questions: int) -> None:
        pass

    def decoded(self) -> None:
        pass

    def written(self, tokens: Tensor) -> None:
        pass

    def failed(self, error: RagError) -> None:
        self.later.reject(error)


class ScoreTicket(_Caller):
    """Of a question whose answers are given."""

    def __init__(self, job: Score, codec: AnswerCodec) -> None:
        super().__init__()
        self._texts, self._codec = [answer.text for answer in job.answers], codec

    def finished(self, evidence: Evidence) -> None:
        try:
            self.later.resolve(scored_answers(evidence, self._codec, self._texts))
        except RagError as error:
            self.failed(error)


class AnswerTicket(_Caller):
    """Of a question to be answered."""

    def __init__(self, job: Generate, codec: AnswerCodec, metrics: GeneratorMetrics) -> None:
        super().__init__()
        self._job, self._codec, self._metrics = job, codec, metrics
        self._on_text = job.on_text
        self._joined_s, self._prefilled_s = time.perf_counter(), 0.0
        self._sent = ""
        self._has_token = self._follows = False

    def encoded(self, questions: int) -> None:
        self._prefilled_s = time.perf_counter()
        tokens = sum(len(context.input_ids) for context in self._job.contexts)
        self._metrics.stage("prefill", self._prefilled_s - self._joined_s)
        self._metrics.context(tokens)
        if self._job.trace is not None:
            about = {"gen_ai.usage.input_tokens": tokens, "rag.batch.items": questions}
            self._job.trace.add("prefill", self._joined_s, self._prefilled_s, about)

    def decoded(self) -> None:
        if not self._has_token:
            self._metrics.first_token(time.perf_counter() - self._job.asked_s)
        self._has_token = True

    def finished(self, evidence: Evidence) -> None:
        try:
            answers = scored_answers(evidence, self._codec)
        except RagError as error:
            self.failed(error)
            return
        now_s = time.perf_counter()
        tokens = sum(len(answer.tokens) for answer in answers)
        self._metrics.stage("decode", now_s - self._prefilled_s)
        self._metrics.generated(tokens)
        if self._job.trace is not None:
            self._job.trace.add("decode", self._prefilled_s, now_s, {"gen_ai.usage.output_tokens": tokens})
        if self._follows:
            self._send(answers[0].text)
        self.later.resolve(answers)

    def written(self, tokens: Tensor) -> None:
        self._follows = True
        if self._on_text is None:
            return
        text = self._codec.text(tokens.tolist())
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character, complete one token later
            self._send(text)

    def _send(self, text: str) -> None:
        """What of the text is new. A tokenizer that tidies up may take back what it wrote: that waits."""
        if self._on_text is not None and len(text) > len(self._sent) and text.startswith(self._sent):
            self._on_text(text[len(self._sent) :])
            self._sent = text


class Stages:
    """Everything that is loaded from one checkpoint. One thread owns it.

    Answers are generated and scored by continuous batching: `run` gives deferred results for such jobs, and `step`
    moves all of them on. ``max_tokens`` is the scheduler's budget.
    """

    def __init__(
        self, checkpoint: Checkpoint, max_tokens: int, metrics: GeneratorMetrics, *, cuda_graphs: bool = True
    ) -> None:
        self.checkpoint = checkpoint
        self.encoder = QuestionEncoder(checkpoint)
        self._engine = RagEngine(checkpoint, cuda_graphs=cuda_graphs)
        self.scheduler = Scheduler(self._engine, max_tokens)
        self._form = ContextForm.of(checkpoint.config, checkpoint.max_source_tokens)
        self._tasks: WeakKeyDictionary[Generate, Task | RagError] = WeakKeyDictionary()
        self._scorings: WeakKeyDictionary[Score, Scoring] = WeakKeyDictionary()
        self._codec = AnswerCodec(checkpoint)
        self._metrics = metrics

    def warm_up(self) -> None:
        """Run every stage once, with the shortest and the longest context."""
        self._engine.warm_up()
        longest = "and so on " * self._form.max_tokens
        self.encoder.encode(["?", longest])
        passages = [("", ""), ("", longest)]
        contexts = build_contexts(passages, "?", self._form, self.checkpoint.generator_tokenizer)
        scores = torch.zeros(1)
        for strategy in self.checkpoint.strategies:
            for context in contexts:
                documents = [torch.tensor(context.input_ids)]
                task = self._engine.task(documents, scores, strategy=strategy, num_beams=2, max_new_tokens=4)
                self._engine.run([task])
                if self.checkpoint.device.type == "cuda":
                    n_docs = int(self.checkpoint.config.n_docs)
                    for _ in range(2):  # the steps of a question as it comes by default, which are then captured
                        by_default = self._engine.task(documents * n_docs, torch.zeros(n_docs), strategy=strategy)
                        self._engine.run([by_default])

    def admits(self, jobs: Sequence[Job]) -> bool:
        """Whether the budget has room for these jobs beside what is being generated."""
        tasks = [self._task(job) for job in jobs if isinstance(job, Generate)]
        scorings = [self._scoring(job) for job in jobs if isinstance(job, Score)]
        able: list[Task | Scoring] = [*(task for task in tasks if isinstance(task, Task)), *scorings]
        return self.scheduler.admits([cache_tokens(asked) for asked in able])

    def step(self) -> bool:
        """Moves all on that is being generated or scored; whether any of it goes on."""
        return self.scheduler.step()

    def run(self, jobs: list[Job]) -> Sequence[Outcome | Later]:
        """One outcome for each job, now or later; all are of one kind and one key."""
        stages: dict[type, Callable[[list[Any]], Sequence[Outcome | Later]]] = {
            Encode: self._encode,
            Assemble: self._assemble,
            Generate: self._generate,
            Tokenize: self._tokenize,
            Score: self._score,
        }
        return stages[type(jobs[0])](jobs)

    def _encode(self, jobs: list[Encode]) -> Sequence[Outcome]:
        vectors, tokens = self.encoder.encode_counted([job.question for job in jobs])
        return [EncodedQuestion(vector, read) for vector, read in zip(vectors, tokens, strict=True)]

    def _assemble(self, jobs: list[Assemble]) -> Sequence[Outcome]:
        tokenizer = self.checkpoint.generator_tokenizer

        def contexts(job: Assemble) -> list[Context]:
            question = question_form(job.question, self.checkpoint.question_tokenizer)
            return build_contexts(job.passages, question, self._form, tokenizer)

        return _each(contexts, jobs)

    def _generate(self, jobs: list[Generate]) -> Sequence[Outcome | Later]:
        tasks = [self._task(job) for job in jobs]
        tickets = [AnswerTicket(job, self._codec, self._metrics) for job in jobs]
        able = [(task, ticket) for task, ticket in zip(tasks, tickets, strict=True) if isinstance(task, Task)]
        self.scheduler.join([task for task, _ in able], [ticket for _, ticket in able])
        return [ticket.later if isinstance(task, Task) else task for task, ticket in zip(tasks, tickets, strict=True)]

    def _task(self, job: Generate) -> Task | RagError:
        """Made once a job, however often its place in the queue is looked at; or why it is refused."""
        if job not in self._tasks:
            [self._tasks[job]] = _each(
                lambda job: self._engine.task(self._documents(job), torch.from_numpy(job.doc_scores), **job.options),
                [job],
            )
        return self._tasks[job]

    def _tokenize(self, jobs: list[Tokenize]) -> Sequence[Outcome]:
        return _each(lambda job: [self._codec.encode(answer) for answer in job.answers], jobs)

    def _score(self, jobs: list[Score]) -> Sequence[Outcome | Later]:
        tickets = [ScoreTicket(job, self._codec) for job in jobs]
        self.scheduler.score([self._scoring(job) for job in jobs], jobs[0].strategy, tickets)
        return [ticket.later for ticket in tickets]

    def _scoring(self, job: Score) -> Scoring:
        """Made once a job, as a task is."""
        if job not in self._scorings:
            pad = int(self.checkpoint.generator_tokenizer.pad_token_id)
            answers = padded([self._embedded(answer.sequence) for answer in job.answers], pad)
            self._scorings[job] = Scoring(self._documents(job), torch.from_numpy(job.doc_scores), answers)
        return self._scorings[job]

    def _documents(self, job: Generate | Score) -> list[Tensor]:
        return [self._embedded(context.input_ids) for context in job.contexts]

    def _embedded(self, ids: Sequence[int]) -> Tensor:
        """`ids` with those that have no row in the embedding table as unknown: <mask>, with some BARTs."""
        config: Any = self.checkpoint.config.generator
        unknown = self.checkpoint.generator_tokenizer.unk_token_id
        row = torch.tensor(ids)
        return row if unknown is None else row.masked_fill(row >= config.vocab_size, unknown)


def _each(make: Callable[[Kind], Made], jobs: Sequence[Kind]) -> list[Made | RagError]:
    """What `make` gives for each job; the error of one is its own outcome and no other's."""
    outcomes: list[Made | RagError] = []
    for job in jobs:
        try:
            outcomes.append(make(job))
        except RagError as error:
            outcomes.append(error)
    return outcomes


def scored_answers(evidence: Evidence, codec: AnswerCodec, texts: Sequence[str] | None = None) -> list[ScoredAnswer]:
    """The answers as text, or under the ``texts`` that were given.

    Raises:
        InferenceError: the model's numbers overflowed.
    """
    if not bool(evidence.log_probs.isfinite().all()):
        raise InferenceError(_NOT_FINITE)
    answers = []
    for index, sequence in enumerate(evidence.sequences.tolist()):
        counted = [position for position, is_counted in enumerate(evidence.counted[index].tolist()) if is_counted]
        shares, posteriors = evidence.token_log_probs[index].tolist(), evidence.token_posterior[index].tolist()
        token_texts = codec.tokens([sequence[position + 1] for position in counted])
        tokens = [
            ScoredToken(text, shares[position], posteriors[position])
            for text, position in zip(token_texts, counted, strict=True)
        ]
        answers.append(
            ScoredAnswer(
                codec.text(sequence) if texts is None else texts[index],
                float(evidence.log_probs[index]),
                evidence.doc_posterior[index].tolist(),
                tokens,
            )
        )
    return answers
