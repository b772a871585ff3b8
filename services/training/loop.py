"""The training loop shared by the retriever and the reader."""

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from services.training.checkpoint import restore_state, save_state
from services.training.schedule import Schedule

SMOOTHING = 0.98
"""Weight of the past in the reported loss: a window of some 50 steps."""

Report = Callable[[Mapping[str, Any]], None]
"""Receives what happens: ``{"event": "step", "step", "steps", "loss", "rate"}`` or ``{"event": "evaluation", …}``."""


class Task(Protocol):
    """What is trained: a model, its loss on freshly drawn examples, and how well it does on the dev split."""

    @property
    def model(self) -> nn.Module: ...

    def loss(self, rng: random.Random, progress: float) -> Tensor:
        """Loss of one batch drawn from `rng`; `progress` in [0, 1) is the share of the run done (a curriculum)."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Figures of merit on the dev split."""
        ...


def new_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW that decays matrices only: decaying a bias or a norm's gain pulls it to a value that means nothing."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(0.9, 0.98),
    )


def train(
    task: Task,
    schedule: Schedule,
    folder: Path,
    report: Report,
    *,
    seed: int = 0,
    recipe: Mapping[str, Any] | None = None,
    report_every: int = 20,
    evaluate_every: int = 1000,
    checkpoint_every_s: float = 60.0,
    stop_after: int | None = None,
) -> None:
    """Train `task` for ``schedule.steps`` steps, going on from the state in `folder` if there is one.

    Each step draws its batch from ``Random(f"{seed}/{step}")``, so a resumed run sees what an uninterrupted one sees
    and ends in the same weights. `recipe` names everything else that the result depends on; a state of another
    recipe is refused. `stop_after` ends the run early, with its state saved, after that many steps in total.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {"steps": schedule.steps, "peak": schedule.peak, "seed": seed, **(recipe or {})}
    optimizer = new_optimizer(task.model)
    start = restore_state(folder, task.model, optimizer, recipe)
    stop = min(schedule.steps, stop_after or schedule.steps)
    smoothed, saved_at, started_at = None, time.monotonic(), time.monotonic()
    task.model.train()
    for step in range(start, stop):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = task.loss(random.Random(f"{seed}/{step}"), step / schedule.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()

        done = step + 1
        smoothed = loss.item() if smoothed is None else SMOOTHING * smoothed + (1 - SMOOTHING) * loss.item()
        if done % report_every == 0 or done == stop:
            rate = (done - start) / (time.monotonic() - started_at)
            report({"event": "step", "step": done, "steps": schedule.steps, "loss": smoothed, "rate": rate})
        if done % evaluate_every == 0 or done == schedule.steps:
            report({"event": "evaluation", "step": done, **task.evaluate()})
            task.model.train()
        if time.monotonic() - saved_at > checkpoint_every_s or done == stop:
            save_state(folder, task.model, optimizer, done, recipe)
            saved_at = time.monotonic()
