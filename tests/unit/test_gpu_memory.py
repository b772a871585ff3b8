"""The memory of GPUs in the metrics, and that a machine without one has no such series."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from shared.gpu_memory import GpuMemory, nvml_memory


def test_each_kind_of_each_device_is_a_series_read_when_asked() -> None:
    used = {"cuda:0": {"total": 100, "used": 40}, "cuda:1": {"total": 100, "used": 7}}
    registry = CollectorRegistry()
    GpuMemory(registry, lambda: used)
    assert registry.get_sample_value("gpu_memory_bytes", {"device": "cuda:1", "kind": "used"}) == 7
    used["cuda:1"]["used"] = 8
    assert registry.get_sample_value("gpu_memory_bytes", {"device": "cuda:1", "kind": "used"}) == 8


def test_without_the_drivers_package_there_are_no_series(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    registry = CollectorRegistry()
    GpuMemory(registry, nvml_memory)
    assert b"gpu_memory_bytes{" not in generate_latest(registry)


def pynvml(*, gpus: int, driver: bool = True) -> ModuleType:
    """As the package behaves, with and without a driver on the machine."""
    module = ModuleType("pynvml")
    error = type("NVMLError_LibraryNotFound", (Exception,), {"__module__": "pynvml"})

    def init() -> None:
        if not driver:
            raise error("NVML Shared Library Not Found")

    vars(module).update(
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: gpus,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda index: SimpleNamespace(total=1000, used=10 + index, free=0),
    )
    return module


def test_the_driver_tells_of_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", pynvml(gpus=2))
    assert nvml_memory() == {"cuda:0": {"total": 1000, "used": 10}, "cuda:1": {"total": 1000, "used": 11}}


def test_a_machine_without_the_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", pynvml(gpus=0, driver=False))
    assert nvml_memory() == {}
