"""What the compose files say, as Compose reads them; no container runs here."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.docker.stack import docker
from tests.e2e.running import ROOT

pytestmark = pytest.mark.docker
OURS = ("retriever", "generator")


def config(*options: str, **variables: str) -> dict[str, Any]:
    files = ("-f", "docker-compose.yml", *options)
    return dict(json.loads(docker("compose", *files, "config", "--format", "json", **variables).stdout))


def test_only_the_two_services_start_unless_more_is_asked_for() -> None:
    assert sorted(config()["services"]) == sorted(OURS)


def test_every_port_is_published_on_loopback_only() -> None:
    for name, service in config("--profile", "monitoring")["services"].items():
        assert {port["host_ip"] for port in service.get("ports", [])} <= {"127.0.0.1"}, name


@pytest.mark.parametrize("name", OURS)
def test_no_service_may_do_more_than_it_must(name: str) -> None:
    service = config()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert 0 < int(service["mem_limit"]) == int(service["memswap_limit"])
    assert service["pids_limit"] > 0


def test_without_keys_no_service_looks_for_one() -> None:
    for name in OURS:
        environment = config()["services"][name]["environment"]
        assert not [variable for variable, value in environment.items() if variable.endswith("KEY_FILE") and value]


def test_keys_reach_the_services_as_files() -> None:
    found = config(RAG_API_KEY_FILE="./api_key", RAG_ADMIN_KEY_FILE="./admin_key")
    assert found["secrets"]["api_key"]["file"] == str(ROOT / "api_key")
    environment = found["services"]["generator"]["environment"]
    assert environment["GENERATOR_API_KEY_FILE"] == "/run/secrets/api_key"
    assert environment["GENERATOR_ADMIN_KEY_FILE"] == "/run/secrets/admin_key"
    assert environment["GENERATOR_RETRIEVER_API_KEY_FILE"] == "/run/secrets/api_key"


def endpoints(**variables: str) -> set[str]:
    services = config(**variables)["services"]
    return {services[name]["environment"][f"{name.upper()}_OTLP_ENDPOINT"] for name in OURS}


def test_traces_are_sent_under_the_profile_only_or_where_a_variable_says() -> None:
    assert endpoints() == {""}
    assert endpoints(COMPOSE_PROFILES="monitoring") == {"http://otel-collector:4318"}
    assert endpoints(OTLP_ENDPOINT="http://elsewhere:4318") == {"http://elsewhere:4318"}


def test_the_profile_brings_what_watches_and_every_file_that_it_mounts_is_there() -> None:
    services = config(COMPOSE_PROFILES="monitoring")["services"]
    assert sorted(set(services) - set(OURS)) == ["grafana", "jaeger", "otel-collector", "prometheus"]
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert int(service["mem_limit"]) > 0
    mounts = [mount for service in services.values() for mount in service.get("volumes", []) if mount["type"] == "bind"]
    assert len(mounts) == 5
    for mount in mounts:
        assert mount["read_only"] is True
        assert Path(mount["source"]).exists()


def test_the_gpu_file_reserves_gpus_and_builds_for_them() -> None:
    services = config("-f", "docker-compose.gpu.yml", GENERATOR_GPU="1")["services"]
    devices = {
        name: [device["device_ids"] for device in service["deploy"]["resources"]["reservations"]["devices"]]
        for name, service in services.items()
    }
    assert devices == {"retriever": [["0"]], "generator": [["1"]]}
    assert services["retriever"]["build"]["args"]["EXTRA"] == "retriever-gpu"
    assert services["generator"]["build"]["args"]["TORCH_INDEX_URL"] == ""
    assert services["retriever"]["environment"]["RETRIEVER_DEVICE"] == "cuda"
    assert services["generator"]["environment"]["GENERATOR_DEVICE"] == "cuda"
    plain = config()["services"]
    assert all(services[name]["image"] == f"{plain[name]['image']}-gpu" for name in OURS), (
        "one must not be taken for both"
    )


def test_the_extra_of_the_gpu_image_is_faiss_for_the_gpu() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(requirement.startswith("faiss-gpu") for requirement in extras["retriever-gpu"])
    assert not any(requirement.startswith("faiss-cpu") for requirement in extras["retriever-gpu"])
