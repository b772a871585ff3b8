"""The state of a training run on disk, so that a killed run goes on where it was.

Nothing random is stored: every step draws its examples from a generator seeded by the step's number, and the models
have no dropout. Weights, optimizer and step number are the whole state.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.errors import StartupError

STATE_FILE = "state.pt"


def save_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, recipe: Mapping[str, Any]
) -> None:
    """Write the state after `step` steps. Atomic: a kill leaves the old file or the new one."""
    state = {
        "step": step,
        "recipe": dict(recipe),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    partial = folder / (STATE_FILE + ".partial")
    torch.save(state, partial)
    partial.replace(folder / STATE_FILE)


def restore_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Mapping[str, Any]) -> int:
    """Load the state in `folder`, if there is one, and return the number of steps done.

    Raises:
        StartupError: the folder holds a run of another recipe (other steps, seed, vocabulary or corpus).
    """
    path = folder / STATE_FILE
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)  # refuses anything but tensors and plain containers
    if state["recipe"] != dict(recipe):
        raise StartupError(
            f"{folder} holds an unfinished run of another recipe: remove the folder or choose another one"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def load_trained(folder: Path, model: nn.Module) -> None:
    """Load the weights of the run in `folder` into `model`."""
    model.load_state_dict(torch.load(folder / STATE_FILE, weights_only=True)["model"])
