"""``/openapi.json`` tells the truth: schemathesis sends every operation what it allows and what it forbids."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from generator_svc.checkpoint import load_checkpoint
from tests.serving import free_port, served
from tests.small_retriever import SmallRetriever
from tests.tiny_checkpoint import save_tiny_checkpoint

ROOT = Path(__file__).parents[2]

# A JSON schema cannot say that an option needs another one, that a number is bounded by a setting, or that a question
# must leave room for a passage: here data that it allows may be refused, by a 422. It allows the name of a collection
# that is not there, 404, and a deadline of one millisecond, which is missed, 504.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "404", "422", "504"]

[checks.not_a_server_error]
expected-statuses = ["2xx", "4xx", "504"]

# OpenAI's shapes refuse by 400, as OpenAI does.
[[operations]]
include-path-regex = "/v1/(chat/completions|embeddings)"

[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "404", "504"]

[operations.checks.not_a_server_error]
expected-statuses = ["2xx", "4xx", "504"]
"""
OPTIONS = ["--checks", "all", "--continue-on-failure", "--seed", "7", "--no-color"]
HOOKS = ROOT / "tests" / "schemathesis_hooks.py"
KEY = "reader-1234"


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str | None:
    given: str | None = request.param
    return given


@pytest.fixture
def url(tmp_path: Path, key: str | None) -> Iterator[str]:
    """A generator in a process of its own, with a small retriever behind it."""
    checkpoint = save_tiny_checkpoint(tmp_path / "tiny")
    embeddings = np.random.default_rng(0).standard_normal((6, 16), dtype=np.float32)
    retriever = SmallRetriever(embeddings, load_checkpoint(checkpoint).encoder)
    port = free_port()
    with served(retriever.app) as retriever_url, (tmp_path / "log").open("w") as log:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "GENERATOR_PORT": str(port),
            "GENERATOR_CHECKPOINT": str(checkpoint),
            "GENERATOR_RETRIEVER_URL": retriever_url,
            "GENERATOR_DEVICE": "cpu",
            "GENERATOR_TORCH_THREADS": "1",
            "GENERATOR_SHED_AFTER_MS": "0",  # a busy machine shall refuse nothing
            "GENERATOR_API_KEY": key or "",
        }
        process = subprocess.Popen([sys.executable, "-m", "generator_svc"], env=environment, stdout=log, stderr=log)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            code = process.wait(timeout=60)
    written = (tmp_path / "log").read_text()
    assert code == 0, written
    assert "request_crashed" not in written
    assert "batch_failed" not in written


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + 120
    while time.monotonic() < until_s and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").is_success:
                return
        except httpx.ConnectError:
            time.sleep(0.2)
    raise AssertionError(f"the generator is not ready; exit code {process.poll()}")


# With keys, schemathesis also tries every operation without one (its check `ignored_auth`).
@pytest.mark.slow
@pytest.mark.parametrize(("key", "examples"), [(None, "40"), (KEY, "10")], indirect=["key"])
def test_every_check_of_schemathesis_holds(url: str, tmp_path: Path, key: str | None, examples: str) -> None:
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", f"{url}/openapi.json"]
    headers = ["--header", f"Authorization: Bearer {key}"] if key else []
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": str(HOOKS), "SERVED_MODEL": "tiny"}
    run = subprocess.run(
        [*command, *OPTIONS, "--max-examples", examples, *headers],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "12 selected / 12 total" in run.stdout
