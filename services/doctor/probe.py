"""Runs a few lines of Python in a process of their own and reads the JSON that they print last.

A library that is broken kills that process and not the doctor, what it prints reaches nobody, and two OpenMP runtimes
never meet.
"""

import json
import subprocess
import sys
from typing import Any

from shared.errors import RagError

_TIMEOUT_S = 300


class ProbeFailed(RagError):
    """The message is the last line that the process wrote."""

    code = "probe_failed"


def probe(program: str, *arguments: str) -> Any:
    """Raises: ProbeFailed."""
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    try:
        ran = subprocess.run(  # noqa: S603  our own interpreter, our own program
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise ProbeFailed(f"it did not end within {_TIMEOUT_S} s") from None
    lines = ran.stdout.strip().splitlines()
    if ran.returncode != 0 or not lines:
        said = ran.stderr.strip().splitlines()
        raise ProbeFailed(said[-1] if said else f"it ended with exit code {ran.returncode}")
    return json.loads(lines[-1])
