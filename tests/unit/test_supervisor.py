"""`services.supervisor`, over stand-in services: small programs that listen, are ready or not, and end as told.

The real services under it are tested in tests/e2e.
"""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from services.client.calls import Service
from services.supervisor.address import check_free, url_of
from services.supervisor.child import Child, ServiceSpec
from services.supervisor.pair import Pair, restart_delay_s
from services.supervisor.reporter import ConsoleReporter, JsonReporter
from shared.errors import StartupError

# Listens at PORT; is ready once the file READY exists; on SIGTERM notes its name in the file ENDED.
SERVICE = """
import http.server, json, os, signal, sys
name, port, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ok = not os.path.exists(f"{folder}/{name}.unready")
        body = {"status": "ok", "reasons": []} if ok else {"status": "unavailable", "reasons": ["loading"]}
        self.send_response(200 if ok else 503)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass

def stop(*_):
    with open(f"{folder}/ended", "a") as ended:
        ended.write(name + " ")
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
print(f"{name} listens", flush=True)
if os.path.exists(f"{folder}/{name}.refuses"):
    print("no passages: build them first", file=sys.stderr, flush=True)
    sys.exit(3)
http.server.HTTPServer.allow_reuse_address = True
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@dataclass
class Record:
    """A reporter that keeps what it was told."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    waits: list[Mapping[Service, Sequence[str]]] = field(default_factory=list)
    ups: list[Mapping[Service, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def line(self, service: Service, text: str) -> None:
        self.lines.append((service, text))

    def waiting(self, reasons: Mapping[Service, Sequence[str]]) -> None:
        self.waits.append(dict(reasons))

    def up(self, urls: Mapping[Service, str], took_s: float) -> None:
        self.ups.append(dict(urls))

    def note(self, text: str, service: Service | None = None) -> None:
        self.notes.append(f"{service}: {text}")

    def failure(self, text: str, service: Service | None = None) -> None:
        self.failures.append(f"{service}: {text}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until(condition: Callable[[], object], within_s: float = 20) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        # A zombie whose parent has not asked for it yet is dead.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def specs(tmp_path: Path) -> tuple[ServiceSpec, ServiceSpec]:
    script = tmp_path / "service.py"
    script.write_text(SERVICE)

    def spec(name: Service) -> ServiceSpec:
        port = free_port()
        command = (sys.executable, "-S", str(script), name, str(port), str(tmp_path))
        return ServiceSpec(name, command, url_of("127.0.0.1", port), stop_grace_s=5)

    return spec("generator"), spec("retriever")


@pytest.fixture
def report() -> Record:
    return Record()


def pid_of(pair: Pair, name: Service) -> int:
    return pair.children[name].pid


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


async def test_it_is_up_once_both_are_ready(specs: tuple[ServiceSpec, ...], report: Record, tmp_path: Path) -> None:
    unready = tmp_path / "generator.unready"
    unready.touch()
    running = asyncio.create_task(Pair(specs, report).run())
    await until(lambda: {"generator": ["loading"]} in report.waits)
    assert report.ups == []
    unready.unlink()
    await until(lambda: report.ups)
    assert report.ups == [{spec.name: spec.url for spec in specs}]
    assert ("retriever", "retriever listens") in report.lines
    interrupt()
    assert await running == 0


async def test_a_signal_stops_the_generator_before_the_retriever_that_it_needs(
    specs: tuple[ServiceSpec, ...], report: Record, tmp_path: Path
) -> None:
    running = asyncio.create_task(Pair(specs, report).run())
    await until(lambda: report.ups)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    assert (tmp_path / "ended").read_text().split() == ["generator", "retriever"]


async def test_a_failed_start_ends_the_pair_with_the_code_of_that_service(
    specs: tuple[ServiceSpec, ...], report: Record, tmp_path: Path
) -> None:
    (tmp_path / "retriever.refuses").touch()
    pair = Pair(specs, report)
    assert await pair.run() == StartupError.exit_code
    assert ("retriever", "no passages: build them first") in report.lines
    assert "retriever" in report.failures[0]
    assert not alive(pid_of(pair, "generator"))


async def test_a_crashed_service_comes_back(specs: tuple[ServiceSpec, ...], report: Record) -> None:
    pair = Pair(specs, report)
    running = asyncio.create_task(pair.run())
    await until(lambda: report.ups)
    generator, crashed = pid_of(pair, "generator"), pid_of(pair, "retriever")
    os.kill(crashed, signal.SIGKILL)
    await until(lambda: any("is back" in note for note in report.notes))
    assert "137" in report.notes[0]
    assert pid_of(pair, "retriever") != crashed
    assert pid_of(pair, "generator") == generator
    interrupt()
    assert await running == 0


async def test_a_service_that_can_no_longer_start_is_not_started_again(
    specs: tuple[ServiceSpec, ...], report: Record, tmp_path: Path
) -> None:
    pair = Pair(specs, report)
    running = asyncio.create_task(pair.run())
    await until(lambda: report.ups)
    (tmp_path / "retriever.refuses").touch()
    os.kill(pid_of(pair, "retriever"), signal.SIGKILL)
    assert await running == StartupError.exit_code


def test_delays_double_up_to_half_a_minute() -> None:
    assert [restart_delay_s(crashes) for crashes in (1, 2, 3, 7, 100)] == [0.5, 1, 2, 30, 30]


async def test_a_child_that_does_not_drain_is_killed() -> None:
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    heard: list[str] = []
    child = await Child.start(ServiceSpec("generator", (sys.executable, "-c", deaf), "http://x"), heard.append)
    await until(lambda: heard)
    await child.stop(grace_s=0.2)
    assert await child.wait() == 128 + signal.SIGKILL


async def test_a_child_dies_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    # A process in the middle plays the supervisor, so that it can be killed.
    middle = f"""
import asyncio, pathlib, sys
from services.supervisor.child import Child, ServiceSpec

async def main():
    command = (sys.executable, "-c", "import os, time; print(os.getpid()); time.sleep(60)")
    child = await Child.start(ServiceSpec("generator", command, ""), pathlib.Path({str(tmp_path / "pid")!r}).write_text)
    await child.wait()

asyncio.run(main())
"""
    supervisor = await asyncio.create_subprocess_exec(sys.executable, "-c", middle)
    await until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    supervisor.kill()
    await supervisor.wait()
    await until(lambda: not alive(pid), within_s=5)


async def test_a_line_without_end_does_not_stop_the_reading() -> None:
    heard: list[str] = []
    flood = "print('x' * 3_000_000); print('still here')"
    child = await Child.start(ServiceSpec("generator", (sys.executable, "-c", flood), ""), heard.append)
    assert await child.wait() == 0
    assert heard[-1] == "still here"


def test_a_taken_port_is_named_with_what_to_do() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StartupError, match=rf"127\.0\.0\.1:{port}.*rag up --port {port + 10}"):
            check_free("127.0.0.1", port, "--port")
    check_free("127.0.0.1", port, "--port")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8"),
        ("0.0.0.0", "http://127.0.0.1:8"),  # noqa: S104
        ("::", "http://[::1]:8"),
    ],
)
def test_the_printed_address_is_one_that_can_be_opened(host: str, url: str) -> None:
    assert url_of(host, 8) == url


