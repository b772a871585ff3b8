"""``/openapi.json`` tells the truth: schemathesis sends every operation what it allows and what it forbids."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.retriever_data import write_seed

ROOT = Path(__file__).parents[2]

# A JSON schema cannot say that base64 has as many bytes as dtype and shape ask for, that vectors have the dimension of
# the collection, or that vectors times n_docs is bounded: here data that it allows may be refused, by a 422. And a
# deadline of one millisecond, which it allows too, is missed: 504. Nor can it say which kinds of index there are and
# what each can be told, that a collection just made has no passage and no earlier generation, or (the tool compares
# large integers as floats) where the ids end.
CONFIG = """
[[operations]]
include-path = "/v1/retrieve"

[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "404", "422", "504"]

[operations.checks.not_a_server_error]
expected-statuses = ["2xx", "4xx", "504"]

[[operations]]
include-path = "/v1/collections"

[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "409", "422"]

[[operations]]
include-path-regex = "/v1/collections/.*/passages/.*"

[operations.checks.ensure_resource_availability]
enabled = false

[[operations]]
include-path-regex = "/v1/collections/.*/(passages|passages/delete|generations|rollback)"

[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "404", "409", "422"]
"""


KEYS = {"RETRIEVER_API_KEY": "reader-1234", "RETRIEVER_ADMIN_KEY": "admin-1234"}
OPTIONS = ["--checks", "all", "--continue-on-failure", "--seed", "7", "--no-color"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def keys(request: pytest.FixtureRequest) -> dict[str, str]:
    given: dict[str, str] = request.param
    return given


@pytest.fixture
def url(tmp_path: Path, keys: dict[str, str]) -> Iterator[str]:
    """A retriever in a process of its own. Its embeddings have one dimension: generated vectors often fit."""
    port = free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RETRIEVER_PORT": str(port),
        "RETRIEVER_DATA_DIR": str(tmp_path / "data"),
        "RETRIEVER_SEED": str(write_seed(tmp_path / "seed.parquet", n=20, dimension=1)),
        "RETRIEVER_DEVICE": "cpu",
        **keys,
    }
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "retriever_svc"], env=environment, stdout=log, stderr=log)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        code = process.wait(timeout=30)
    assert code == 0, (tmp_path / "log").read_text()
    assert "request_crashed" not in (tmp_path / "log").read_text()


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").is_success:
                return
        except httpx.ConnectError:
            time.sleep(0.1)
    raise AssertionError(f"the retriever is not ready; exit code {process.poll()}")


# With keys, schemathesis also tries every operation without one (its check `ignored_auth`).
@pytest.mark.slow
@pytest.mark.parametrize(("keys", "examples"), [({}, "60"), (KEYS, "15")], indirect=["keys"], ids=["open", "locked"])
def test_every_check_of_schemathesis_holds(url: str, tmp_path: Path, keys: dict[str, str], examples: str) -> None:
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "--config-file",
            str(config),
            "run",
            f"{url}/openapi.json",
            *OPTIONS,
            "--max-examples",
            examples,
            *(["--header", f"Authorization: Bearer {keys['RETRIEVER_ADMIN_KEY']}"] if keys else []),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "21 selected / 21 total" in run.stdout
