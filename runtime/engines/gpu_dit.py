"""The packed DiT on GPUs: the blocks of `runtime/networks/dit.py` through fused Triton operators.

`load_dit(packed, device="cuda")` returns a `GpuDiT`, called like any other. Its blocks are the same
modules with the same parameters; only the order of the arithmetic differs: adaLN, GELU and the join
before the second linear emit the int8 codes that the next GEMM reads, gate and residual are part of
a GEMM's epilogue, q and k are normalised in one pass. Compiled, not timed: it has run on CPUs only,
where the operators are the reference.

A step is `velocity(x, when, cond)`: no host synchronisation, so that CUDA graphs can take it;
`when(t)` looks the times up on the host, once a step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitapack.kernels.linear import attention, dispatch, gpu_ops, support
from vitapack.runtime.networks.blocks import clipped, multiplicity
from vitapack.runtime.networks.dit import DiT, DoubleBlock, SingleBlock, StreamAttention
from vitapack.runtime.networks.linear import PackedLinear
from vitapack.runtime.networks.modulation import When

ops = gpu_ops.ops


class GpuDiT(DiT):
    """A `DiT` whose blocks run fused on CUDA devices."""

    def forward(
        self,
        x: Tensor,
        t: Tensor | When,
        cond: Tensor,
        guidance: Tensor | None = None,
        repeats: int = 1,
    ) -> Tensor:
        differentiable = torch.is_grad_enabled() and (x.requires_grad or cond.requires_grad)
        if x.device.type != "cuda" or differentiable or not support.gpu_kernels("DiT", x.device):
            return super().forward(x, t, cond, guidance, repeats)
        with torch.no_grad():
            return self.velocity(x, self.when(t, guidance), cond, repeats)

    def velocity(self, x: Tensor, when: When, cond: Tensor, repeats: int = 1) -> Tensor:
        """x (B, L, C) and cond (B, N, D) at a step's modulation input to (B, L, C)."""
        x, y = self.latent_in(x), self.cond_in(cond)
        y = y.expand(x.shape[0], -1, -1)
        bias = multiplicity(repeats, y.shape[1], x.shape[1], x)
        for block in self.double_blocks.values():
            assert isinstance(block, DoubleBlock)
            x, y = double_block(block, x, y, when, bias)
        z, split = torch.cat([y, x], dim=1), y.shape[1]
        del x, y
        for block in self.single_blocks.values():
            assert isinstance(block, SingleBlock)
            z = single_block(block, z, when, bias)
        shift, scale = self.final_layer.shift_scale(when)
        latents, _ = ops.modulate(z[:, split:], shift, scale, False)
        return self.final_layer.linear(latents)


# What a step holds at most is counted in `activations.step_bytes`: parts are functions of
# their own so that what they made is gone when they return.


