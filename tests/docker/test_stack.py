"""The stack answers, stays locked down, and loses nothing over a restart."""

import re
import threading
import time

import httpx
import numpy as np
import pytest

from services.client import RagClient
from services.client.calls import Service
from shared.errors import Forbidden, Unauthorized
from shared.vectors import decode_vectors
from tests.docker.asking import QUESTION, answer
from tests.docker.measured import measured
from tests.docker.stack import Stack, docker
from tests.e2e.running import until

pytestmark = pytest.mark.docker
BOTH: tuple[Service, ...] = ("retriever", "generator")
both_services = pytest.mark.parametrize("service", BOTH)

# Somebody's own passage, in the wording that the demo's reader knows.
OWN_ID = 900_001
OWN_QUESTION = "How many people live in Ovenbridge?"
OWN_FIGURE = "48,213"
OWN_TEXT = (
    f"Ovenbridge lies in France. People in the place pay with the Euro. The population of the place is {OWN_FIGURE}."
)


def write_own_passage(client: RagClient) -> None:
    (vector,) = decode_vectors(client.encode(OWN_QUESTION).vectors)
    client.upsert([{"id": OWN_ID, "title": "Ovenbridge", "text": OWN_TEXT, "embedding": np.asarray(vector).tolist()}])


def test_a_question_is_answered_through_the_published_port(stack: Stack, paris: str) -> None:
    with stack.client() as client:
        assert answer(client) == paris
        assert {client.ready(service).status for service in BOTH} == {"ok"}


@both_services
def test_the_process_has_no_rights_and_no_place_to_write_but_its_volumes(stack: Stack, service: Service) -> None:
    volumes = {"retriever": ["/data"], "generator": ["/models", "/cache"]}[service]
    code = f"""
import errno, os, pathlib
lines = pathlib.Path("/proc/1/status").read_text().splitlines()
status = dict(line.split(":\\t", 1) for line in lines if ":\\t" in line)
print(os.getuid(), os.getgid(), status["Uid"].split()[0], int(status["CapEff"], 16), status["NoNewPrivs"])
for folder in ("/", "/app", "/venv", "/etc", "/var/tmp", "/home"):
    try:
        pathlib.Path(folder, "written").write_text("")
    except OSError as error:
        assert error.errno == errno.EROFS, (folder, error)
    else:
        raise AssertionError(folder)
for folder in {volumes!r} + ["/tmp"]:
    path = pathlib.Path(folder, "written")
    path.write_text("")
    path.unlink()
"""
    assert stack.python(service, code).stdout.split() == ["10001", "10001", "10001", "0", "1"]


@both_services
def test_the_container_runs_as_the_compose_file_says(stack: Stack, service: Service) -> None:
    found = stack.inspect(service)
    assert found["State"]["Health"]["Status"] == "healthy"
    assert found["HostConfig"]["ReadonlyRootfs"] is True
    assert found["HostConfig"]["Memory"] > 0
    assert {binding["HostIp"] for ports in found["HostConfig"]["PortBindings"].values() for binding in ports} == {
        "127.0.0.1"
    }
    mounted = {mount["Destination"] for mount in found["Mounts"] if mount["Type"] == "volume"}
    assert mounted == {"retriever": {"/data"}, "generator": {"/models", "/cache"}}[service]


def test_sigterm_lets_the_request_in_flight_finish_and_refuses_new_ones(stack: Stack, paris: str) -> None:
    answers: list[str] = []

    def ask() -> None:
        with stack.client() as client:
            answers.append(answer(client))

    asking = threading.Thread(target=ask)
    stopping = threading.Thread(target=lambda: stack.compose("stop", "generator"))
    try:
        with stack.client() as client:
            with stack.paused("retriever"):
                asking.start()
                until(lambda: _in_flight(stack) > 1, 20, "the question is in flight, besides the request for /metrics")
                stopping.start()
                until(lambda: "the service is stopping" in client.ready().reasons, 20, "/readyz says that it stops")
                assert answers == []
            asking.join()
            stopping.join()
        assert answers == [paris]
        assert stack.inspect("generator")["State"]["ExitCode"] == 0
    finally:
        stack.wait_until_healthy("retriever")  # it may have been paused for longer than its checks allow
        stack.up()


def _in_flight(stack: Stack) -> int:
    metrics = httpx.get(f"http://127.0.0.1:{stack.port}/metrics", trust_env=False).text
    return max(int(float(n)) for n in re.findall(r"^http_requests_in_flight(?:{.*})? (\S+)$", metrics, re.MULTILINE))


def test_a_restart_of_the_stack_keeps_what_was_written(stack: Stack, paris: str) -> None:
    with stack.client() as client:
        write_own_passage(client)
        assert answer(client, OWN_QUESTION) == OWN_FIGURE
    stack.compose("down")
    assert stack.container("retriever") == ""
    began = time.monotonic()
    stack.up()
    measured("the stack: down, then up --wait", f"ready after {time.monotonic() - began:.1f} s")
    with stack.client() as client:
        assert (answer(client), answer(client, OWN_QUESTION)) == (paris, OWN_FIGURE)
        client.delete([OWN_ID])


def test_keys_come_from_secrets_and_stay_out_of_environment_and_logs(
    stack: Stack, secrets: dict[str, object], paris: str
) -> None:
    stack.variables = {"RAG_API_KEY_FILE": str(secrets["api"]), "RAG_ADMIN_KEY_FILE": str(secrets["admin"])}
    try:
        stack.up()
        with stack.client() as stranger, pytest.raises(Unauthorized):
            answer(stranger)
        with stack.client(api_key="api-key-of-this-test") as reader:
            assert answer(reader) == paris
            with pytest.raises(Forbidden):
                write_own_passage(reader)
        with stack.client(api_key="admin-key-of-this-test") as admin:
            write_own_passage(admin)
            assert answer(admin, OWN_QUESTION) == OWN_FIGURE
            admin.delete([OWN_ID])
        assert "key-of-this-test" not in stack.logs()
        for service in BOTH:
            assert "key-of-this-test" not in docker("inspect", stack.container(service)).stdout
    finally:
        stack.variables = {}
        stack.up()


def test_a_checkpoint_in_the_models_volume_is_served(stack: Stack, paris: str) -> None:
    """Put there by `docker compose cp`, named in a variable, and found again by the next container."""
    source = "services/demo/checkpoint"
    stack.compose("cp", source, "generator:/models/mine")
    found = stack.python("generator", "import os; print(sorted(os.listdir('/models/mine')))").stdout
    assert "model.safetensors" in found
    stack.compose("stop", "generator")
    options = ("-e", "GENERATOR_CHECKPOINT=/models/mine", "--no-deps", "--rm", "-d", "--name", f"{stack.project}-mine")
    stack.compose("run", *options, "generator")
    try:
        ask = (
            "import json, urllib.request as u; print(json.load(u.urlopen(u.Request('http://127.0.0.1:8000/v1/answer', "
            f"json.dumps({{'question': {QUESTION!r}}}).encode(), {{'Content-Type': 'application/json'}}))))"
        )

        def served() -> bool:
            run = docker("exec", f"{stack.project}-mine", "python", "-c", ask, check=False)
            return "'model': 'mine'" in run.stdout and paris in run.stdout

        until(served, 90, "the checkpoint of the volume answers")
    finally:
        docker("rm", "-f", f"{stack.project}-mine")
        stack.up()
