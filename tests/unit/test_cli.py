"""`rag`: what each command prints, and its exit code. It talks to a small HTTP server with canned responses; the
real services under it are tested in tests/e2e.
"""

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from services.cli import main
from services.cli.app import app
from shared.errors import (
    ERRORS_BY_CODE,
    EncoderMismatch,
    Forbidden,
    InvalidRequest,
    RagError,
    Unauthorized,
    Unavailable,
    error_to_wire,
)
from shared.schemas import (
    Answer,
    AnswerResponse,
    CollectionInfo,
    Document,
    Health,
    IndexInfo,
    QuestionResult,
    SearchParams,
    SearchResponse,
    SearchResult,
    ServiceInfo,
)

INDEX = IndexInfo(collection="default", generation="g1", encoder="e1")
DOCUMENTS = [
    Document(id=1, title="Lyon", text="Lyon has 522 250 people.", score=9.0, prior=0.6),
    Document(id=2, title="Paris [FR]", text="Paris has 2 138 551 people.", score=8.6, prior=0.4),
]
ANSWERS = [
    Answer(text="2 138 551", log_prob=-0.1, probability=0.905, doc_posterior=[0.01, 0.99]),
    Answer(text="522 250", log_prob=-3.0, probability=0.05, doc_posterior=[0.97, 0.03]),
]
LIMITS: dict[str, Any] = {"limits": {"max_n_docs": 50}, "versions": {"numpy": "2"}, "device": "cpu", "version": "0.1.0"}
COLLECTION = CollectionInfo(
    name="default",
    generation="g1",
    encoder="e1",
    kind="flat",
    factory="Flat",
    search_params=SearchParams(),
    version=0,
    metric="inner_product",
    dimension=4,
    count=12_345,
    dtype="float16",
    device="cpu",
    created_at="2026-01-01T00:00:00Z",
)


def answered(abstained: bool = False, answers: Sequence[Answer] = ANSWERS) -> dict[str, Any]:
    result = QuestionResult(question="q", answers=list(answers), abstained=abstained, documents=DOCUMENTS)
    response = AnswerResponse(model="demo", strategy="token", results=[result], index=INDEX, timings_ms={"total": 1.0})
    return response.model_dump()


class Canned(http.server.ThreadingHTTPServer):
    """Answers each path with (status, JSON) of ``responses``; keeps the bodies that it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        self.responses: dict[str, tuple[int, Any]] = {}
        self.received: list[Any] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Canned

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.server.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer()

    def _answer(self) -> None:
        status, body = self.server.responses[self.path]
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Not onto the output that the tests look at."""


@pytest.fixture
def service() -> Iterator[Canned]:
    with Canned() as server:
        server.responses["/v1/answer"] = 200, answered()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


