"""What the chassis does about traces: on, off, and with a collector that fails."""

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from generator_svc.app import create_app
from generator_svc.checkpoint import load_checkpoint
from generator_svc.settings import GeneratorSettings
from tests.chassis_app import TinySettings, create_tiny_app
from tests.conftest import ClientFor
from tests.otlp import Receiver, receiving
from tests.serving import free_port, served
from tests.small_retriever import SmallRetriever
from tests.tiny_checkpoint import save_tiny_checkpoint

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"


async def exported(client_for: ClientFor, *paths: str, **settings: object) -> Receiver:
    """What a collector has after the tiny service answered these requests and stopped."""
    with receiving() as receiver:
        app = create_tiny_app(TinySettings(otlp_endpoint=receiver.url, **settings))
        async with client_for(app) as http:
            for path in paths:
                await http.get(path, headers={"traceparent": TRACEPARENT})
    return receiver


async def test_a_stop_sends_the_last_spans(client_for: ClientFor) -> None:
    receiver = await exported(client_for, "/v1/items/1")
    [span] = receiver.traces[TRACE]
    assert (span.name, span.kind, span.service) == ("GET /v1/items/{item_id}", "SERVER", "rag-retriever")
    assert span.parent_id == CALLER
    assert span.attributes["http.response.status_code"] == 200


async def test_the_service_is_called_as_the_settings_say(client_for: ClientFor) -> None:
    receiver = await exported(client_for, "/v1/items/1", otlp_service_name="library")
    assert receiver.traces[TRACE][0].service == "library"


async def test_what_is_polled_leaves_no_spans(client_for: ClientFor) -> None:
    receiver = await exported(client_for, "/livez", "/readyz", "/metrics")
    assert not receiver.traces


async def test_errors_are_marked_without_their_message(client_for: ClientFor) -> None:
    receiver = await exported(client_for, "/v1/crash", "/v1/raise/inference_failed")
    assert [span.failed for span in receiver.traces[TRACE]] == [True, True]
    assert not any(b"secret of the crash" in body or b"on purpose" in body for body in receiver.bodies)


async def test_the_ratio_decides_for_requests_that_come_without_a_decision(client_for: ClientFor) -> None:
    with receiving() as receiver:
        app = create_tiny_app(TinySettings(otlp_endpoint=receiver.url, otlp_sample_ratio=0))
        async with client_for(app) as http:
            await http.get("/v1/items/1")
            await http.get("/v1/items/1", headers={"traceparent": TRACEPARENT})
    assert list(receiver.traces) == [TRACE]


async def test_a_collector_that_is_not_there_harms_no_request(client_for: ClientFor) -> None:
    app = create_tiny_app(TinySettings(otlp_endpoint=f"http://127.0.0.1:{free_port()}"))
    async with client_for(app) as http:
        answers = [await http.get("/v1/items/1") for _ in range(20)]
    assert {answer.status_code for answer in answers} == {200}


async def test_a_collector_that_refuses_or_hangs_does_not_keep_the_service_from_stopping(
    client_for: ClientFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.telemetry._FLUSH_S", 0.2)
    asked, release = threading.Event(), threading.Event()

    class Hangs(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.set()
            release.wait(30)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with HTTPServer(("127.0.0.1", 0), Hangs) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            app = create_tiny_app(TinySettings(otlp_endpoint=f"http://127.0.0.1:{server.server_port}"))
            async with client_for(app) as http:
                assert (await http.get("/v1/items/1")).status_code == 200
            # The lifespan is over while the collector still hangs.
            assert asked.wait(10)
            assert not release.is_set()
        finally:
            release.set()
            server.shutdown()


def test_without_an_endpoint_the_sdk_is_not_even_imported() -> None:
    code = (
        "import sys; from tests.chassis_app import create_tiny_app; create_tiny_app();"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_a_service_that_makes_no_traces_passes_on_the_one_it_got(client_for: ClientFor, tmp_path: Path) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path)
    retriever = SmallRetriever(np.eye(16, dtype=np.float32), load_checkpoint(checkpoint).encoder)
    with served(retriever.app) as url:
        app = create_app(GeneratorSettings(checkpoint=str(checkpoint), retriever_url=url))
        async with client_for(app) as http:
            headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1"}
            question = {"question": "Where is Paris?", "max_new_tokens": 2}
            assert (await http.post("/v1/answer", json=question, headers=headers)).status_code == 200
            assert (await http.post("/v1/answer", json=question)).status_code == 200
    seen = [
        {name: request.headers.get(name) for name in ("traceparent", "tracestate")} for request, _ in retriever.requests
    ]
    assert seen == [headers, {"traceparent": None, "tracestate": None}]


@pytest.mark.parametrize(
    "given", ["00-0-0-01", "nonsense", f"00-{'0' * 32}-{CALLER}-01", "\N{LATIN SMALL LETTER E WITH ACUTE}"]
)
async def test_a_traceparent_that_is_none_is_ignored(client_for: ClientFor, given: str) -> None:
    async with client_for(create_tiny_app()) as http:
        answer = await http.get("/v1/items/1", headers=[(b"traceparent", given.encode("latin-1"))])
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("http://collector:4318", "http://collector:4318"),
        ("https://collector/", "https://collector"),
        ("http://collector:4318/v1/traces", "http://collector:4318"),
        (None, None),
    ],
)
def test_the_endpoint_is_the_base_url(given: str | None, kept: str | None) -> None:
    assert TinySettings(otlp_endpoint=given).otlp_endpoint == kept


@pytest.mark.parametrize("given", ["collector:4318", "ftp://collector", "http://"])
def test_an_endpoint_that_is_no_url_is_refused(given: str) -> None:
    with pytest.raises(ValidationError, match="must begin with http"):
        TinySettings(otlp_endpoint=given)
