"""The state of an interrupted training on disk."""

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
    """The training after a step, on the disk: parameters, Adam's moments, the step."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """UserError where the file there belongs to other settings."""
        self.path, self.identity = path, json.dumps(identity, sort_keys=True)
        self.header: dict[str, str] = {}
        if path.exists():
            with safe_open(path, "pt") as file:
                self.header = file.metadata() or {}
            if self.header.get("identity") != self.identity:
                raise UserError(
                    f"{path} belongs to a training with other files or settings: go on with "
                    f"those, delete {path.parent}, or name another output file"
                )

    def load(
        self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[int, float | None]:
        """Fills both; returns the step and the loss before the training (0 and None: no state)."""
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
        tensors = {name: parameter.detach() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key} {name}"] = optimizer.state[parameter][key]
        metadata = {"identity": self.identity, "step": str(step), "before": str(before)}
        with atomic_path(self.path) as part:
            save_file(tensors, part, metadata)
