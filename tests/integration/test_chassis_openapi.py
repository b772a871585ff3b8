"""The chassis' part of ``/openapi.json`` is true: schemathesis tries every operation, with keys set."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.chassis_app import TinySettings, create_tiny_app
from tests.serving import served

CHECKS = ("--checks", "all", "--max-examples", "25", "--continue-on-failure", "--seed", "7", "--no-color")


@pytest.mark.slow
@pytest.mark.parametrize("key", ["admin-key-5678", None])
def test_every_check_of_schemathesis_holds(tmp_path: Path, key: str | None) -> None:
    settings = TinySettings(admin_key=SecretStr(key) if key else None)
    headers = ["--header", f"Authorization: Bearer {key}"] if key else []
    with served(create_tiny_app(settings)) as url:
        run = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *headers, *CHECKS],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "7 selected / 7 total" in run.stdout