def test_people_see_whose_line_it_is() -> None:
    out = StringIO()
    reporter = ConsoleReporter(Console(file=out, width=40))
    reporter.line("retriever", "[bold]not markup[/bold], and longer than the terminal is wide")
    assert out.getvalue() == "retriever │ [bold]not markup[/bold], and longer than the terminal is wide\n"


@pytest.mark.parametrize(("port", "option"), [(8000, ""), (8010, " --url http://127.0.0.1:8010")])
def test_the_hint_asks_the_services_that_were_started(port: int, option: str) -> None:
    out = StringIO()
    ConsoleReporter(Console(file=out)).up({"generator": url_of("127.0.0.1", port)}, took_s=1.0)
    assert f'rag ask "How many people live in Paris?"{option}\n' in out.getvalue()


def test_without_a_terminal_the_reasons_are_said_once() -> None:
    out = StringIO()
    reporter = ConsoleReporter(Console(file=out))
    for _ in range(3):
        reporter.waiting({"retriever": ["building the index"]})
    assert out.getvalue() == "waiting for the retriever: building the index\n"


def test_json_logs_are_json_whoever_writes() -> None:
    out = StringIO()
    reporter = JsonReporter(out)
    reporter.line("retriever", '{"event": "ready"}')
    reporter.line("generator", "Segmentation fault")
    reporter.waiting({"generator": ["loading"]})
    reporter.up({"generator": "http://g"}, 1.0)
    reporter.note("ended", "retriever")
    entries = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [entry["event"] for entry in entries] == ["ready", "Segmentation fault", "waiting", "ready", "ended"]
    assert [entry["service"] for entry in entries] == [
        "retriever",
        "generator",
        "supervisor",
        "supervisor",
        "retriever",
    ]
