"""Whole networks in the int8 engine. A plan owns all memory of a forward except the weights.

    plan = FlowPlan(batch, tokens, hidden, heads, mlp, threads, in_channels, condition_channels)
    plan.enter(latent_in, x)
    plan.expect(condition.shape[1])
    plan.block(stream_weights, cross_weights, modulation, condition)    # and so on
    plan.leave(final_linear, shift, scale, 1e-5, out)

The phases are in csrc/int8/blocks.h; nothing is allocated in them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitapack.kernels.linear.cpu import TYPES, Panels, built


@dataclass(frozen=True, eq=False)
class StreamWeights:
    """Packed linears and norms of a single or flow block, or of one stream of a double block.

    In a single block qkv is linear1, its MLP rows included, and there is no other linear. Norms are
    float32 (d,), or (H, d) if each head has its own.
    """

    qkv: Panels
    query_norm: Tensor
    key_norm: Tensor
    proj: Panels | None = None
    up: Panels | None = None
    down: Panels | None = None


@dataclass(frozen=True, eq=False)
class CrossWeights:
    """Cross-attention of a block. shift and scale, float32 (h,), are bias and weight - 1 of the
    LayerNorm before it."""

    shift: Tensor
    scale: Tensor
    q: Panels
    kv: Panels
    proj: Panels


@dataclass(frozen=True, eq=False)
class Dense:
    """A float linear: contiguous weight (N, K) of any float dtype, bias (N) float32 or None."""

    weight: Tensor
    bias: Tensor | None = None

    def fields(self, inputs: int) -> dict[str, Any]:
        """The engine's arguments. Raises ValueError unless the linear has `inputs` inputs."""
        (n, k), bias = self.weight.shape, self.bias
        if k != inputs or not self.weight.is_contiguous() or self.weight.dtype not in TYPES:
            raise ValueError(
                f"expected a contiguous float weight of {inputs} inputs, found "
                f"{tuple(self.weight.shape)} {self.weight.dtype}"
            )
        if bias is not None and (bias.shape != (n,) or not _plain(bias)):
            raise ValueError(f"the bias must be contiguous float32 ({n},)")
        return {
            "n": n,
            "k": k,
            "weight": self.weight.data_ptr(),
            "type": TYPES[self.weight.dtype],
            "bias": 0 if bias is None else bias.data_ptr(),
        }


