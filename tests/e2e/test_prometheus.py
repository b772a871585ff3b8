"""Prometheus scrapes both services under load as it is shipped, and every query of the dashboard finds data."""

import json
import math
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.running import Up, free_ports, until

pytestmark = pytest.mark.slow
DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "rag.json").read_text())
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"].replace("$__rate_interval", "15s")
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
}
RULES = [rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
OURS = re.compile(r"\b(?:generator|retriever|worker|http|process|rag|gpu)_[a-z_]+\b")
# Only where there is a GPU; the dashboard shows 0 elsewhere.
WITH_A_GPU = {"gpu_memory_bytes"}


@contextmanager
def load(up: Up) -> Iterator[None]:
    """Callers of every route, until the block ends."""
    enough = threading.Event()

    def call() -> None:
        with up.client() as client:
            while not enough.is_set():
                client.answer(["How many people live in Paris?", "What is the symbol of gold?"])
                client.search("Where is Reykjavik?")
                client.score("How many people live in Paris?", ["2,138,551", "5"])
                client.encode(["a", "b"])

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    try:
        yield
    finally:
        enough.set()
        for caller in callers:
            caller.join()


@pytest.fixture
def prometheus(up: Up, tmp_path: Path) -> Iterator[httpx.Client]:
    """A Prometheus of its own with the shipped configuration; only addresses and intervals differ."""
    executable = shutil.which("prometheus")
    if executable is None:
        message = "no Prometheus on this machine (Debian: apt-get install prometheus)"
        if os.environ.get("RAG_REQUIRE_PROMETHEUS") == "1":
            pytest.fail(message)
        pytest.skip(message)
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    addresses = {"retriever:8001": up.retriever_url, "generator:8000": up.url}
    for target in config["scrape_configs"][0]["static_configs"]:
        target["targets"] = [addresses[name].removeprefix("http://") for name in target["targets"]]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DEPLOY / "alerts.yml", tmp_path)
    address = f"127.0.0.1:{free_ports(1)[0]}"
    process = subprocess.Popen(
        [
            executable,
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address={address}",
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=10) as http:
            until(lambda: ready(http), 30, "Prometheus is ready")
            yield http
    finally:
        process.terminate()
        process.wait(10)


def ready(http: httpx.Client) -> bool:
    try:
        return http.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def values(http: httpx.Client, query: str) -> list[float]:
    """What a query gives now, without NaN: a quantile of nothing."""
    answer = http.get("/api/v1/query", params={"query": query}).json()
    assert answer["status"] == "success", f"{query}: {answer}"
    found = [float(series["value"][1]) for series in answer["data"]["result"]]
    return [value for value in found if not math.isnan(value)]


def test_every_query_of_the_dashboard_returns_data_and_every_rule_is_evaluated(
    up: Up, prometheus: httpx.Client
) -> None:
    missing = set(QUERIES)

    def all_answered() -> bool:
        missing.difference_update([title for title in missing if values(prometheus, QUERIES[title])])
        return not missing

    with load(up):
        try:
            until(all_answered, 90, "data for every query")
        except AssertionError:
            pytest.fail(f"no data for {sorted(missing)}")
        assert values(prometheus, "sum(rate(generator_generated_tokens_total[15s])) > 0")
        assert values(prometheus, 'count(up{job="rag"} == 1)') == [2]
    groups = until(lambda: evaluated(prometheus), 30, "every rule is evaluated")
    assert {rule["name"] for rule in groups} == {rule["alert"] for rule in RULES}
    assert {rule["health"] for rule in groups} == {"ok"}, groups


def evaluated(http: httpx.Client) -> list[dict[str, Any]]:
    groups = http.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    return rules if all(rule["health"] != "unknown" for rule in rules) else []


def test_every_metric_that_dashboard_and_rules_name_is_served(up: Up) -> None:
    """By the official parser of the text form, so that it is checked without a Prometheus, too."""
    with up.client() as client:
        client.answer("How many people live in Paris?")
    served = set()
    for url in (up.url, up.retriever_url):
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
            served |= {sample.name for sample in family.samples}
    named = {name for query in [*QUERIES.values(), *(rule["expr"] for rule in RULES)] for name in OURS.findall(query)}
    assert named - served - WITH_A_GPU == set()


def test_names_follow_the_conventions(up: Up) -> None:
    """Base units, counters that end in _total, and only labels of few values."""
    for url in (up.url, up.retriever_url):
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
            assert family.documentation
            assert not re.search(r"_(ms|millis|milliseconds|minutes|kb|mb|mib|percent)\b", family.name)
            if family.type == "counter":
                assert {sample.name for sample in family.samples} <= {f"{family.name}_total", f"{family.name}_created"}
            assert len({tuple(sorted(sample.labels.items())) for sample in family.samples}) < 1000
