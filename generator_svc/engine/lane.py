"""Questions of one form that begin together and move in step, on CUDA by one captured graph a step.

Launching the kernels of a decode step takes many times longer than running them. A graph replays them in one launch,
but on the addresses that it was captured with, and with the shapes. So a :class:`Lane` is a set of tensors that stay
where they are, for so many questions with so many documents and rows each. Questions that begin in it together have
trees that grow alike: the root first, then a node a row and step. The step at one length thus has nothing variable in
it, the search included, and is captured the second time that it is met: decoder, marginalisation, logits processors,
choice, and what the next step attends to. The host reads one flag a problem and step. A problem that is finished stays
as it was while the others go on.

Nothing but the capture needs CUDA: uncaptured, a step runs anywhere.

Shapes: Q questions, N documents of all of them, P problems (questions for RAG-Token, documents for RAG-Sequence),
K rows (beams) of each, R = N·K packed rows, C node positions, S source tokens, V vocabulary, H heads, E head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import structlog
import torch
from torch import Tensor
from transformers.generation import logits_process as processors

from generator_svc.engine import kernels
from generator_svc.engine.backend import Task
from generator_svc.engine.cache import DocumentCache, Group
from generator_svc.engine.decoding import BartDecoding
from generator_svc.engine.search import BeamSearch, Result, RowSearch
from shared.schemas import Strategy

if TYPE_CHECKING:
    from generator_svc.engine.decoder import Bart

# Logits processors that launch kernels and do nothing else, so that they may be captured with the search.
CAPTURED = (
    processors.InfNanRemoveLogitsProcessor,
    processors.LogitNormalization,
    processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor,
    processors.RepetitionPenaltyLogitsProcessor,
    processors.SuppressTokensAtBeginLogitsProcessor,
    processors.SuppressTokensLogitsProcessor,
)

# They force a token at the first or at the last step, by a number that lies on the host: elsewhere they do nothing.
FORCING = (processors.ForcedBOSTokenLogitsProcessor, processors.ForcedEOSTokenLogitsProcessor)

_log = structlog.get_logger(__name__)


class Form(NamedTuple):
    """What questions have in common that may share a lane.

    ``documents`` of a question, ``rows`` of a problem, ``length`` of the longest answer with its start token; ``rules``
    are all other options, ``own`` tells questions apart that bring functions of their own (0: none).
    """

    strategy: Strategy
    documents: int
    rows: int
    length: int
    rules: tuple[str, ...]
    own: int


@dataclass(frozen=True)
class Scores:
    """What a search chooses from, and the logits behind it.

    ``scores`` (P·K, V) float32; ``logits`` (Q, N/Q, K, V) for RAG-Token and (P·K, V) for RAG-Sequence, in any dtype;
    less ``normalizer``, of their shape without V, they are log-probabilities, for RAG-Token with log p(z|x).
    """

    scores: Tensor
    logits: Tensor
    normalizer: Tensor

    def shares(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """As :data:`generator_svc.engine.search.Shares`."""
        if self.logits.dim() == 2:
            return (self.logits[rows, tokens].float() - self.normalizer[rows])[None]
        beams = self.logits.shape[2]
        questions, row = rows // beams, rows % beams
        return (self.logits[questions, :, row, tokens].float() - self.normalizer[questions, :, row]).movedim(-1, 0)

    def kept_in(self, buffers: dict[str, Tensor]) -> "Scores":
        """The same in buffers that are used at every step."""
        return Scores(*(_kept(buffers, name, getattr(self, name)) for name in ("scores", "logits", "normalizer")))


def _kept(buffers: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
    if name not in buffers or buffers[name].numel() < value.numel():
        buffers[name] = torch.empty(value.numel(), dtype=value.dtype, device=value.device)
    return buffers[name][: value.numel()].view(value.shape).copy_(value)


class Lane:
    """Fixed tensors for questions of one form, and the steps over them.

    Args:
        questions, source: how many questions, and tokens of a context, it has room for.
        search: makes the search for so many problems.
        capture: whether steps become CUDA graphs; if not, they run as they are, on any device.
    """

    def __init__(
        self,
        bart: "Bart",
        form: Form,
        questions: int,
        source: int,
        search: Callable[[int], BeamSearch | RowSearch],
        *,
        capture: bool,
    ) -> None:
        device = bart.device
        self.form, self.questions, self.source = form, questions, source
        self.slots = questions * form.documents
        self.cross, self.nodes = bart.caches(self.slots, source), bart.caches(self.slots, self.start(form.length))
        problems = questions if form.strategy == "token" else self.slots
        self._bart, self._search = bart, search(problems)
        self._initial = [kept.clone() for kept in self._search.state]
        self.visible_PKC = torch.zeros(problems, form.rows, self.nodes[0].shape[3], dtype=torch.bool, device=device)
        self._itself_KK = torch.eye(form.rows, dtype=torch.bool, device=device)
        self._alive_P = torch.zeros(problems, dtype=torch.bool, device=device)
        self.lengths_N = torch.zeros(self.slots, dtype=torch.int32, device=device)
        self._depths = torch.arange(form.length, device=device)
        self._log_prior_QN = torch.zeros(questions, form.documents, device=device)
        self._memory = torch.cuda.graph_pool_handle() if capture else None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._met: set[int] = set()  # lengths at which a step has run
        self._buffers: dict[str, Tensor] = {}  # of what a captured step gives a search that is not captured
        self._outcome: dict[int, Scores] = {}
        self._results: list[list[Result]] | None = None
        self._going: list[bool] = []
        self.length = 1

    @property
    def bytes(self) -> int:
        """What its caches hold."""
        return sum(cache.nbytes for cache in (*self.cross, *self.nodes))

    @torch.inference_mode()
    def begin(self, tasks: Sequence[Task]) -> list["LaneDecoding"]:
        """Places for the questions' documents, which are yet to be encoded."""
        lengths = [len(context) for task in tasks for context in task.contexts]
        group = Group(self.cross, self.nodes, fixed=True)
        documents = [DocumentCache(group, slot, length) for slot, length in enumerate(lengths)]
        problems, unused = len(self._alive_P), self.slots - len(lengths)
        alive = len(tasks) if self.form.strategy == "token" else len(lengths)
        self.lengths_N.copy_(torch.tensor([*lengths, *[0] * unused], dtype=torch.int32))
        self._alive_P.copy_(torch.arange(problems) < alive)
        self._log_prior_QN[: len(tasks)] = torch.stack([task.log_prior for task in tasks]).to(self._log_prior_QN.device)
        self.length, self._going, self._results = 1, [at < alive for at in range(problems)], None
        each = self.form.documents
        return [LaneDecoding(task, documents[at * each : (at + 1) * each], self, at) for at, task in enumerate(tasks)]

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every row; :meth:`settle` then tells who goes on."""
        length = self.length
        if length not in self._graphs and self._memory is not None and length in self._met:
            self._capture(length)
        if length in self._graphs:
            self._graphs[length].replay()
        else:
            self._met.add(length)
            self._run(length)
        if not self._has_search(length):
            self._choose(length, self._outcome[length])
        self.length, self._results = length + 1, None

    def settle(self) -> None:
        """Waits for the step."""
        self._going = self._alive_P.tolist()

    def _has_search(self, length: int) -> bool:
        """Whether the search is part of what is captured."""
        kinds = CAPTURED if length in {1, self.form.length - 1} else CAPTURED + FORCING
        return not self.form.own and all(isinstance(one, kinds) for one in self._search.processors)

    def _capture(self, length: int) -> None:
        """The step at this length. It has run before, so that libraries have chosen kernels and taken workspaces."""
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(self._bart.device),
                # What other threads do with the device meanwhile is no part of it.
                torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"),
            ):
                self._run(length)
        except RuntimeError as error:
            _log.warning(
                "step_not_captured", error=str(error), advice="steps of this form are launched kernel by kernel"
            )
            self._memory = None
        else:
            self._graphs[length] = graph

    def _run(self, length: int) -> None:
        """What is captured. No shape depends on what comes in, and nothing is read back."""
        if length == 1:
            for kept, initial in zip(self._search.state, self._initial, strict=True):
                kept.copy_(initial)
            self.visible_PKC.zero_()
            self.visible_PKC[:, :, 0] = True
        scores = self.scores(length)
        if self._has_search(length):
            self._choose(length, scores)
        else:
            self._outcome[length] = scores.kept_in(self._buffers)

    def scores(self, length: int) -> Scores:
        """What may follow hypotheses of this length: one pass of the decoder over their last nodes."""
        bart, form = self._bart, self.form
        tokens_PK = self._search.open[:, : 1 if length == 1 else None, length - 1]
        each = self.slots // len(tokens_PK)
        tokens_R = tokens_PK[:, None].expand(-1, each, -1).flatten()
        depths_R = self._depths[length - 1].expand(len(tokens_R))
        logits_RV = bart.logits(bart.decode(tokens_R, depths_R, LaneAttention(self, length)))
        if form.strategy == "token":
            logits_QNKV = logits_RV.view(self.questions, form.documents, tokens_PK.shape[1], -1)
            normalizer_R = kernels.log_normalizer(logits_RV, self._log_prior_QN.flatten())
            normalizer_QNK = normalizer_R.view(logits_QNKV.shape[:3])
            return Scores(kernels.marginalize(logits_QNKV, normalizer_QNK).flatten(0, 1), logits_QNKV, normalizer_QNK)
        # greedy search processes logits, beams log-probabilities: as in transformers
        is_greedy = isinstance(self._search, RowSearch)
        normalizer_R = kernels.log_normalizer(logits_RV)
        scores_RV = logits_RV.float() if is_greedy else logits_RV - normalizer_R[:, None]
        return Scores(scores_RV, logits_RV, normalizer_R)

    def _choose(self, length: int, scores: Scores) -> None:
        """The search, and what it means for the next step."""
        rows, search = self.form.rows, self._search
        search.length = length
        parents_PK = search.choose_in_place(scores.scores, scores.shares, self._alive_P)
        if length + 1 < self.form.length:
            new = slice(self.start(length + 1), self.start(length + 1) + rows)
            if parents_PK is not None:
                self.visible_PKC.copy_(self.visible_PKC.take_along_dim(parents_PK[:, :, None], 1))
            self.visible_PKC[:, :, new] = self._itself_KK

    def start(self, length: int) -> int:
        """The place of the first of the nodes that end hypotheses of this length: so many are before them."""
        return 0 if length == 1 else 1 + self.form.rows * (length - 2)

    def goes_on(self, question: int) -> bool:
        return any(self._going[self._problems(question)])

    def row(self, question: int) -> Tensor | None:
        """(T,) the only row of a question, as far as it goes; None where rows compete."""
        if self.form.strategy != "token" or not isinstance(self._search, RowSearch):
            return None
        return self._search.history[question, : int(self._search.lengths[question])]

    def results(self, question: int) -> list[list[Result]]:
        """As :meth:`generator_svc.engine.search.Search.results`, of the question's problems."""
        if self._results is None:
            self._results = self._search.results()
        return self._results[self._problems(question)]

    def _problems(self, question: int) -> slice:
        each = 1 if self.form.strategy == "token" else self.form.documents
        return slice(question * each, (question + 1) * each)


