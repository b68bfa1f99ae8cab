"""From a time to the shifts, scales and gates of adaLN, by the released weights or by exact tables.

All of it depends on the step's time (and guidance) alone, `When`: a packed file holds the values at
its samplers' own times in place of the weights (compressor/packing/modulation_tables.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitapack.runtime.errors import UserError


@dataclass(frozen=True)
class TimeEmbedding:
    """How a family turns its time (or guidance) value into the modulation vector."""

    channels: int  # of the sinusoid: 256 (Hunyuan3D) or the hidden size (Step1X-3D)
    hidden: int  # of the MLP between: the hidden size, or 4x of it
    scale: float  # t is multiplied by this first: 1000 for t in 0..1, 1 for t in 0..1000
    max_period: float  # 1000 in Hunyuan3D (its time_factor lands in that argument), else 10000
    cos_first: bool
    activation: str  # "silu" or "gelu" (exact)


def sinusoid(t: Tensor, config: TimeEmbedding) -> Tensor:
    """(B,) times to (B, channels) sinusoids, float32.

    Kept in float32 whatever the model's dtype: in fp16 the arguments near 1000 are rounded to 0.5.
    """
    half = config.channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(config.max_period) * steps / half)
    angles = (t.float() * config.scale)[:, None] * frequencies
    parts = [angles.cos(), angles.sin()]
    return torch.cat(parts if config.cos_first else parts[::-1], dim=-1)


@dataclass
class When:
    """What the modulation of one step depends on: t (and guidance), and nothing else.

    `vector` (B or 1, h) feeds modulation linears; `rows` (B or 1,) selects rows of tables.
    """

    vector: Tensor | None = None
    rows: Tensor | None = None


class Modulation(nn.Module):
    """`count` chunks (B, 1, h) of lin(SiLU(vec)): shifts, scales and gates."""

    def __init__(self, hidden: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(hidden, count * hidden)

    def forward(self, when: When) -> tuple[Tensor, ...]:
        assert when.vector is not None
        return self.lin(when.vector)[:, None].chunk(self.count, dim=-1)


class ModulationTable(nn.Module):
    """The same chunks read from an exact table (T, count*h) at the sampler's own times."""

    table: Tensor

    def __init__(self, table: Tensor, count: int) -> None:
        super().__init__()
        self.count = count
        self.register_buffer("table", table)

    def forward(self, when: When) -> tuple[Tensor, ...]:
        assert when.rows is not None
        return self.table[when.rows][:, None].chunk(self.count, dim=-1)


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
    """A time or guidance value that the modulation tables of a packed file do not hold."""


class TimeNodes(nn.Module):
    """Finds the table row of each time: exact nodes only, never between them.

    Interpolating modulation is not safe: at 128 nodes the error is still 45 % with weights that use
    the sinusoid's fast components, so a time that has no row is an error that lists what there is.
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
            asked = guidance.double()
            if ((asked - self.guidance).abs() > 1e-3 * (1 + abs(self.guidance))).any():
                raise MissingTime(
                    f"the modulation tables hold guidance {self.guidance:g}, "
                    f"not {asked.flatten()[0].item():g}; compress again with that value"
                )
        return rows