Rag = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rag(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Rag:
    """Run `rag` with these arguments: (exit code, what it printed, what it complained)."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_the_answer_comes_with_its_probability_and_the_passage_it_rests_on(rag: Rag, service: Canned) -> None:
    service.responses["/v1/answer"] = 200, answered(answers=ANSWERS[:1])
    code, out, _ = rag("ask", "How many?", "--url", service.url)
    assert code == 0
    assert "2 138 551   probability 0.905" in out
    assert "from Paris [FR]   prior 0.400, posterior 0.990" in out
    assert "Paris has 2 138 551 people." in out
    assert "Lyon" not in out


def test_options_reach_the_service(rag: Rag, service: Canned) -> None:
    options = ["--n-docs", "7", "--answers", "3", "--strategy", "sequence", "--min-probability", "0.2"]
    options += ["--collection", "news", "--filter", "year > 1990"]
    rag("ask", "q", "--url", service.url, *options, "--timeout-ms", "900")
    sent = service.received[0]
    assert sent == {
        "question": "q",
        "collection": "news",
        "filter": "year > 1990",
        "n_docs": 7,
        "num_beams": 3,
        "num_return_sequences": 3,
        "strategy": "sequence",
        "min_probability": 0.2,
        "timeout_ms": 900,
    }


def test_several_answers_and_passages_can_be_asked_for(rag: Rag, service: Canned) -> None:
    _, out, _ = rag("ask", "q", "--answers", "2", "--passages", "2", "--url", service.url)
    assert out.index("2 138 551") < out.index("522 250") < out.index("from Paris") < out.index("from Lyon")


def test_it_says_that_it_does_not_know(rag: Rag, service: Canned) -> None:
    service.responses["/v1/answer"] = 200, answered(abstained=True, answers=[])
    code, out, _ = rag("ask", "q", "--min-probability", "0.99", "--url", service.url)
    assert code == 0
    assert "I do not know" in out
    assert "from Lyon   prior 0.600" in out


def test_json_is_the_response_itself(rag: Rag, service: Canned) -> None:
    _, out, _ = rag("ask", "q", "--json", "--url", service.url)
    assert json.loads(out) == answered()


def test_a_search_may_be_confined_to_a_collection_and_a_filter(rag: Rag, service: Canned) -> None:
    results = [SearchResult(question="q", documents=DOCUMENTS)]
    response = SearchResponse(results=results, index=INDEX, timings_ms={"total": 1.0})
    service.responses["/v1/search"] = 200, response.model_dump()
    rag("search", "q", "--collection", "news", "--filter", "year > 1990", "--url", service.url)
    assert service.received[0]["collection"] == "news"
    assert service.received[0]["filter"] == "year > 1990"


def test_search_ranks_passages(rag: Rag, service: Canned) -> None:
    results = [SearchResult(question="q", documents=DOCUMENTS)]
    response = SearchResponse(results=results, index=INDEX, timings_ms={"total": 1.0})
    service.responses["/v1/search"] = 200, response.model_dump()
    _, out, _ = rag("search", "q", "--url", service.url)
    ranks = [line.split()[:3] for line in out.splitlines()[1:3]]
    assert ranks == [["1", "9.00", "0.600"], ["2", "8.60", "0.400"]]


def test_info_shows_both_services(rag: Rag, service: Canned) -> None:
    infos = [
        ServiceInfo(service="generator", model={"name": "demo"}, **LIMITS),
        ServiceInfo(service="retriever", collections=[COLLECTION], **LIMITS),
    ]
    with Canned() as retriever:
        threading.Thread(target=retriever.serve_forever, kwargs={"poll_interval": 0.01}).start()
        for server, info in zip((service, retriever), infos, strict=True):
            server.responses["/info"] = 200, info.model_dump()
        service.responses["/readyz"] = 200, Health(status="ok").model_dump()
        retriever.responses["/readyz"] = 503, Health(status="unavailable", reasons=["building"]).model_dump()
        code, out, _ = rag("info", "--url", service.url, "--retriever-url", retriever.url)
        retriever.shutdown()
    assert code == 0
    assert f"generator 0.1.0 at {service.url} on cpu: ready" in out
    assert "not ready: building" in out
    assert "12345" in out
    assert "max_n_docs" in out


def test_a_refusal_is_told_with_its_request(rag: Rag, service: Canned) -> None:
    service.responses["/v1/answer"] = 422, error_to_wire(InvalidRequest("n_docs: at most 50"), "r-17")
    code, out, err = rag("ask", "q", "--n-docs", "51", "--url", service.url)
    assert (code, out) == (1, "")
    assert "n_docs: at most 50" in err
    assert "r-17" in err


def test_without_services_it_says_how_to_start_them(rag: Rag) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        code, _, err = rag("ask", "q", "--url", url)
    assert code == 4
    assert url in err
    assert "rag up" in err


def test_a_service_that_is_not_ready_yet_has_the_same_code_as_none(rag: Rag, service: Canned) -> None:
    service.responses["/v1/answer"] = 503, error_to_wire(Unavailable("loading the checkpoint"))
    code, _, err = rag("ask", "q", "--url", service.url)
    assert code == 4
    assert "loading the checkpoint" in err


def test_a_missing_key_is_asked_for(rag: Rag, service: Canned) -> None:
    service.responses["/v1/answer"] = 401, error_to_wire(Unauthorized("this needs a key"))
    code, _, err = rag("ask", "q", "--url", service.url)
    assert code == 1
    assert "--api-key" in err


def test_up_refuses_a_taken_port(rag: Rag, service: Canned) -> None:
    code, _, err = rag("up", "--port", str(service.server_port))
    assert code == 3
    assert f"rag up --port {service.server_port + 10}" in err


def test_up_refuses_one_port_for_both(rag: Rag) -> None:
    code, _, err = rag("up", "--port", "9000", "--retriever-port", "9000")
    assert code == 3
    assert "9000" in err


def test_wrong_usage_has_code_2(rag: Rag) -> None:
    assert rag("ask", "q", "--min-probability", "2")[0] == 2


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command of `rag` by its words, groups left out."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())
OF_A_MODULE = {("demo", "train"), ("demo", "eval")}  # their options, and help, are those of the module


@pytest.mark.parametrize("command", [(), ("index",), ("demo",), *sorted(COMMANDS.keys() - OF_A_MODULE)], ids=" ".join)
def test_every_command_explains_itself(rag: Rag, command: tuple[str, ...]) -> None:
    code, out, _ = rag(*command, "--help")
    assert code == 0
    assert f"Usage: {' '.join(('rag', *command))}" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - OF_A_MODULE), ids=" ".join)
def test_every_command_shows_an_example(rag: Rag, command: tuple[str, ...]) -> None:
    assert f"`rag {' '.join(command)}" in str(COMMANDS[command].help)


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - OF_A_MODULE - {("up",), ("demo", "build")}), ids=" ".join)
def test_every_command_that_tells_something_tells_it_as_json(command: tuple[str, ...]) -> None:
    options = {option for parameter in COMMANDS[command].params for option in parameter.opts}
    assert "--json" in options


def test_info_is_one_json_document(rag: Rag, service: Canned) -> None:
    info = ServiceInfo(service="generator", model={"name": "demo"}, **LIMITS)
    service.responses["/info"] = 200, info.model_dump()
    service.responses["/readyz"] = 503, Health(status="unavailable", reasons=["building"]).model_dump()
    code, out, _ = rag("info", "--json", "--url", service.url, "--retriever-url", service.url)
    assert code == 0
    found = json.loads(out)["generator"]
    assert (found["url"], found["info"]["model"]) == (service.url, {"name": "demo"})
    assert found["health"] == {"status": "unavailable", "reasons": ["building"]}


def test_errors_leave_standard_output_to_json(rag: Rag, service: Canned) -> None:
    service.responses["/v1/answer"] = 422, error_to_wire(InvalidRequest("n_docs: at most 50"), "r-17")
    code, out, err = rag("ask", "q", "--json", "--url", service.url)
    assert (code, out) == (1, "")
    assert "n_docs" in err


@pytest.mark.parametrize("error", ERRORS_BY_CODE.values(), ids=lambda error: error.code)
def test_what_another_try_or_a_setting_would_mend_says_so(rag: Rag, service: Canned, error: type[RagError]) -> None:
    service.responses["/v1/answer"] = error.status, error_to_wire(error("it went wrong"))
    _, _, err = rag("ask", "q", "--url", service.url)
    assert "it went wrong" in err
    if error.retryable or error in (Unauthorized, Forbidden, EncoderMismatch):
        assert len(err.strip().splitlines()) > 1, "no word on what to do"


def colours(text: str) -> list[str]:
    return re.findall(r"\x1b\[[0-9;]*\b(?:3[0-7]|9[0-7]|38|4[0-7])[0-9;]*m", text)


@pytest.mark.parametrize("no_color", [False, True])
def test_colours_respect_no_color(service: Canned, no_color: bool) -> None:
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": "100"}
    environment |= {"NO_COLOR": "1"} if no_color else {}
    for command in (["ask", "q", "--url", service.url], ["--help"]):
        ran = subprocess.run(
            [sys.executable, "-m", "services.cli", *command],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert bool(colours(ran.stdout)) != no_color, ran.stdout


@pytest.mark.parametrize(
    ("words", "expected"), [("rag do", "doctor"), ("rag index re", "reload"), ("rag ask --num", "--num-beams")]
)
def test_the_shell_completes_commands_and_options(words: str, expected: str) -> None:
    asked = {"_RAG_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    ran = subprocess.run(
        [sys.executable, "-m", "services.cli"], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert expected in ran.stdout.split()


def test_completion_is_installed_for_the_shell(tmp_path: Path) -> None:
    home = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "services.cli", "--install-completion", "bash"]
    subprocess.run(command, env=home, capture_output=True, text=True, check=True)
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "_RAG_COMPLETE" in written


def test_the_exit_codes_are_documented(rag: Rag) -> None:
    out = " ".join(rag("--help")[1].split())
    for code in range(5):
        assert f"{code} " in out.partition("Exit codes:")[2]


def test_the_command_starts_without_the_heavy_libraries() -> None:
    heavy = {"torch", "transformers", "faiss", "pyarrow", "numpy", "httpx"}
    program = f"import sys, services.cli; print(*({heavy!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option"), [("train", "--steps"), ("eval", "--questions")])
def test_the_commands_of_the_demo_have_the_options_of_their_modules(command: str, option: str) -> None:
    rag = [sys.executable, "-m", "services.cli", "demo", command, "--help"]
    assert option in subprocess.run(rag, capture_output=True, text=True, check=True).stdout
