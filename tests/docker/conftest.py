"""The stack for the tests of this folder, and the table of what they measured.

Where no Docker engine answers they are skipped, with RAG_REQUIRE_DOCKER=1 they fail; images are built beforehand, as
`make docker-test` does.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.demo.facts import load_entities
from tests.docker.measured import FIGURES
from tests.docker.stack import GENERATOR_IMAGE, RETRIEVER_IMAGE, Stack, docker


def _missing() -> str | None:
    if shutil.which("docker") is None:
        return "there is no docker command"
    if docker("info", check=False).returncode != 0:
        return "no Docker engine answers"
    if docker("compose", "version", check=False).returncode != 0:
        return "docker has no compose plugin"
    for image in (RETRIEVER_IMAGE, GENERATOR_IMAGE):
        if docker("image", "inspect", image, check=False).returncode != 0:
            return f"there is no image {image}: docker compose build"
    return None


@pytest.fixture(scope="session", autouse=True)
def engine() -> None:
    missing = _missing()
    if missing and os.environ.get("RAG_REQUIRE_DOCKER") == "1":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)


@pytest.fixture(scope="session")
def stack(engine: None) -> Iterator[Stack]:
    """The stack, up and ready, removed with its volumes at the end."""
    stack = Stack.new()
    try:
        stack.up()
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "10", check=False)


@pytest.fixture(scope="session")
def paris() -> str:
    """The population of Paris as the corpus has it."""
    (city,) = (entity for entity in load_entities() if (entity.kind, entity.name) == ("city", "Paris"))
    return city.facts["population"]


@pytest.fixture
def secrets(tmp_path: Path) -> dict[str, Path]:
    """Files with a key to read and one to do everything; readable for the user of the containers."""
    paths = {"api": tmp_path / "api_key", "admin": tmp_path / "admin_key"}
    for name, path in paths.items():
        path.write_text(f"{name}-key-of-this-test\n")
        path.chmod(0o644)
    return paths


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("measured")
        width = max(len(figure.name) for figure in FIGURES)
        for figure in FIGURES:
            terminalreporter.write_line(f"{figure.name:{width}}  {figure.value}")
