"""A packed linear that can be trained: float master weights, seen through the file's own grid.

    linear = TrainedLinear(packed, original)   # stands in the packed linear's place
    linear(x)                                  # what the file will hold, gradients to the master
    linear.stored()                            # its tensors for the file

The integers are chosen again at every call, on the channel scales, group scales and zero points
that the packed file has: layout and size stay, and what is trained is what will be held. The
rounding passes its gradient straight through (Bengio et al. 2013).
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
        """`original`: the weight (N, K) that was packed. The master is this one wherever it rounds
        to the file's integer, and the file's own value elsewhere (in a file that was fine-tuned
        before): so training begins at exactly the packed network, but inside the rounding
        intervals, not all in their middles, where no small step would change an integer."""
        super().__init__()
        self.grid = packed.packed()
        held = dequantize(self.grid)
        near = dequantize(rounded(original.to(held), self.grid)) == held
        self.weight = nn.Parameter(torch.where(near, original.to(held), held))
        self.bias = None if packed.bias is None else nn.Parameter(packed.bias.float())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            change = dequantize(rounded(self.weight, self.grid)) - self.weight
        return F.linear(x, self.weight + change, self.bias)

    def stored(self) -> dict[str, Tensor]:
        """Tensors by the suffix that each has after the linear's name in the packed file."""
        weight = rounded(self.weight.detach(), self.grid)
        tensors = {f"weight.{part}": tensor for part, tensor in weight.tensors.items()}
        return tensors if self.bias is None else tensors | {"bias": self.bias.detach()}
