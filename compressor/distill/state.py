"""The saved state of a training, from which an interrupted one continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from vitapack.runtime.errors import UserError
from vitapack.runtime.files import atomic_path


class State:
    """A training after one iteration, in a file: parameters, Adam's moments, the iteration."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Raises UserError if `path` exists and belongs to a training with another identity."""
        self.path, self.identity = path, json.dumps(identity, sort_keys=True)
        self.header: dict[str, str] = {}
        if path.exists():
            with safe_open(path, "pt") as file:
                self.header = file.metadata() or {}
            if self.header.get("identity") != self.identity:
                raise UserError(
                    f"{path} belongs to a training with other files or settings: continue with "
                    f"those, delete {path.parent}, or name another output file"
                )

    def load(
        self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[int, float | None]:
        """Restores both. Returns the iteration and the loss before training, (0, None) if no state
        was saved."""
        if not self.header:
            return 0, None
        step, tensors = int(self.header["step"]), load_file(self.path)
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[name])
            moments = {key: tensors[f"{key} {name}"] for key in ("exp_avg", "exp_avg_sq")}
            moments = {key: tensor.to(parameter.device) for key, tensor in moments.items()}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        return step, float(self.header["before"])

    def save(
        self,
        step: int,
        before: float,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Writes the file atomically. `step`: iterations done; `before`: loss before training."""
        tensors = {name: parameter.detach() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key} {name}"] = optimizer.state[parameter][key]
        metadata = {"identity": self.identity, "step": str(step), "before": str(before)}
        with atomic_path(self.path) as temporary:
            save_file(tensors, temporary, metadata)
