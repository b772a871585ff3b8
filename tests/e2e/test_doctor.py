"""`rag doctor` on machines and deployments that are well, and on planted faults: real ports, files, processes, disks.

Each fault is named, with its mend, and ends in exit code 1.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.doctor.finding import Finding
from tests.e2e.running import RAG, ROOT, START_WITHIN_S, Up, environment, free_ports, until
from tests.retriever_data import ENCODER, write_seed
from tests.retriever_process import RetrieverProcess

pytestmark = pytest.mark.slow
DEMO = ROOT / "services" / "demo" / "checkpoint"
KEYS = {"api_key": "reader-1234", "admin_key": "admin-1234"}


class Examined:
    """What `rag doctor --json` said, run as a person runs it."""

    def __init__(self, *arguments: str, within: tuple[str, ...] = (), **variables: str) -> None:
        self.ran = subprocess.run(
            [*within, *RAG, "doctor", "--json", *arguments],
            cwd=ROOT,
            env=environment(**variables),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert self.ran.returncode in (0, 1), self.ran.stderr
        self.report: dict[str, Any] = json.loads(self.ran.stdout)
        found = [Finding.model_validate(finding) for finding in self.report["findings"]]
        self.problems = [finding for finding in found if finding.status == "problem"]
        self.checks = {finding.check for finding in found}
        self.found = found
        assert self.report["ok"] == (not self.problems) == (self.ran.returncode == 0)
        assert all(finding.mend for finding in self.problems), "a problem without a mend"

    def problem(self, *words: str) -> Finding:
        """The only problem that holds all of ``words``."""
        [finding] = [f for f in self.problems if all(word in f.what for word in words)] or [None]
        assert finding is not None, f"{words} not among {self.problems}"
        return finding


def ports() -> dict[str, str]:
    """Free ones, so that a machine where something runs on ours is none the worse."""
    generator, retriever = free_ports(2)
    return {"GENERATOR_PORT": str(generator), "RETRIEVER_PORT": str(retriever)}


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[RetrieverProcess]:
    """A retriever with keys, whose index was made for another encoder than the demo's."""
    seed = write_seed(tmp_path / "seed.parquet", n=20, dimension=4)
    retriever = RetrieverProcess(tmp_path / "data", seed=seed, **KEYS)
    try:
        yield retriever.start()
    finally:
        retriever.end()


# --- well --------------------------------------------------------------------------------------------------


def test_a_machine_before_the_first_start_is_well(tmp_path: Path) -> None:
    examined = Examined(RETRIEVER_DATA_DIR=str(tmp_path / "data"), **ports())
    assert examined.problems == []
    assert examined.checks >= {"software", "accelerators", "variables", "keys", "ports", "disk", "checkpoint"}
    assert not (tmp_path / "data").exists()  # it changes nothing


def test_a_deployment_that_runs_is_well(up: Up, data_dir: Path) -> None:
    addresses = {"GENERATOR_PORT": up.url.rpartition(":")[2], "RETRIEVER_PORT": up.retriever_url.rpartition(":")[2]}
    before = sorted(data_dir.rglob("*"))
    examined = Examined(RETRIEVER_DATA_DIR=str(data_dir), **addresses)
    assert examined.problems == []
    assert {f.what for f in examined.found if f.check == "neighbours"} == {
        f"the generator at {up.url} is ready",
        f"the retriever at {up.retriever_url} is ready",
    }
    [space] = [finding for finding in examined.found if finding.check == "space"]
    assert space.status == "ok"
    assert sorted(data_dir.rglob("*")) == before


def test_checkpoint_and_index_are_compared_while_nothing_runs(up: Up, data_dir: Path) -> None:
    examined = Examined(RETRIEVER_DATA_DIR=str(data_dir), **ports())
    [space] = [finding for finding in examined.found if finding.check == "space"]
    assert (space.status, examined.problems) == ("ok", [])


@pytest.mark.parametrize(
    ("missing", "left"), [(["torch", "transformers"], "retriever"), (["faiss", "lance"], "generator")]
)
def test_it_looks_at_the_service_that_is_installed(missing: list[str], left: str, tmp_path: Path) -> None:
    program = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); from services.cli import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", program, "doctor", "--json"],
        cwd=ROOT,
        env=environment(RETRIEVER_DATA_DIR=str(tmp_path / "data"), **ports()),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    findings = json.loads(ran.stdout)["findings"]
    about = {finding["what"].split(":")[0] for finding in findings if finding["check"] == "keys"}
    assert about == {left}