class BlockPlan:
    """All memory of a forward except the weights, for one shape.

    `tokens` is the residual stream (B, T, h) float32: fill it with `enter`, run the blocks, read it
    with `leave`. The key starts with batch, tokens, hidden, heads, mlp, threads and inputs, the
    widest row that `enter` accepts.
    """

    def __init__(self, kind: str, key: Sequence[int]) -> None:
        batch, tokens, hidden, *_ = self.key = tuple(key)
        self._plan = getattr(built(), kind)(*key)
        array = (ctypes.c_float * math.prod((batch, tokens, hidden))).from_address(
            self._plan.tokens()
        )
        self.tokens = torch.frombuffer(array, dtype=torch.float32).view(batch, tokens, hidden)

    def enter(self, linear: Dense, x: Tensor, token: int = 0) -> None:
        """Sets the tokens from `token` on to linear(x), computed in float32.

        x (B or 1, n, K) of any float dtype.
        """
        batch, tokens, hidden = self.tokens.shape
        inputs = self.key[6]
        if len(linear.weight) != hidden or x.shape[-1] > inputs or x.shape[0] not in (1, batch):
            raise ValueError(
                f"expected rows of (1 or {batch}, n, {inputs} or less) to {hidden} channels, found "
                f"{tuple(x.shape)} to {len(linear.weight)}"
            )
        if not 0 <= token <= tokens - x.shape[1]:
            raise ValueError(f"{x.shape[1]} tokens from {token} on do not fit into {tokens}")
        x = x if x.dtype in TYPES else x.float()
        x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        self._plan.enter(
            linear.fields(x.shape[-1]), token, x.shape[1], x.data_ptr(), TYPES[x.dtype],
            x.stride(1), x.stride(0) if x.shape[0] > 1 else 0,
        )  # fmt: skip

    def leave(
        self, linear: Dense, shift: Tensor, scale: Tensor, epsilon: float, out: Tensor
    ) -> None:
        """Computes out = linear((1 + scale) * LayerNorm(z) + shift) of the last tokens in float32.

        shift and scale (B or 1, h) float32; out (B, n, N) contiguous, float32, bf16 or
        fp16.
        """
        batch, tokens, hidden = self.tokens.shape
        for values in (shift, scale):
            if values.shape not in ((1, hidden), (batch, hidden)) or values.dtype != torch.float32:
                raise ValueError(
                    f"expected float32 (1 or {batch}, {hidden}), found {tuple(values.shape)}"
                )
        if shift.stride() != scale.stride() or shift.stride(1) != 1 or len(shift) != len(scale):
            raise ValueError("shift and scale must have the same strides and contiguous rows")
        shape = (batch, min(out.shape[1], tokens), len(linear.weight))
        if out.shape != shape or not out.is_contiguous() or out.dtype not in TYPES:
            raise ValueError(
                f"expected a contiguous float output {shape}, found {tuple(out.shape)}"
            )
        self._plan.leave(
            linear.fields(hidden), tokens - out.shape[1], out.shape[1], shift.data_ptr(),
            scale.data_ptr(), shift.stride(0) if len(shift) > 1 else 0, epsilon, out.data_ptr(),
            TYPES[out.dtype],
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return int(self._plan.bytes())

    def seconds(self) -> tuple[dict[str, float], float]:
        """Time since the plan was made: seconds per operation summed over all threads, and wall
        seconds of the parallel phases (blocks without Python), waiting included."""
        return dict(self._plan.seconds()), float(self._plan.phase_seconds())


class DitPlan(BlockPlan):
    """Plan of a DiT; condition tokens precede latents. Each of the first `repeated` tokens counts
    as `times` equal ones."""

    def __init__(
        self,
        batch: int,
        tokens: int,
        hidden: int,
        heads: int,
        mlp: int,
        threads: int,
        inputs: int,
        repeated: int = 0,
        times: int = 1,
    ) -> None:
        super().__init__(
            "DitPlan", (batch, tokens, hidden, heads, mlp, threads, inputs, repeated, times)
        )

    def double_block(self, streams: Sequence[tuple[int, int, StreamWeights, Tensor]]) -> None:
        """Runs a double block. streams: (first token, tokens, weights, modulation (B or 1, 6h)
        float32) of each."""
        self._plan.double_block([_stream(*stream) for stream in streams])

    def single_block(
        self, weights: StreamWeights, linear2: Panels, modulation: Tensor, first: int = 0
    ) -> None:
        """Runs a single block on all tokens; modulation (B or 1, 3h) float32.

        Tokens before `first` serve only as keys and values and keep their old content.
        """
        if not 0 <= first <= self.tokens.shape[1]:
            raise ValueError(f"first token {first} is not in 0..{self.tokens.shape[1]}")
        whole = _stream(0, self.tokens.shape[1], weights, modulation)
        self._plan.single_block(whole, linear2.handle, first)


class FlowPlan(BlockPlan):
    """Plan of TRELLIS' flow transformer, whose blocks also attend to a condition (B, C, D)."""

    def __init__(
        self,
        batch: int,
        tokens: int,
        hidden: int,
        heads: int,
        mlp: int,
        threads: int,
        inputs: int,
        condition_channels: int,
    ) -> None:
        super().__init__(
            "FlowPlan", (batch, tokens, hidden, heads, mlp, threads, inputs, condition_channels)
        )
        self.condition_tokens = 0

    def expect(self, condition_tokens: int) -> None:
        """Allocates keys and values for `condition_tokens` condition tokens, unless done before."""
        self._plan.expect(condition_tokens)
        self.condition_tokens = condition_tokens

    def block(
        self, weights: StreamWeights, cross: CrossWeights, modulation: Tensor, condition: Tensor
    ) -> None:
        """Runs a block on all tokens; modulation (B or 1, 6h) float32.

        condition: (B or 1, C, D) float32 with the number of tokens given to `expect`; or
        (B or 1, h) float32, the constant that cross-attention adds to every token.
        """
        batch, tokens, hidden = self.tokens.shape
        channels = self.key[-1]
        shape = (hidden,) if condition.dim() == 2 else (self.condition_tokens, channels)
        if condition.shape[0] not in (1, batch) or tuple(condition.shape[1:]) != shape:
            raise ValueError(f"expected (1 or {batch}, {shape}), found {tuple(condition.shape)}")
        if not all(_plain(values) for values in (condition, cross.shift, cross.scale)):
            raise ValueError("condition and norms must be contiguous float32")
        self._plan.block(
            _stream(0, tokens, weights, modulation),
            {
                "shift": cross.shift.data_ptr(),
                "scale": cross.scale.data_ptr(),
                "q": cross.q.handle,
                "kv": cross.kv.handle,
                "proj": cross.proj.handle,
            },
            condition.data_ptr(),
            condition.stride(0) if condition.shape[0] > 1 else 0,
            condition.dim() == 2,
        )


def _stream(token: int, tokens: int, weights: StreamWeights, modulation: Tensor) -> dict[str, Any]:
    if not _plain(modulation):
        raise ValueError("modulation must be contiguous float32")
    norm = weights.query_norm
    stream = {
        "token": token,
        "tokens": tokens,
        "modulation": modulation.data_ptr(),
        "modulation_stride": modulation.shape[1] if modulation.shape[0] > 1 else 0,
        "qkv": weights.qkv.handle,
        "query_norm": norm.data_ptr(),
        "key_norm": weights.key_norm.data_ptr(),
        "norm_stride": norm.shape[1] if norm.dim() == 2 else 0,
    }
    for name in ("proj", "up", "down"):
        panels = getattr(weights, name)
        if panels is not None:
            stream[name] = panels.handle
    return stream


def _plain(values: Tensor) -> bool:
    return values.dtype == torch.float32 and values.is_contiguous()
