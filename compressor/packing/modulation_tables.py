"""adaLN modulation as exact tables: its values at all times of given schedules.

Modulation linears, 27 % of all weights, depend on t alone (and on the fixed guidance value in
models that embed it). Their outputs at a schedule's times are a table of 0.2 to 0.45 MB per step,
computed here from the ORIGINAL weights in float64 and rounded once: more exact than the fp16 model.

    table = ModulationTables(config, tensor, nodes, guidance=None)
    rows = table.rows("double_blocks.0.img_mod.lin")    # (T, 6 h) float64
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitapack.compressor.packing.quantizers import check_finite
from vitapack.runtime.errors import UserError
from vitapack.runtime.format.architecture import Architecture, TimeEmbedding

HALF_MAX = 65504.0


class ModulationTables:
    """Holds the vector SiLU(vec(t)) at all nodes; `rows` gives a modulation linear's table."""

    def __init__(
        self,
        config: Architecture,
        tensor: Callable[[str], Tensor],
        nodes: Sequence[float],
        guidance: float | None = None,
    ) -> None:
        """`tensor` returns an original tensor by its canonical name; nodes are model times."""
        if config.embeds_guidance and guidance is None:
            raise UserError("this model embeds its guidance: name the value that the tables hold")
        self.tensor = tensor
        vector = self._mlp("time_in", config.time, torch.tensor(nodes, dtype=torch.float64))
        if config.embeds_guidance:
            value = torch.tensor([guidance], dtype=torch.float64)
            vector = vector + self._mlp("guidance_in", config.time, value)
        self.vector = F.silu(vector)  # (T, h) float64

    def _mlp(self, name: str, config: TimeEmbedding, t: Tensor) -> Tensor:
        wide = self._linear(f"{name}.in_layer", exact_sinusoid(t, config))
        wide = F.silu(wide) if config.activation == "silu" else F.gelu(wide)
        return self._linear(f"{name}.out_layer", wide)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias")
        check_finite(weight, f"{name}.weight")
        check_finite(bias, f"{name}.bias")
        # In slices of rows: a whole (6144, 1024) weight would need 50 MB as float64.
        columns = [x @ rows.double().t() for rows in weight.split(512)]
        return torch.cat(columns, dim=1) + bias.double()

    def rows(self, name: str) -> Tensor:
        """(T, out) float64 of the modulation linear `name`."""
        return self._linear(name, self.vector)


def exact_sinusoid(t: Tensor, config: TimeEmbedding) -> Tensor:
    """`vitapack.runtime.networks.modulation.sinusoid` in float64.

    The frequencies are rounded to float32 as in the network's code, since it was trained with them;
    at 1000 rad a float32 rounding moves the angle by 6e-5.
    """
    half = config.channels // 2
    steps = torch.arange(half, dtype=torch.float32)
    frequencies = torch.exp(-math.log(config.max_period) * steps / half).double()
    angles = (t.float() * config.scale).double()[:, None] * frequencies
    parts = [angles.cos(), angles.sin()]
    return torch.cat(parts if config.cos_first else parts[::-1], dim=-1)


def stored(rows: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The rows in the table's dtype. Raises UserError if they do not fit fp16."""
    if dtype == torch.float16 and float(rows.abs().max()) > HALF_MAX:
        raise UserError(
            f"{name}: modulation of {float(rows.abs().max()):.3g} does not fit fp16; "
            "store the tables as float32"
        )
    return rows.to(dtype)
