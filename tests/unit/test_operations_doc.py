"""docs/operations.md names every setting with its default, every metric and every alert, and none that is not there."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from generator_svc.metrics import GeneratorMetrics
from generator_svc.settings import GeneratorSettings
from retriever_svc.app import create_app
from retriever_svc.settings import RetrieverSettings
from shared.gpu_memory import GpuMemory
from shared.metrics import ConnectionMetrics, HttpMetrics, WorkerMetrics
from shared.settings import ServiceSettings

ROOT = Path(__file__).parents[2]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
ROW = re.compile(r"^\| `(?P<name>[^`]+)` \| (?P<second>[^|]*) \|", re.MULTILINE)


def section(title: str) -> str:
    """The text under a heading, up to the next one."""
    _, _, rest = OPERATIONS.partition(f"## {title}\n")
    assert rest, f"docs/operations.md has no section {title!r}"
    return re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(title: str) -> dict[str, str]:
    return {row["name"]: row["second"].strip().strip("`") for row in ROW.finditer(section(title))}


def shown(default: Any) -> str:
    """A default as the page writes it."""
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return str(default).removeprefix(f"{ROOT}/")


@pytest.mark.parametrize(
    ("cls", "prefix", "title"),
    [
        (GeneratorSettings, "GENERATOR_", "Settings of the generator"),
        (RetrieverSettings, "RETRIEVER_", "Settings of the retriever"),
    ],
)
def test_every_setting_of_a_service_is_there_with_its_default(
    cls: type[ServiceSettings], prefix: str, title: str
) -> None:
    own = {name: field for name, field in cls.model_fields.items() if name in cls.__annotations__}
    assert rows(title) == {prefix + name.upper(): shown(field.default) for name, field in own.items()}


def test_every_setting_of_both_services_is_there_with_its_default() -> None:
    # A port is each service's own.
    fields = {name: field for name, field in ServiceSettings.model_fields.items() if name != "port"}
    documented = rows("Settings of both services")
    assert documented == {f"…_{name.upper()}": shown(field.default) for name, field in fields.items()}


def test_every_metric_is_there() -> None:
    registry = CollectorRegistry()
    GeneratorMetrics(registry)
    HttpMetrics(registry, "generator", ready=lambda: True)
    WorkerMetrics(registry, "any")
    ConnectionMetrics(registry, lambda: 0)
    GpuMemory(registry, lambda: {"cuda:0": {"used": 1}})
    of_retriever = create_app(RetrieverSettings()).state.registry
    families = {family.name: family for one in (registry, of_retriever) for family in one.collect()}
    names = {name + ("_total" if family.type == "counter" else "") for name, family in families.items()}
    documented = {row["name"] for row in ROW.finditer(OPERATIONS) if row["name"].islower()}
    assert documented == names


def test_every_alert_is_there() -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    assert {row["name"] for row in ROW.finditer(section("Alerts"))} == alerts