class LaneAttention:
    """What the new nodes of a lane's trees attend to: see :class:`generator_svc.engine.attention.Attention`."""

    def __init__(self, lane: Lane, length: int) -> None:
        self._lane, self._start = lane, lane.start(length)
        self._visible_PKC = lane.visible_PKC[:, :1] if length == 1 else lane.visible_PKC

    def attend_to_nodes(self, layer: int, qkv_R3HE: Tensor) -> Tensor:
        qkv_NK3HE = qkv_R3HE.view(self._lane.slots, -1, *qkv_R3HE.shape[1:])
        nodes_2NHCE = self._lane.nodes[layer]
        return kernels.attend_to_nodes(qkv_NK3HE, nodes_2NHCE, self._visible_PKC, self._start).flatten(0, 1)

    def attend_to_source(self, layer: int, q_RHE: Tensor) -> Tensor:
        q_NKHE = q_RHE.view(self._lane.slots, -1, *q_RHE.shape[1:])
        return kernels.attend_to_source(q_NKHE, self._lane.cross[layer], self._lane.lengths_N).flatten(0, 1)


class LaneDecoding(BartDecoding):
    """A question in a lane. Those that began with it are moved on whenever it is."""

    def __init__(self, task: Task, caches: list[DocumentCache], lane: Lane, question: int) -> None:
        super().__init__(task, caches)
        self.lane, self._question = lane, question

    @property
    def finished(self) -> bool:
        return not self.lane.goes_on(self._question)

    @property
    def written(self) -> Tensor | None:
        return self.lane.row(self._question)

    def results(self) -> list[list[Result]]:
        return self.lane.results(self._question)
