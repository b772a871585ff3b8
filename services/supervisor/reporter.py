"""What the supervisor says while it runs: to a person at a terminal, or as JSON lines to a log collector."""

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console
from rich.text import Text

from services.client.calls import Service
from services.client.clients import DEFAULT_URL

_STYLES: dict[Service, str] = {"retriever": "cyan", "generator": "magenta"}
_WIDTH = max(map(len, _STYLES))


class Reporter(Protocol):
    def line(self, service: Service, text: str) -> None:
        """A line that a service wrote."""

    def waiting(self, reasons: Mapping[Service, Sequence[str]]) -> None:
        """Not up yet, and why; called often, with an empty mapping when all are ready."""

    def up(self, urls: Mapping[Service, str], took_s: float) -> None: ...

    def note(self, text: str, service: Service | None = None) -> None: ...

    def failure(self, text: str, service: Service | None = None) -> None: ...


class ConsoleReporter:
    """Lines with the service's name before them; a spinner while the services start, if there is a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._status = self._console.status("starting the services …")
        self._said = ""

    def line(self, service: Service, text: str) -> None:
        self._print(Text.assemble((f"{service:>{_WIDTH}} │ ", _STYLES[service]), Text.from_ansi(text)))

    def waiting(self, reasons: Mapping[Service, Sequence[str]]) -> None:
        if not reasons:
            self._status.stop()
            return
        text = "waiting for " + " · ".join(f"the {name}: {', '.join(why)}" for name, why in reasons.items())
        if self._console.is_terminal:
            self._status.update(text)
            self._status.start()
        elif text != self._said:
            self._print(Text(text))
        self._said = text

    def up(self, urls: Mapping[Service, str], took_s: float) -> None:
        self._print(Text(f"Both services are ready after {took_s:.1f} s.", "bold green"))
        self._print(Text.assemble("  Ask in the browser  ", (urls["generator"] + "/", "bold underline")))
        elsewhere = "" if urls["generator"] == DEFAULT_URL else f" --url {urls['generator']}"
        ask = f'{_command()} ask "How many people live in Paris?"{elsewhere}'
        self._print(Text.assemble("  or on the terminal  ", (ask, "bold")))
        self._print(Text("  Ctrl-C stops both."))

    def note(self, text: str, service: Service | None = None) -> None:
        self._print(Text(f"the {service} {text}" if service else text, "yellow"))

    def failure(self, text: str, service: Service | None = None) -> None:
        self._status.stop()
        self._print(Text(f"the {service} {text}" if service else text, "bold red"))

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)


def _command() -> str:
    """What a person has to type for `rag`: `make run` does not put .venv/bin on the path."""
    started_as = Path(sys.argv[0])
    return os.path.relpath(started_as) if started_as.name == "rag" and not shutil.which("rag") else "rag"


class JsonReporter:
    """One JSON object a line, which names the service that it is of."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._said: dict[Service, list[str]] = {}

    def line(self, service: Service, text: str) -> None:
        try:
            entry = json.loads(text)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            print(json.dumps({"service": service, **entry}, ensure_ascii=False), file=self._stream, flush=True)
        else:  # written before logging was set up, or by a crash
            self._write("info", text, service=service)

    def waiting(self, reasons: Mapping[Service, Sequence[str]]) -> None:
        said = {name: list(why) for name, why in reasons.items()}
        if said and said != self._said:
            self._write("info", "waiting", reasons=said)
        self._said = said

    def up(self, urls: Mapping[Service, str], took_s: float) -> None:
        self._write("info", "ready", urls=dict(urls), took_s=round(took_s, 3))

    def note(self, text: str, service: Service | None = None) -> None:
        self._write("warning", text, service=service or "supervisor")

    def failure(self, text: str, service: Service | None = None) -> None:
        self._write("error", text, service=service or "supervisor")

    def _write(self, level: str, event: str, **fields: object) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        entry = {"timestamp": now, "level": level, "service": "supervisor", "event": event, **fields}
        print(json.dumps(entry, ensure_ascii=False), file=self._stream, flush=True)