def test_the_table_says_the_same(tmp_path: Path) -> None:
    shell = environment(RETRIEVER_DATA_DIR=str(tmp_path / "data"), GENERATOR_PROT="1", **ports())
    ran = subprocess.run([*RAG, "doctor"], cwd=ROOT, env=shell, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    printed = " ".join(ran.stdout.split())
    assert "PROBLEM variables generator: GENERATOR_PROT is set" in printed
    assert "did you mean GENERATOR_PORT?" in printed
    assert printed.endswith("1 problem")
    assert "\x1b" not in ran.stdout


# --- planted faults ----------------------------------------------------------------------------------------


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        variables = {**ports(), "GENERATOR_PORT": str(port), "RETRIEVER_DATA_DIR": str(tmp_path / "data")}
        finding = Examined(**variables).problem("taken", str(port))
    assert finding.check == "ports"
    assert f"(process {os.getpid()})" in finding.what  # who has it
    assert f"GENERATOR_PORT={port + 10}" in str(finding.mend)


def test_a_wrong_index(foreign: RetrieverProcess, tmp_path: Path) -> None:
    running = Examined(GENERATOR_RETRIEVER_URL=foreign.url, GENERATOR_RETRIEVER_API_KEY=KEYS["api_key"], **ports())
    foreign.stop()
    on_the_disk = Examined(RETRIEVER_DATA_DIR=str(tmp_path / "data"), **ports())
    for examined in (running, on_the_disk):
        finding = examined.problem("wrong index", "default", ENCODER)
        assert finding.check == "space"
        assert "rag index build" in str(finding.mend)
        assert "GENERATOR_INDEX_ENCODER" in str(finding.mend)
    assert Examined(RETRIEVER_DATA_DIR=str(tmp_path / "data"), GENERATOR_INDEX_ENCODER=ENCODER, **ports()).report["ok"]


@pytest.mark.parametrize("fault", ["gone", "half", "pointer", "no folder"])
def test_missing_weights(fault: str, tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "checkpoint")
    weights = folder / "model.safetensors"
    match fault:
        case "gone":
            weights.unlink()
            words = "missing weights", str(folder)
        case "half":
            os.truncate(weights, weights.stat().st_size // 2)
            words = "damaged weights", str(weights)
        case "pointer":
            weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10202720\n")
            words = "missing weights", "Git LFS"
        case _:
            shutil.rmtree(folder)
            words = "no checkpoint folder", str(folder)
    variables = {"GENERATOR_CHECKPOINT": str(folder), "RETRIEVER_DATA_DIR": str(tmp_path / "data"), **ports()}
    finding = Examined(**variables).problem(*words)
    assert finding.check == "checkpoint"
    assert ("git lfs pull" if fault == "pointer" else "GENERATOR_CHECKPOINT") in str(finding.mend)


@pytest.fixture
def lonely(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The settings of a generator that runs, and whose retriever does not."""
    settings = ports()
    settings["GENERATOR_RETRIEVER_URL"] = f"http://127.0.0.1:{settings['RETRIEVER_PORT']}"
    command = [sys.executable, "-m", "generator_svc"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(**settings), stdout=log, stderr=log)
        try:
            until(lambda: '"listening"' in (tmp_path / "log").read_text(), START_WITHIN_S, "the generator listens")
            yield settings
        finally:
            process.terminate()
            process.wait(60)


def test_a_retriever_that_cannot_be_reached(lonely: dict[str, str], tmp_path: Path) -> None:
    examined = Examined(RETRIEVER_DATA_DIR=str(tmp_path / "data"), **lonely)
    # The generator says that it is not ready for the same reason, in the same words.
    [finding] = [found for found in examined.problems if found.what.startswith("the retriever at")]
    assert finding.check == "neighbours"
    assert f"{lonely['GENERATOR_RETRIEVER_URL']} cannot be reached" in finding.what
    assert "python -m retriever_svc" in str(finding.mend)
    assert "GENERATOR_RETRIEVER_URL" in str(finding.mend)
    assert examined.problem("the generator at", "is not ready", "cannot be reached").check == "neighbours"


def test_a_retriever_that_nobody_expects_yet_is_no_fault(tmp_path: Path) -> None:
    """Named, and not there, it is one; before `rag up` it is not."""
    settings = {**ports(), "RETRIEVER_DATA_DIR": str(tmp_path / "data")}
    assert Examined(**settings).report["ok"]
    nowhere = f"http://127.0.0.1:{settings['RETRIEVER_PORT']}"
    assert Examined(GENERATOR_RETRIEVER_URL=nowhere, **settings).problem(nowhere).check == "neighbours"


@pytest.mark.parametrize("full", [False, True], ids=["little room", "none at all"])
def test_no_disk(full: bool, tmp_path: Path) -> None:
    """A file system of four megabytes, which is gone with the process that mounted it."""
    data = tmp_path / "data"
    data.mkdir()
    fill = f"dd if=/dev/zero of={data}/fill bs=64k 2>/dev/null; " if full else ""
    isolated = ("unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user", "--user"]), "sh", "-c")
    mount = f"mount -t tmpfs -o size=4m tmpfs {data} && "
    if subprocess.run([*isolated, f"{mount}true"], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    within = (*isolated, f'{mount}{{ {fill}exec "$@"; }}', "sh")
    examined = Examined(within=within, RETRIEVER_DATA_DIR=str(data), **ports())
    finding = examined.problem("no disk", str(data), "0.0 MB free" if full else "4.2 MB free")
    assert finding.check == "disk"
    assert "RETRIEVER_DATA_DIR" in str(finding.mend)
    if full:
        assert "No space left" in examined.problem("nothing can be written").what


@pytest.mark.parametrize("key", ["wrong-1234", None], ids=["wrong", "none"])
def test_a_bad_key(foreign: RetrieverProcess, key: str | None) -> None:
    given = {"GENERATOR_RETRIEVER_API_KEY": key} if key else {}
    encoder = {"GENERATOR_INDEX_ENCODER": ENCODER}
    examined = Examined(GENERATOR_RETRIEVER_URL=foreign.url, **given, **encoder, **ports())
    finding = examined.problem("retriever", foreign.url, "GENERATOR_RETRIEVER_API_KEY" if key else "asks the generator")
    assert finding.check == "keys"
    assert "RETRIEVER_API_KEY" in str(finding.mend)
    right = {"GENERATOR_RETRIEVER_URL": foreign.url, "GENERATOR_RETRIEVER_API_KEY": KEYS["api_key"]}
    assert Examined(**right, **encoder, **ports()).report["ok"]
    for secret in (*KEYS.values(), "wrong-1234"):
        assert secret not in examined.ran.stdout


def test_a_key_that_was_given_and_is_refused(foreign: RetrieverProcess) -> None:
    examined = Examined("--retriever-url", foreign.url, "--api-key", "wrong-1234", **ports())
    finding = examined.problem("refuses the key that was given")
    assert "--api-key" in str(finding.mend)


@pytest.mark.parametrize(
    ("variables", "words", "mend"),
    [
        ({"GENERATOR_TORCH_THREAD": "1"}, ["GENERATOR_TORCH_THREAD is set"], "unset"),
        ({"GENERATR_DEVICE": "cpu"}, ["GENERATR_DEVICE", "read by nobody"], "GENERATOR_DEVICE"),
        ({"RAG_APIKEY": "x"}, ["RAG_APIKEY", "read by nobody"], "RAG_API_KEY"),
        ({"RETRIEVER_PORT": "http"}, ["RETRIEVER_PORT"], "correct"),
        ({"RETRIEVER_API_KEY_FILE": "/nowhere"}, ["RETRIEVER_API_KEY_FILE", "cannot read"], "correct"),
        ({"GENERATOR_HOST": "::"}, ["asks for no key", "everyone"], "GENERATOR_ADMIN_KEY"),
        ({"GENERATOR_DEVICE": "cuda"}, ["sees no GPU", "GENERATOR_DEVICE=cuda"], "GENERATOR_DEVICE=cpu"),
        ({"RETRIEVER_DEVICE": "cuda"}, ["sees no GPU", "RETRIEVER_DEVICE=cuda"], "RETRIEVER_DEVICE=cpu"),
    ],
    ids=str,
)
def test_a_setting_that_is_wrong(variables: dict[str, str], words: list[str], mend: str, tmp_path: Path) -> None:
    if any(value == "cuda" for value in variables.values()) and shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU here")
    examined = Examined(**{**ports(), "RETRIEVER_DATA_DIR": str(tmp_path / "data"), **variables})
    assert mend in str(examined.problem(*words).mend)


def test_a_damaged_collection(up: Up, data_dir: Path, tmp_path: Path) -> None:
    data = shutil.copytree(data_dir, tmp_path / "data")
    [index] = data.glob("collections/default/generations/*/index.faiss")
    os.truncate(index, 100)
    finding = Examined(RETRIEVER_DATA_DIR=str(data), **ports()).problem("default is damaged", str(index))
    assert finding.check == "collections"
    assert "rag index restore" in str(finding.mend)
