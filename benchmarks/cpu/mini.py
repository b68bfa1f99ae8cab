"""The Hunyuan3D-2mini with random weights of `benchmarks.cpu`: files, inputs, operation counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from vitapack.runtime.pipeline.load import load_dit

CONDITION = 1370  # tokens of DINOv2 at 518 pixels
HEADS, HEAD = 16, 64


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


def prepare(work: Path) -> Path:
    """Writes the random 2mini checkpoint and its two packed files, once; returns the checkpoint."""
    work.mkdir(parents=True, exist_ok=True)
    model = work / "mini"
    if not model.exists():
        vitapack("random-checkpoint", "hunyuan3d-2mini", "--parts", "dit", "-o", model)
    for plan in ("int8", "int4"):
        path = work / f"{plan}.safetensors"
        if not path.exists():
            vitapack("compress", model, "--plan", plan, "--steps", "5", "-o", path)
    return model


def vitapack(*arguments: Any) -> None:
    subprocess.run([sys.executable, "-m", "vitapack", *map(str, arguments)], check=True)


def inputs(latents: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(latents)
    x = torch.randn(2, latents, 64, generator=rng)
    return x, torch.zeros(2), torch.randn(2, CONDITION, 1536, generator=rng)


def linear_gops(latents: int) -> dict[str, float]:
    """1e9 operations of 2mini's blocks at batch 2: 24 layers of 12 h^2 per token, and attention.

    Without those of the last layer whose results nothing reads: 10 h^2 per condition token, and
    the condition tokens' queries.
    """
    tokens, hidden = latents + CONDITION, HEADS * HEAD
    return {
        "linears": 2 * 2e-9 * hidden**2 * (24 * 12 * tokens - 10 * CONDITION),
        "attention": 2 * 4e-9 * tokens * hidden * (24 * tokens - CONDITION),
    }


def float32_output(work: Path, latents: int) -> torch.Tensor:
    """The original's output in float32, cached: it takes half a minute at 512 latents."""
    place = work / f"float32-{latents}.pt"
    if not place.exists():
        torch.save(load_dit(work / "mini")(*inputs(latents)), place)
    return torch.load(place, weights_only=True)
