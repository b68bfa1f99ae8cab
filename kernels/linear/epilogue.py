"""The epilogue of a packed GEMM: bias, GELU, gate and residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Epilogue:
    """Bias, then GELU (tanh form) from a column on, then residual + gate * y."""

    bias: Tensor | None = None  # (N,)
    gelu_from: int | None = None
    residual: Tensor | None = None  # (M, N), only together with a gate
    gate: Tensor | None = None  # (1 or M / tokens, N)
    tokens: int = 1  # rows that share a row of the gate

    def flat(self) -> tuple[Tensor | None, int, Tensor | None, Tensor | None, int]:
        """As arguments of torch.library operators, -1 for no GELU; `unflat` is the inverse."""
        start = -1 if self.gelu_from is None else self.gelu_from
        return self.bias, start, self.residual, self.gate, self.tokens

    @classmethod
    def unflat(
        cls, bias: Tensor | None, start: int, residual: Tensor | None, gate: Tensor | None,
        tokens: int,
    ) -> Epilogue:  # fmt: skip
        return cls(bias, None if start < 0 else start, residual, gate, tokens)

    def apply(self, y: Tensor) -> Tensor:
        """Applies the epilogue to a product y (M, N) in float32, in plain PyTorch."""
        if self.bias is not None:
            y = y + self.bias.float()
        y = gelu_from(y, self.gelu_from)
        if self.residual is None or self.gate is None:
            return y
        rows = torch.arange(y.shape[0], device=y.device) // self.tokens
        gate = self.gate if self.gate.shape[0] == 1 else self.gate[rows]
        return self.residual.float() + gate.float() * y


def gelu_from(y: Tensor, column: int | None) -> Tensor:
    """GELU (tanh form) of the columns from `column` on; y unchanged if `column` is None."""
    if column is None:
        return y
    if column == 0:
        return F.gelu(y, approximate="tanh")
    return torch.cat([y[:, :column], F.gelu(y[:, column:], approximate="tanh")], dim=1)
