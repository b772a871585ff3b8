"""The demo as real processes, and a headless browser."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from services.demo.facts import load_entities
from tests.e2e.running import Up

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def up(data_dir: Path) -> Iterator[Up]:
    """The demo, for tests that leave it as it is."""
    running = Up.start(data_dir)
    try:
        yield running.wait_until_ready()
    finally:
        running.stop()


@pytest.fixture
def own_up(up: Up, data_dir: Path, tmp_path: Path) -> Iterator[Up]:
    """The demo again, for a test that breaks it; its index is a copy of the one that `up` built."""
    running = Up.start(shutil.copytree(data_dir, tmp_path / "data"))
    try:
        yield running.wait_until_ready()
    finally:
        if running.process.poll() is None:
            running.stop()


@pytest.fixture(scope="session")
def paris() -> str:
    """The population of Paris as the corpus has it; an entity that training never saw."""
    (city,) = (entity for entity in load_entities() if (entity.kind, entity.name) == ("city", "Paris"))
    assert city.split == "test"
    return city.facts["population"]


@pytest.fixture(scope="module")  # while it is open its event loop runs, and no asynchronous test can
def chromium() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if executable is None:
        message = f"no Chromium on this machine (looked for {', '.join(CHROMIUM)})"
        if os.environ.get("RAG_REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(CHROMIUM_ARGUMENTS))
        yield browser
        browser.close()
