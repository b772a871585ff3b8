"""The README's transcripts are true: its commands are run, its Python is run, and the output is compared.

In a ```console block a line that begins with ``$ `` is a command (`curl` or `rag`), what follows is its output. In
both kinds of block `…` stands for anything: timings, and figures that may move in the last digits. ```pycon blocks
are doctests.
"""

import doctest
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.running import ROOT, Up, environment

pytestmark = pytest.mark.slow
README = (ROOT / "README.md").read_text()


@dataclass(frozen=True)
class Transcript:
    command: str
    output: str


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def transcripts() -> list[Transcript]:
    found = []
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            # A command goes on after a backslash at the end of a line.
            command = re.match(r"(?:.*\\\n)*.*\n", part)
            assert command is not None
            found.append(Transcript(command[0].strip(), part[command.end() :].strip()))
    return found


def addressed(text: str, up: Up) -> str:
    """The text with the addresses of the services that run here."""
    return text.replace("http://127.0.0.1:8000", up.url).replace("http://127.0.0.1:8001", up.retriever_url)


def lines(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


@pytest.mark.parametrize("transcript", transcripts(), ids=lambda transcript: transcript.command[:60])
def test_a_command_prints_what_the_readme_says(transcript: Transcript, up: Up, tmp_path: Path) -> None:
    assert transcript.command.split()[0] in ("curl", "rag"), "only these are run: use ```sh for others"
    rag = tmp_path / "rag"
    rag.write_text(f'#!/bin/sh\nexec {sys.executable} -m services.cli "$@"\n')
    rag.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-c", addressed(transcript.command, up)],
        cwd=ROOT,
        env=environment(RAG_URL=up.url, RAG_RETRIEVER_URL=up.retriever_url, PATH=path),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    expected = ".*?".join(map(re.escape, lines(addressed(transcript.output, up)).split("…")))
    printed = lines(ran.stdout)
    assert re.fullmatch(expected, printed, flags=re.DOTALL), f"the README is not true; it printed:\n{printed}"


def test_the_python_examples_print_what_the_readme_says(up: Up) -> None:
    examples = addressed("\n".join(blocks("pycon")), up).replace("…", "...")
    parsed = doctest.DocTestParser().get_doctest(examples, {}, "README.md", "README.md", 0)
    assert parsed.examples
    report: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.DocTestRunner(optionflags=flags).run(parsed, out=report.append)
    assert failed == 0, "".join(report)


def test_the_readme_shows_each_way_in() -> None:
    commands = [transcript.command.split()[0] for transcript in transcripts()]
    assert {"curl", "rag"} <= set(commands)
