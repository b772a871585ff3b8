"""The page's files as they are served; what a person sees in them is tested in a browser (tests/e2e)."""

import re
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

import generator_svc.page
from generator_svc.page import PAGE_PATHS, mount_page

PAGE = Path(generator_svc.page.__file__).parent


@pytest.fixture
def page() -> httpx.AsyncClient:
    app = FastAPI()
    mount_page(app)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://page")


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page/style.css", "text/css; charset=utf-8"),
        ("/page/app.js", "text/javascript; charset=utf-8"),
        ("/page/icon.svg", "image/svg+xml"),
    ],
)
async def test_files_come_with_their_type_and_a_policy_without_inline_code(
    page: httpx.AsyncClient, path: str, content_type: str
) -> None:
    response = await page.get(path)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == content_type
    assert "unsafe" not in response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_the_paths_that_need_no_key_are_the_ones_served(page: httpx.AsyncClient) -> None:
    assert {"/", "/page/app.js"} < PAGE_PATHS
    for path in PAGE_PATHS:
        assert (await page.get(path)).status_code == 200


async def test_a_file_that_has_not_changed_is_not_sent_again(page: httpx.AsyncClient) -> None:
    first = await page.get("/page/app.js")
    again = await page.get("/page/app.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_every_file_that_the_page_names_is_served(page: httpx.AsyncClient) -> None:
    html = (await page.get("/")).text
    named = set(re.findall(r'(?:src|href)="(page/[^"]+)"', html))
    assert {"page/app.js", "page/style.css", "page/icon.svg"} <= named
    for path in named:
        assert (await page.get(f"/{path}")).status_code == 200


@pytest.mark.parametrize(
    "path", [*PAGE.glob("*.js"), *PAGE.glob("*.css"), *PAGE.glob("*.html")], ids=lambda path: path.name
)
def test_nothing_is_loaded_from_elsewhere(path: Path) -> None:
    assert not re.search(r"""(src|href|import|url\(|fetch\()[\s=("']*(https?:)?//""", path.read_text())


@pytest.mark.parametrize("name", ["nothing.js", "__init__.py", "..%2F__init__.py"])
async def test_only_the_files_of_the_page_are_served(page: httpx.AsyncClient, name: str) -> None:
    response = await page.get(f"/page/{name}")
    assert response.status_code >= 400
    assert b"import" not in response.content


def test_the_page_is_not_part_of_the_api() -> None:
    app = FastAPI()
    mount_page(app)
    assert app.openapi()["paths"] == {}
