"""What is in the two images, and what is not."""

import json
import tomllib
from typing import Any

import pytest

from tests.docker.measured import measured
from tests.docker.stack import GENERATOR_IMAGE, RETRIEVER_IMAGE, docker
from tests.e2e.running import ROOT

pytestmark = pytest.mark.docker
IMAGES = (RETRIEVER_IMAGE, GENERATOR_IMAGE)


def inspect(image: str) -> dict[str, Any]:
    (found,) = json.loads(docker("image", "inspect", image).stdout)
    return dict(found)


def installed(image: str, module: str) -> bool:
    code = f"import importlib.util; print(importlib.util.find_spec({module!r}) is not None)"
    return docker("run", "--rm", "--network=none", image, "python", "-c", code).stdout.strip() == "True"


def test_the_retriever_is_small() -> None:
    megabytes = {image: inspect(image)["Size"] / 1e6 for image in IMAGES}
    for image, size in megabytes.items():
        measured(f"image {image}", f"{size:.0f} MB")
    assert megabytes[RETRIEVER_IMAGE] < 900


@pytest.mark.parametrize(
    ("image", "has", "lacks"),
    [
        (RETRIEVER_IMAGE, ("faiss", "lance"), ("torch", "transformers")),
        (GENERATOR_IMAGE, ("torch", "transformers"), ("faiss", "lance")),
    ],
)
def test_an_image_holds_the_libraries_of_its_own_service(
    image: str, has: tuple[str, ...], lacks: tuple[str, ...]
) -> None:
    assert [module for module in has if not installed(image, module)] == []
    assert [module for module in lacks if installed(image, module)] == []


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_starts_its_service_directly_as_a_numeric_user(image: str) -> None:
    found = inspect(image)["Config"]
    service = image.removeprefix("rag-").removesuffix(":latest")
    assert found["User"] == "10001:10001"
    assert found["Cmd"] == ["python", "-m", f"{service}_svc"]
    assert found["Entrypoint"] is None
    assert found["Healthcheck"]["Test"][:4] == ["CMD", "python", "-m", "shared.healthcheck"]
    assert found["Volumes"] is None


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_says_its_version(image: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    labels = inspect(image)["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == version
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    code = "from shared.version import VERSION; print(VERSION)"
    assert docker("run", "--rm", "--network=none", image, "python", "-c", code).stdout.strip() == version


@pytest.mark.parametrize("image", IMAGES)
def test_no_one_but_root_can_change_the_code(image: str) -> None:
    code = "import os; print([p for p in ('/app', '/venv', '/app/shared/auth.py', '/') if os.access(p, os.W_OK)])"
    assert docker("run", "--rm", "--network=none", image, "python", "-c", code).stdout.strip() == "[]"
