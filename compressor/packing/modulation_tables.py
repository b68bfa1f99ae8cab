"""adaLN modulation as exact tables: its value at every time a sampler will ask for.

Every modulation linear is a function of t alone (and of the fixed guidance value in models that
embed it), 27 % of all weights. At a sampler's own times that is a table of 0.2 to 0.45 MB a step,
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
    """The vector SiLU(vec(t)) at all nodes, and from it any modulation linear's rows."""

    def __init__(
        self,
        config: Architecture,
        tensor: Callable[[str], Tensor],
        nodes: Sequence[float],
        guidance: float | None = None,
    ) -> None:
        """`tensor` gives an original tensor by its canonical name; nodes are model times."""
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
        parts = [x @ part.double().t() for part in weight.split(512)]
        return torch.cat(parts, dim=1) + bias.double()

    def rows(self, name: str) -> Tensor:
        """(T, out) float64 of the modulation linear `name`."""
        return self._linear(name, self.vector)


def exact_sinusoid(t: Tensor, config: TimeEmbedding) -> Tensor:
    """`vitapack.runtime.networks.modulation.sinusoid` in float64.

    The frequencies are those of the float32 code, rounded as there: they are part of what the
    network learned, and at 1000 rad a float32 rounding moves the angle by 6e-5.
    """
    half = config.channels // 2
    steps = torch.arange(half, dtype=torch.float32)
    frequencies = torch.exp(-math.log(config.max_period) * steps / half).double()
    angles = (t.float() * config.scale).double()[:, None] * frequencies
    parts = [angles.cos(), angles.sin()]
    return torch.cat(parts if config.cos_first else parts[::-1], dim=-1)


def stored(rows: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The rows in the table's dtype. Raises UserError where fp16 cannot hold them."""
    if dtype == torch.float16 and float(rows.abs().max()) > HALF_MAX:
        raise UserError(
            f"{name}: modulation of {float(rows.abs().max()):.3g} does not fit fp16; "
            "store the tables as float32"
        )
    return rows.to(dtype)
