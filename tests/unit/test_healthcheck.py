"""What a container's health is made of: exit code 0 for a success, 1 for all else, and the answer printed."""

import subprocess
import sys

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from shared.healthcheck import check
from tests.serving import free_port, served


async def ready(request: Request) -> JSONResponse:
    return JSONResponse({"status": "ok", "reasons": []})


async def not_ready(request: Request) -> JSONResponse:
    return JSONResponse({"status": "unavailable", "reasons": ["the oven is cold"]}, 503)


APP = Starlette(routes=[Route("/readyz", ready), Route("/cold", not_ready)])


def test_a_ready_service_is_healthy() -> None:
    with served(APP) as url:
        assert httpx.get(f"{url}/readyz").status_code == 200
        run = subprocess.run(
            [sys.executable, "-m", "shared.healthcheck", f"{url}/readyz"], capture_output=True, text=True, check=False
        )
    assert (run.returncode, run.stdout.strip()) == (0, '{"status":"ok","reasons":[]}')


def test_one_that_is_not_ready_is_not_healthy_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with served(APP) as url:
        assert check(f"{url}/cold") == 1
    assert "the oven is cold" in capsys.readouterr().out


def test_nobody_listening_is_not_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}/readyz"
    assert check(url) == 1
    assert capsys.readouterr().out.startswith(f"{url} does not answer: ")


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    with served(APP) as url:
        assert check(f"{url}/readyz") == 0
