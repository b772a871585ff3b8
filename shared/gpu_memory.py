"""The memory of GPUs, as Prometheus reads it: asked for when it asks, no series where there is no GPU."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

Memory = Mapping[str, Mapping[str, int]]
"""Device → kind → bytes. Kinds: ``total`` and ``used`` of the whole GPU, whoever uses it, and what a library tells."""


class GpuMemory(Collector):
    def __init__(self, registry: CollectorRegistry, read: Callable[[], Memory]) -> None:
        self._read = read
        registry.register(self)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        memory = GaugeMetricFamily(
            "gpu_memory_bytes",
            "total, used: of the GPU, whoever uses it; allocated, reserved: by torch in this process.",
            labels=["device", "kind"],
        )
        for device, kinds in self._read().items():
            for kind, number in kinds.items():
                memory.add_metric([device, kind], number)
        yield memory


def nvml_memory() -> Memory:
    """Of all GPUs, as the driver knows it; nothing where there is none, or nvidia-ml-py is not installed."""
    try:
        import pynvml  # noqa: PLC0415  in the GPU images only

        pynvml.nvmlInit()
    except (ImportError, OSError):
        return {}
    except Exception as error:  # NVMLError, which has no name here without the package
        if type(error).__module__ != "pynvml":
            raise
        return {}
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        found = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        return {f"cuda:{index}": {"total": one.total, "used": one.used} for index, one in enumerate(found)}
    finally:
        pynvml.nvmlShutdown()
