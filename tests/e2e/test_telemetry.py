"""A question's trace through both services, as a real OTLP receiver gets it, and what the logs say of the request."""

import itertools
import json
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.running import Up, until
from tests.otlp import Receiver, Span, receiving

pytestmark = pytest.mark.slow
QUESTION = "How many people live in Paris?"
CALLER = "00f067aa0ba902b7"
GENERATOR, RETRIEVER = "rag-generator", "rag-retriever"
ON_THE_WAY = [
    (GENERATOR, "receive", []),
    (GENERATOR, "encode", [(GENERATOR, "queue", [])]),
    (
        GENERATOR,
        "retrieve",
        [
            (
                GENERATOR,
                "POST /v1/retrieve",
                [
                    (
                        RETRIEVER,
                        "POST /v1/retrieve",
                        [(RETRIEVER, stage, []) for stage in ("receive", "queue", "search", "take", "respond")],
                    )
                ],
            )
        ],
    ),
    (GENERATOR, "assemble", [(GENERATOR, "queue", [])]),
    (GENERATOR, "generate", [(GENERATOR, stage, []) for stage in ("queue", "prefill", "decode")]),
    (GENERATOR, "respond", []),
]

WHOLE = [("POST /v1/answer", "SERVER"), ("generate", "INTERNAL"), ("POST /v1/retrieve", "SERVER")]
"""The spans that their children fill."""


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture(scope="module")
def traced(up: Up, data_dir: Path, receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """The demo again, with traces on and logs as JSON."""
    running = Up.start(
        shutil.copytree(data_dir, tmp_path_factory.mktemp("traced") / "data"),
        "--json-logs",
        GENERATOR_OTLP_ENDPOINT=receiver.url,
        RETRIEVER_OTLP_ENDPOINT=receiver.url,
        GENERATOR_MAX_CONCURRENT="64",  # so that questions share batches
        OTEL_BSP_SCHEDULE_DELAY="100",
    )
    try:
        yield running.wait_until_ready()
    finally:
        running.stop()


def ask(up: Up, question: str | list[str] = QUESTION, *, sampled: bool = True, **options: object) -> tuple[str, str]:
    """Ask as a caller who traces; the ids of trace and request."""
    trace_id, request_id = uuid.uuid4().hex, uuid.uuid4().hex
    headers = {"traceparent": f"00-{trace_id}-{CALLER}-{'01' if sampled else '00'}", "X-Request-ID": request_id}
    answered = httpx.post(f"{up.url}/v1/answer", json={"question": question, **options}, headers=headers, timeout=60)
    answered.raise_for_status()
    return trace_id, request_id


def root_of(receiver: Receiver, trace_id: str) -> Span:
    """The outermost span of a trace, once all have come."""

    def arrived() -> list[Span]:
        return [span for span in list(receiver.traces[trace_id]) if span.parent_id == CALLER]

    [root] = until(arrived, 30, f"the trace {trace_id}")
    # The retriever's spans come by themselves, and before the generator's root has ended or a moment after.
    until(
        lambda: any(span.service == RETRIEVER and span.kind == "SERVER" for span in list(receiver.traces[trace_id])),
        30,
        "both",
    )
    return root


def test_a_question_is_one_trace_with_every_stage_of_both_services(traced: Up, receiver: Receiver) -> None:
    trace_id, _ = ask(traced)
    root = root_of(receiver, trace_id)
    assert receiver.tree(root) == (GENERATOR, "POST /v1/answer", ON_THE_WAY)
    assert (root.kind, root.attributes["http.response.status_code"]) == ("SERVER", 200)
    assert not any(span.failed for span in receiver.traces[trace_id])
    by_name = {(span.service, span.name, span.kind): span for span in receiver.traces[trace_id]}
    call = by_name[GENERATOR, "POST /v1/retrieve", "CLIENT"]
    assert (call.attributes["url.full"], call.attributes["http.response.status_code"]) == (
        f"{traced.retriever_url}/v1/retrieve",
        200,
    )
    search = by_name[RETRIEVER, "search", "INTERNAL"].attributes
    assert (search["db.system.name"], search["db.collection.name"], search["rag.batch.vectors"]) == (
        "faiss",
        "default",
        1,
    )
    assert by_name[GENERATOR, "prefill", "INTERNAL"].attributes["gen_ai.usage.input_tokens"] > 100
    assert by_name[GENERATOR, "decode", "INTERNAL"].attributes["gen_ai.usage.output_tokens"] > 1


def test_the_stages_add_up(traced: Up, receiver: Receiver) -> None:
    """The best of 15 questions: a moment in which another process runs falls between two stages now and then."""
    for _ in range(3):
        ask(traced)
    traces = [ask(traced, num_beams=4)[0] for _ in range(15)]
    uncovered: dict[tuple[str, str], list[float]] = {span: [] for span in WHOLE}
    for trace_id in traces:
        root_of(receiver, trace_id)
        for span in receiver.traces[trace_id]:
            if (span.name, span.kind) in uncovered:
                stages = receiver.children(span)
                for before, after in itertools.pairwise(stages):
                    assert before.ended_ns <= after.began_ns + 1000, "stages follow each other"
                uncovered[span.name, span.kind].append(1 - sum(stage.seconds for stage in stages) / span.seconds)
    shares = {name: min(found) for name, found in uncovered.items()}
    assert all(share < 0.05 for share in shares.values()), shares


def test_questions_that_share_a_batch_have_their_own_spans(traced: Up, receiver: Receiver) -> None:
    traces: list[str] = []
    askers = [threading.Thread(target=lambda: traces.append(ask(traced)[0])) for _ in range(6)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    for trace_id in traces:
        assert receiver.tree(root_of(receiver, trace_id)) == (GENERATOR, "POST /v1/answer", ON_THE_WAY)
    shared = [
        span.attributes["rag.batch.items"]
        for trace_id in traces
        for span in receiver.traces[trace_id]
        if span.name == "queue"
    ]
    assert len(shared) == 6 * 4
    assert max(shared) > 1


def test_each_question_of_a_request_is_decoded_in_a_span_of_its_own(traced: Up, receiver: Receiver) -> None:
    trace_id, _ = ask(traced, [QUESTION, "What is the symbol of gold?"])
    root_of(receiver, trace_id)
    names = sorted(span.name for span in receiver.traces[trace_id])
    assert [names.count(name) for name in ("prefill", "decode", "search", "take")] == [2, 2, 1, 1]


def test_a_caller_that_does_not_sample_decides_for_both(traced: Up, receiver: Receiver) -> None:
    unsampled, request_id = ask(traced, sampled=False)
    sampled, _ = ask(traced)
    root_of(receiver, sampled)
    assert unsampled not in receiver.traces
    assert {entry["trace_id"] for entry in logged(traced, request_id)} == {unsampled}


def test_a_failed_stage_says_how_and_not_what(traced: Up, receiver: Receiver) -> None:
    trace_id = uuid.uuid4().hex
    answer = httpx.post(
        f"{traced.url}/v1/answer",
        json={"question": QUESTION, "collection": "nowhere"},
        headers={"traceparent": f"00-{trace_id}-{CALLER}-01"},
    )
    assert answer.status_code == 404
    root_of(receiver, trace_id)
    [retrieve] = [span for span in receiver.traces[trace_id] if span.name == "retrieve"]
    assert (retrieve.failed, retrieve.attributes["error.type"]) == (True, "not_found")


def logged(up: Up, request_id: str) -> list[dict[str, object]]:
    """The lines of a request, of both services."""

    def lines() -> list[dict[str, object]]:
        entries = [json.loads(line) for line in list(up.lines) if line.startswith("{")]
        found = [entry for entry in entries if entry.get("request_id") == request_id]
        return found if len(found) == 2 else []

    return until(lines, 10, "a line of each service")


def test_logs_of_both_services_are_joined_by_request_and_trace(traced: Up) -> None:
    trace_id, request_id = ask(traced)
    lines = {str(entry["service"]): entry for entry in logged(traced, request_id)}
    assert [lines[service]["route"] for service in ("generator", "retriever")] == ["/v1/answer", "/v1/retrieve"]
    for line in lines.values():
        assert (line["event"], line["status"], line["trace_id"]) == ("request", 200, trace_id)


def test_what_was_asked_and_answered_is_in_no_log_and_no_span(traced: Up, receiver: Receiver, paris: str) -> None:
    asked = "What is the population of Paris, asked in words that stand nowhere else?"
    trace_id, request_id = ask(traced, asked)
    root_of(receiver, trace_id)
    logged(traced, request_id)
    for secret in (asked, "stand nowhere", paris):
        assert secret not in traced.log
        assert not any(secret.encode() in body for body in receiver.bodies)
