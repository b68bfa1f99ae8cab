"""adaLN modulation: shifts, scales and gates of a step's time, from weights or exact tables.

Modulation depends on the time (and the embedded guidance) alone. A packed file therefore stores its
values at the sampler's own times instead of the weights (compressor/packing/modulation_tables.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitapack.runtime.errors import UserError
from vitapack.runtime.format.architecture import TimeEmbedding


def sinusoid(t: Tensor, config: TimeEmbedding) -> Tensor:
    """(B,) times to (B, channels) sinusoids, float32.

    Kept in float32 whatever the model's dtype: in fp16 the arguments near 1000 are rounded to 0.5.
    """
    half = config.channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(config.max_period) * steps / half)
    angles = (t.float() * config.scale)[:, None] * frequencies
    pair = [angles.cos(), angles.sin()]
    return torch.cat(pair if config.cos_first else pair[::-1], dim=-1)


@dataclass
class StepModulation:
    """Modulation input of one denoising step, computed from t and, if embedded, guidance.

    `vector` (B or 1, h) feeds modulation linears; `rows` (B or 1,) selects rows of tables.
    """

    vector: Tensor | None = None
    rows: Tensor | None = None


class Modulated(NamedTuple):
    """adaLN of one sublayer, (B or 1, 1, h) each: x + gate * f((1 + scale) * norm(x) + shift)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    """Computes the modulation of `sublayers` sublayers by one linear on the step's vector."""

    def __init__(self, hidden: int, sublayers: int) -> None:
        super().__init__()
        self.sublayers = sublayers
        self.lin = nn.Linear(hidden, 3 * sublayers * hidden)

    def forward(self, step: StepModulation) -> tuple[Modulated, ...]:
        assert step.vector is not None
        return grouped(self.lin(step.vector)[:, None].chunk(3 * self.sublayers, dim=-1))


class ModulationTable(nn.Module):
    """Reads the modulation from an exact table (T, chunks * h) at the sampler's own times."""

    table: Tensor

    def __init__(self, table: Tensor, chunks: int) -> None:
        super().__init__()
        self.count = chunks
        self.register_buffer("table", table)

    def chunks(self, step: StepModulation) -> tuple[Tensor, ...]:
        """All shifts, scales and gates, (B or 1, 1, h) each."""
        assert step.rows is not None
        return self.table[step.rows][:, None].chunk(self.count, dim=-1)

    def forward(self, step: StepModulation) -> tuple[Modulated, ...]:
        return grouped(self.chunks(step))


def grouped(chunks: Sequence[Tensor]) -> tuple[Modulated, ...]:
    """Groups chunks by sublayer: shift, scale and gate of each."""
    return tuple(Modulated(*chunks[i : i + 3]) for i in range(0, len(chunks), 3))


class TimeMLP(nn.Module):
    """in_layer -> activation -> out_layer on a sinusoid: (B,) to (B, h)."""

    def __init__(self, config: TimeEmbedding, out: int) -> None:
        super().__init__()
        self.config = config
        self.in_layer = nn.Linear(config.channels, config.hidden)
        self.out_layer = nn.Linear(config.hidden, out)

    def forward(self, t: Tensor) -> Tensor:
        wide = self.in_layer(sinusoid(t, self.config).to(self.in_layer.weight.dtype))
        return self.out_layer(F.silu(wide) if self.config.activation == "silu" else F.gelu(wide))


class MissingTime(UserError):
    """The modulation tables of a packed file lack a time or guidance value."""


class TimeNodes(nn.Module):
    """Finds the table row of each time; raises MissingTime for a time without a row.

    Interpolating modulation is not safe: at 128 nodes the error is still 45 % with weights that use
    the sinusoid's fast components. The error lists the schedules that the tables hold.
    """

    nodes: Tensor

    def __init__(self, nodes: Tensor, guidance: float | None, schedules: str) -> None:
        super().__init__()
        self.register_buffer("nodes", nodes)  # (T,) float64, ascending
        self.guidance = guidance
        self.schedules = schedules

    def forward(self, t: Tensor, guidance: Tensor | None) -> Tensor:
        wanted = t.double()
        rows = torch.searchsorted(self.nodes, wanted).clamp(max=len(self.nodes) - 1)
        before = (rows - 1).clamp(min=0)
        nearer = (wanted - self.nodes[before]).abs() < (self.nodes[rows] - wanted).abs()
        rows = torch.where(nearer, before, rows)
        # float32 rounding of a time near 1000 is 6e-5; schedules lie at least 1e-3 apart there.
        off = ~((self.nodes[rows] - wanted).abs() <= 1e-6 * (1 + wanted.abs()))  # NaN too
        if off.any():
            raise MissingTime(
                f"no modulation table at t={wanted[off][0].item():.6g}: this file holds "
                f"{self.schedules}; choose one of these or compress again with --steps"
            )
        if guidance is not None and self.guidance is not None:
            wanted = guidance.double()
            if ((wanted - self.guidance).abs() > 1e-3 * (1 + abs(self.guidance))).any():
                raise MissingTime(
                    f"the modulation tables hold guidance {self.guidance:g}, "
                    f"not {wanted.flatten()[0].item():g}; compress again with that value"
                )
        return rows
