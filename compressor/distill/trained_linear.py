"""A trainable packed linear: float master weights, rounded to the packed file's grid.

    linear = TrainedLinear(packed, original)   # replaces the packed linear
    linear(x)                                  # uses the rounded weight; gradients reach the master
    linear.stored()                            # tensors for the packed file

Every forward pass rounds the master again, with the channel scales, group scales and zero points of
the packed file: layout and size stay the same, and training sees exactly the weights that will be
stored. Gradients pass straight through the rounding (Bengio et al. 2013).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitapack.compressor.packing.quantizers import rounded
from vitapack.kernels.linear.weights import dequantize
from vitapack.runtime.networks.linear import PackedLinear


class TrainedLinear(nn.Module):
    """y = x W^T + b; W float32 (N, K) is rounded in the forward pass, b float32 (N,) is not."""

    def __init__(self, packed: PackedLinear, original: Tensor) -> None:
        """`original`: the weight (N, K) before packing.

        The master starts from the original weight if it rounds to the stored integer, else (in a
        file that was fine-tuned before) from the stored value. Training so starts exactly at the
        packed network, with masters spread over their rounding intervals: from the middle of an
        interval no small step would change an integer.
        """
        super().__init__()
        self.grid = packed.packed()
        stored = dequantize(self.grid)
        unchanged = dequantize(rounded(original.to(stored), self.grid)) == stored
        self.weight = nn.Parameter(torch.where(unchanged, original.to(stored), stored))
        self.bias = None if packed.bias is None else nn.Parameter(packed.bias.float())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            change = dequantize(rounded(self.weight, self.grid)) - self.weight
        return F.linear(x, self.weight + change, self.bias)

    def stored(self) -> dict[str, Tensor]:
        """Tensors for the packed file, keyed by their suffix to the linear's name ("bias", ...)."""
        weight = rounded(self.weight.detach(), self.grid)
        tensors = {f"weight.{suffix}": tensor for suffix, tensor in weight.tensors.items()}
        return tensors if self.bias is None else tensors | {"bias": self.bias.detach()}
