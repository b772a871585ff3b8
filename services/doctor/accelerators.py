"""GPUs: what the driver sees, and whether torch and faiss were built to use it."""

import shutil
import subprocess
from collections.abc import Iterator

from services.doctor.deployment import Deployment
from services.doctor.finding import Finding, Findings
from services.doctor.probe import ProbeFailed, probe

_found = Findings("accelerators")

_TORCH = """
import json, torch
there = torch.cuda.is_available()
names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if there else []
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": names}))
"""
_FAISS = """
import json, faiss
gpu = hasattr(faiss, "StandardGpuResources")
print(json.dumps({"version": faiss.__version__, "build": faiss.get_compile_options().strip(),
                  "gpu": gpu, "gpus": faiss.get_num_gpus() if gpu else 0}))
"""


def check(deployment: Deployment) -> Iterator[Finding]:
    cards = _driver()
    if cards:
        yield _found("ok", f"driver: {'; '.join(cards)}")
    else:
        yield _found("note", "no NVIDIA driver: all runs on the CPU")
    if "generator" in deployment.services:
        yield from _torch(deployment.generator.device if deployment.generator else "auto", bool(cards))
    if "retriever" in deployment.services:
        yield from _faiss(deployment.retriever.device if deployment.retriever else "auto", bool(cards))


def _driver() -> list[str]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        ran = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return []
    return ran.stdout.strip().splitlines() if ran.returncode == 0 else []


def _torch(device: str, has_gpu: bool) -> Iterator[Finding]:
    try:
        torch = probe(_TORCH)
    except ProbeFailed as error:
        yield _found("problem", f"torch cannot be imported: {error.message}", "pip install --force-reinstall torch")
        return
    built = f"torch {torch['version']}, " + (f"CUDA {torch['cuda']}" if torch["cuda"] else "built without CUDA")
    mend = None
    if torch["gpus"]:
        yield _found("ok", f"{built}: {', '.join(torch['gpus'])}")
    elif device.startswith("cuda") or (has_gpu and torch["cuda"]):
        mend = "install torch's CUDA build and a driver that is new enough, or set GENERATOR_DEVICE=cpu"
        yield _found(
            "problem", f"{built}: it sees no GPU" + (f", and GENERATOR_DEVICE={device}" * (device != "auto")), mend
        )
    elif has_gpu:
        mend = "to use the GPU, install torch's CUDA build; GENERATOR_DEVICE=cpu says that the CPU is meant"
        yield _found("note", f"{built}: the generator runs on the CPU, beside a GPU", mend)
    else:
        yield _found("ok", built)


def _faiss(device: str, has_gpu: bool) -> Iterator[Finding]:
    try:
        faiss = probe(_FAISS)
    except ProbeFailed as error:
        mend = "pip install --force-reinstall faiss-cpu (or faiss-gpu, never both)"
        yield _found("problem", f"faiss cannot be imported: {error.message}", mend)
        return
    built = f"faiss {faiss['version']} ({faiss['build']}), " + ("built for GPUs" if faiss["gpu"] else "CPU build")
    if faiss["gpus"]:
        yield _found("ok", f"{built}: {faiss['gpus']} GPU(s)")
    elif device == "cuda" or (has_gpu and faiss["gpu"] and device == "auto"):
        mend = "pip install 'rag-services[retriever-gpu]' in place of faiss-cpu, or set RETRIEVER_DEVICE=cpu"
        yield _found("problem", f"{built}: it sees no GPU" + (", and RETRIEVER_DEVICE=cuda" * (device == "cuda")), mend)
    elif has_gpu:
        mend = "to search on the GPU: pip install 'rag-services[retriever-gpu]' in place of faiss-cpu"
        yield _found("note", f"{built}: the retriever searches on the CPU, beside a GPU", mend)
    else:
        yield _found("ok", built)
