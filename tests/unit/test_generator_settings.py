"""Settings of the generator: what it serves unless told otherwise, and what it refuses at start."""

from pathlib import Path

import pytest
import torch

from generator_svc.service import choose_device
from generator_svc.settings import GeneratorSettings
from shared.errors import StartupError
from shared.settings import load_settings

ROOT = Path(__file__).parents[2]


def test_the_demo_is_served_on_loopback_unless_told_otherwise() -> None:
    settings = load_settings(GeneratorSettings)
    assert Path(settings.checkpoint) == ROOT / "services" / "demo" / "checkpoint"
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.retriever_url == "http://127.0.0.1:8001"


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("GENERATOR_RETRIEVER_URL", "retriever:8001", "must begin with http"),
        ("GENERATOR_RETRIEVER_URL", "http://", "name a host"),
        ("GENERATOR_RETRIEVER_URL", "http://[::1", "is no URL"),
        ("GENERATOR_DTYPE", "int4", "GENERATOR_DTYPE"),
        ("GENERATOR_MAX_QUESTIONS", "1000", "max_questions is above max_queue"),
        ("GENERATOR_CHEKPOINT", "x", "did you mean GENERATOR_CHECKPOINT"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(StartupError, match=reason):
        load_settings(GeneratorSettings)


def test_auto_takes_the_cpu_where_there_is_no_gpu() -> None:
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the device is there")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "tpu"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(StartupError, match="cannot be used"):
        choose_device(device)
