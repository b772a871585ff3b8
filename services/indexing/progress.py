"""Progress of embedding and of building: a bar on a terminal, a line now and then in a log."""

import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LOG_EVERY_S = 30.0


class EmbeddingProgress:
    """Passages done, passages per second and time remaining; its :meth:`show` is a `services.indexing.embed.Progress`.

    Both figures count this run only: what an earlier run has done was not done in this run's time.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("embedding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:,.0f} passages/s"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._resumed = 0
        self._started_at = self._logged_at = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, done: int, count: int) -> None:
        """Show that `done` of `count` passages are embedded."""
        now = time.monotonic()
        if self._task is None:
            self._task = self._bar.add_task("embedding", total=count, completed=done, rate=0.0)
            self._resumed, self._started_at, self._logged_at = done, now, now
            if done > 0:
                self.console.print(f"{done:,} of {count:,} passages are embedded already", highlight=False)
            return
        rate = (done - self._resumed) / max(now - self._started_at, 1e-9)
        self._bar.update(self._task, completed=done, rate=rate)
        due = now - self._logged_at >= LOG_EVERY_S
        if not self.console.is_terminal and (due or done == count):
            self._logged_at = now
            remaining = timedelta(seconds=round((count - done) / max(rate, 1e-9)))
            self.console.print(
                f"{done:,} of {count:,} passages  {rate:,.0f} passages/s  remaining {remaining}", highlight=False
            )


class BuildProgress:
    """A bar for each stage of a build; its :meth:`show` is a `retriever_svc.checkpoint.Progress`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._logged_at = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, stage: str, done: int, count: int | None) -> None:
        """Show that `done` of `count` are through `stage`."""
        began = stage not in self._tasks
        if began:
            self._tasks[stage] = self._bars.add_task(stage, total=count, completed=done)
            if done and done != count:
                self.console.print(f"{stage} goes on at {done:,}", highlight=False)
        self._bars.update(self._tasks[stage], completed=done, total=count)
        now = time.monotonic()
        if not self.console.is_terminal and (began or done == count or now - self._logged_at >= LOG_EVERY_S):
            self._logged_at = now
            self.console.print(f"{stage}: {done:,}" + (f" of {count:,}" if count else ""), highlight=False)
