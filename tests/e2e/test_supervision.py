"""`rag up` keeps both services, and leaves nothing behind however it ends."""

import json
import os
import shutil
import signal
from pathlib import Path

import httpx
import pytest

from tests.e2e.running import START_WITHIN_S, Up, alive, until

pytestmark = pytest.mark.slow


def test_a_service_that_crashes_is_started_again(own_up: Up) -> None:
    for service in ("generator", "retriever"):
        crashed = own_up.pid_of(service)
        os.kill(crashed, signal.SIGKILL)
        until(lambda: f"the {service} is back" in own_up.log, START_WITHIN_S, "rag up says that it is back")  # noqa: B023
        assert own_up.pid_of(service) not in (0, crashed)
        own_up.wait_until_ready()
    with own_up.client() as client:
        assert client.answer("How many people live in Paris?").results[0].answers


def test_sigterm_stops_both_and_leaves_no_process(own_up: Up) -> None:
    pids = [own_up.pid_of("generator"), own_up.pid_of("retriever")]
    assert own_up.stop() == 0
    assert not any(map(alive, pids))


def test_ctrl_c_stops_both_and_leaves_no_process(own_up: Up) -> None:
    pids = [own_up.pid_of("generator"), own_up.pid_of("retriever")]
    own_up.process.send_signal(signal.SIGINT)
    assert own_up.process.wait(60) == 0
    assert not any(map(alive, pids))


def test_a_killed_supervisor_leaves_no_process(own_up: Up) -> None:
    pids = [own_up.pid_of("generator"), own_up.pid_of("retriever")]
    assert all(map(alive, pids))
    own_up.process.kill()
    own_up.process.wait(10)
    until(lambda: not any(map(alive, pids)), 10, "both services gone")


def test_a_second_pair_on_the_same_port_says_who_has_it(up: Up) -> None:
    port = up.url.rpartition(":")[2]
    ran = up.rag("up", "--port", port)
    assert ran.returncode == 3
    assert "a generator service runs there already" in ran.stderr
    assert "rag up --port" in ran.stderr


def test_a_service_that_cannot_start_ends_the_pair_with_its_own_words(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    failing = Up.start(tmp_path / "data", GENERATOR_CHECKPOINT=str(missing))
    assert failing.process.wait(120) == 3
    until(lambda: "could not start" in failing.log, 5, "the last words")
    assert str(missing) in failing.log


def test_a_misspelt_setting_is_refused_by_name(tmp_path: Path) -> None:
    failing = Up.start(tmp_path / "data", GENERATOR_MAX_BEEMS="4")
    assert failing.process.wait(120) == 3
    until(lambda: "could not start" in failing.log, 5, "the last words")
    assert "GENERATOR_MAX_BEEMS" in failing.log


def test_a_key_guards_the_answers_and_not_the_page(up: Up, data_dir: Path, tmp_path: Path) -> None:
    running = Up.start(shutil.copytree(data_dir, tmp_path / "data"), GENERATOR_API_KEY="open-sesame")
    try:
        running.wait_until_ready()
        assert httpx.get(f"{running.url}/").status_code == 200
        refused = running.rag("ask", "How many people live in Paris?")
        assert refused.returncode == 1
        assert "RAG_API_KEY" in refused.stderr
        assert running.rag("ask", "How many people live in Paris?", "--api-key", "open-sesame").returncode == 0
    finally:
        running.stop()


def test_json_logs_are_json_throughout(up: Up, data_dir: Path, tmp_path: Path) -> None:
    running = Up.start(shutil.copytree(data_dir, tmp_path / "data"), "--json-logs").wait_until_ready()
    assert running.stop() == 0
    entries = [json.loads(line) for line in running.lines]
    assert {"retriever", "generator", "supervisor"} <= {entry.get("service") for entry in entries}