def double_block(
    block: DoubleBlock, x: Tensor, y: Tensor, when: When, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`DoubleBlock.forward`."""
    x_shift1, x_scale1, x_gate1, x_shift2, x_scale2, x_gate2 = block.img_mod(when)
    y_shift1, y_scale1, y_gate1, y_shift2, y_scale2, y_gate2 = block.txt_mod(when)
    joint = attend(
        *both(
            heads_of(block.txt_attn, y, y_shift1, y_scale1),
            heads_of(block.img_attn, x, x_shift1, x_scale1),
        ),
        block.img_attn.qkv,
        bias,
    )
    y_out, x_out = joint.split([y.shape[1], x.shape[1]], dim=1)
    x = project(block.img_attn.proj, quantized(block.img_attn.proj, x_out), x, x_gate1)
    x = mlp(block.img_mlp, clipped(x, block.clips), x_shift2, x_scale2, x_gate2)
    y = project(block.txt_attn.proj, quantized(block.txt_attn.proj, y_out), y, y_gate1)
    y = mlp(block.txt_mlp, clipped(y, block.clips), y_shift2, y_scale2, y_gate2)
    return clipped(x, block.clips), clipped(y, block.clips)


def single_block(block: SingleBlock, z: Tensor, when: When, bias: Tensor | None = None) -> Tensor:
    """`SingleBlock.forward`."""
    shift, scale, gate = block.modulation(when)
    rows = attended(block, z, shift, scale, bias)
    return clipped(project(block.linear2, rows, z, gate), block.clips)


def attended(
    block: SingleBlock, z: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What a single block's second linear reads: attention and the wide part, joined."""
    wants = wants_codes(block.linear1)
    fused = project(block.linear1, ops.modulate(z, shift, scale, wants), z)
    qkv, wide = fused.split(block.widths, dim=-1)
    norm = block.norm
    q, k = ops.qk_norm(qkv, norm.query_norm.scale, norm.key_norm.scale, block.heads)
    out = attend(q, k, values(qkv, block.heads), block.linear1, bias)
    del q, k
    return ops.join(out, wide, True, wants_codes(block.linear2))


def heads_of(
    attention: StreamAttention, x: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one stream, (B, H, n, d) each."""
    qkv = project(attention.qkv, ops.modulate(x, shift, scale, wants_codes(attention.qkv)), x)
    norm = attention.norm
    q, k = ops.qk_norm(qkv, norm.query_norm.scale, norm.key_norm.scale, attention.heads)
    return q, k, values(qkv, attention.heads)


def both(
    y_qkv: tuple[Tensor, Tensor, Tensor], x_qkv: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of both streams, condition first."""
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(y_qkv, x_qkv, strict=True))
    return q, k, v


def mlp(layers: nn.Sequential, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """x + gate * MLP(adaLN(x)). GELU is part of whatever touches the wide tensor next."""
    first, second = layers[0], layers[2]
    rows = ops.modulate(x, shift, scale, wants_codes(first))
    if wants_codes(second):
        rows = ops.join(None, project(first, rows, x), True, True)
    else:
        rows = project(first, rows, x, gelu=True), None
    return project(second, rows, x, gate)


def values(qkv: Tensor, heads: int) -> Tensor:
    """The values (B, H, n, d) inside (B, n, 3 * H * d), as a view."""
    return qkv.unflatten(-1, (3, heads, -1))[:, :, 2].transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, linear: nn.Module, bias: Tensor | None) -> Tensor:
    """Attention (B, H, n, d) to (B, n, H * d), as exact as the block's linears."""
    return attention.attention(q, k, v, wants_codes(linear), bias).transpose(1, 2).flatten(2)


def wants_codes(linear: nn.Module) -> bool:
    """Whether a linear multiplies int8 activations."""
    return isinstance(linear, PackedLinear) and linear.compute == "a8"


def quantized(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x as its linear wants it: int8 codes with their scales, or itself."""
    return ops.join(None, x, False, True) if wants_codes(linear) else (x, None)


def project(
    linear: nn.Module,
    rows: tuple[Tensor, Tensor | None],
    stream: Tensor,
    gate: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """A linear on (B, n, K) values, or codes with scales, to (B, n, N) in the stream's dtype.

    With a gate (B or 1, 1, N): stream + gate * y.
    """
    y, steps = rows
    if not isinstance(linear, PackedLinear):
        out = linear(y)
        if gelu:
            out = F.gelu(out, approximate="tanh")
        return out if gate is None else ops.gate_residual(stream, gate, out)
    dispatch.announce_gpu(linear.bits, linear.compute, stream)
    linear.restore()  # the file's tensors, if the CPU engine had put them into its own order
    codes = linear.q8 if linear.q8 is not None else linear.q4
    out = ops.gemm(
        y.flatten(0, 1),
        steps.flatten() if linear.compute == "a8" and steps is not None else None,
        codes,
        linear.group,
        linear.group_size,
        linear.scale,
        linear.bias,
        0 if gelu else -1,
        None if gate is None else stream.flatten(0, 1),
        None if gate is None else gate[:, 0],
        stream.shape[1],
        stream.dtype,
    )
    return out.unflatten(0, stream.shape[:2])
