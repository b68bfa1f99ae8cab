"""Checks the user's choice of device: "auto", "cpu", "cuda" or "cuda:N"."""

from __future__ import annotations

import torch

from vitapack.runtime import choices
from vitapack.runtime.errors import UserError


def chosen_device(name: str) -> str:
    """The device of this name; "auto" is the GPU if torch sees one, else the CPU.

    Raises UserError for an unknown or missing device.
    """
    if choices.device(name) == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA GPU; use --device cpu")
        if int(index[:9] or 0) >= (count := torch.cuda.device_count()):
            raise UserError(f"no device {name!r}: torch sees {count} CUDA GPUs, counted from 0")
    return name
