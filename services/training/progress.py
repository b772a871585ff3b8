"""Progress of several trainings side by side: bars on a terminal, a line now and then in a log."""

import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

LOG_EVERY_S = 30.0


class ProgressBoard:
    """Shows the events that `services.training.loop.train` reports, for each of the trainings named."""

    def __init__(self, names: list[str], console: Console | None = None) -> None:
        self.console = console or Console()
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("ETA {task.fields[eta]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._bars: dict[str, TaskID] = {
            name: self._progress.add_task(name, total=None, loss=float("nan"), eta="-") for name in names
        }
        self._logged_at = dict.fromkeys(names, 0.0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, name: str, event: Mapping[str, Any]) -> None:
        """Show one event of the training called `name`."""
        if event["event"] == "evaluation":
            figures = "  ".join(f"{key} {value:.1%}" for key, value in event.items() if isinstance(value, float))
            self.console.print(f"{name:<10} step {event['step']:>6}  {figures}", highlight=False)
            return
        eta = str(timedelta(seconds=round((event["steps"] - event["step"]) / event["rate"])))
        self._progress.update(
            self._bars[name], completed=event["step"], total=event["steps"], loss=event["loss"], eta=eta
        )
        due = time.monotonic() - self._logged_at[name] >= LOG_EVERY_S
        if not self.console.is_terminal and (due or event["step"] == event["steps"]):
            self._logged_at[name] = time.monotonic()
            self.console.print(
                f"{name:<10} step {event['step']:>6}/{event['steps']}  loss {event['loss']:.3f}"
                f"  {event['rate']:.1f} steps/s  ETA {eta}",
                highlight=False,
            )
