"""The bill of materials, and an audit that cannot be made."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.supply import PROJECT, app, runtime_versions

pytestmark = pytest.mark.slow


def test_the_bill_of_materials_lists_every_runtime_dependency_as_it_is_installed(tmp_path: Path) -> None:
    path = tmp_path / "sbom.json"
    result = CliRunner().invoke(app, ["sbom", str(path)])
    assert result.exit_code == 0, result.output
    document = json.loads(path.read_text())
    assert document["bomFormat"] == "CycloneDX"
    listed = {component["name"].lower().replace("_", "-"): component["version"] for component in document["components"]}
    versions = runtime_versions()
    assert {"fastapi", "uvicorn", "torch", "faiss-cpu", "pylance", "httptools", "starlette"} <= versions.keys()
    assert listed.items() >= versions.items()
    assert listed.keys() - versions.keys() <= {PROJECT}
    refs = {component["bom-ref"] for component in document["components"]}
    assert all({entry["ref"], *entry["dependsOn"]} <= refs for entry in document["dependencies"])


def test_no_tool_of_development_is_listed() -> None:
    assert not {"pytest", "mypy", "ruff", "cyclonedx-bom", "playwright"} & runtime_versions().keys()


def test_an_audit_without_advisories_does_not_look_like_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    result = CliRunner().invoke(app, ["audit"])
    assert result.exit_code == 2
    assert "NOT AUDITED" in result.output
