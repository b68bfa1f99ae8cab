"""The packed DiT on GPUs: the blocks of `runtime/networks/dit.py` through fused Triton operators.

`load_dit(packed, device="cuda")` returns a `GpuDiT`, called like any other. Its blocks are the same
modules with the same parameters; only the order of the arithmetic differs: adaLN, GELU and the
concatenation before the second linear write the int8 codes that the next GEMM reads, gate and
residual are in a GEMM's epilogue, q and k are normalised by one kernel. Compiled, not timed: it has
run on CPUs only, on which the operators are the reference.

`velocity` never synchronises with the host, so CUDA graphs can record it; `step_modulation` looks
up the times on the host, once per step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitapack.kernels.linear import attention, dispatch, gpu_ops, support
from vitapack.kernels.linear.epilogue import Epilogue
from vitapack.runtime.format.architecture import DiTConfig
from vitapack.runtime.networks.blocks import Condition, clipped, needs_gradients, repeated_key_bias
from vitapack.runtime.networks.dit import (
    DiT,
    DoubleBlock,
    SingleBlock,
    StreamAttention,
    given_bytes,
)
from vitapack.runtime.networks.linear import PackedLinear
from vitapack.runtime.networks.modulation import Modulated, StepModulation
from vitapack.runtime.networks.network import CallShape

ops = gpu_ops.ops


class GpuDiT(DiT):
    """A `DiT` whose blocks run fused on CUDA devices."""

    def evaluate(self, x: Tensor, step: StepModulation, condition: Condition) -> Tensor:
        gradients = needs_gradients(x, condition)
        if x.device.type != "cuda" or gradients or not support.gpu_kernels("DiT", x.device):
            return super().evaluate(x, step, condition)
        with torch.no_grad():
            return self.velocity(x, step, condition)

    def velocity(self, x: Tensor, step: StepModulation, cond: Tensor | Condition) -> Tensor:
        """x (B, L, C) and condition tokens (B, N, D) to (B, L, C), without host synchronisation."""
        condition = Condition.of(cond)
        img, txt = self.latent_in(x), self.cond_in(condition.tokens)
        txt = txt.expand(img.shape[0], -1, -1)
        bias = repeated_key_bias(condition, img)
        for block in self.double_blocks.values():
            assert isinstance(block, DoubleBlock)
            img, txt = double_block(block, img, txt, step, bias)
        z, split = torch.cat([txt, img], dim=1), txt.shape[1]
        del img, txt
        for block in self.single_blocks.values():
            assert isinstance(block, SingleBlock)
            z = single_block(block, z, step, bias)
        shift, scale = self.final_layer.shift_scale(step)
        latents, _ = ops.modulate(z[:, split:], shift, scale, False)
        return self.final_layer.linear(latents)

    @classmethod
    def step_bytes(cls, config: DiTConfig, call: CallShape) -> int:
        h, m, size, batch = config.hidden, config.mlp_hidden, call.dtype.itemsize, call.batch
        tokens, longer = call.latents[0] + call.cond_tokens, max(call.latents[0], call.cond_tokens)
        # Input of a linear, and the scratch that a packed weight is expanded to for many tokens:
        # int8 in a8 (on sm_90, from int4). A single block holds z, linear1's output and then either
        # its input and scratch, or q, k and attention twice, or attention and its concatenation. A
        # double block holds both streams and q, k and v twice, once with all of qkv, which v views;
        # later the joint attention and, for the longer stream, the MLP's input and output.
        code = 1 if call.compute == "a8" else size
        first = tokens * ((4 * h + m) * size + h * code)
        join = tokens * ((5 * h + m) * size + (h + m) * code)
        attention = tokens * (8 * h + m) * size
        mlp = tokens * 2 * h * size + longer * (h + m) * (size + code)
        peaks = [0]
        if config.single_blocks:
            peaks += [batch * max(join, attention), batch * first + h * (3 * h + m) * code]
        if config.double_blocks:
            peaks += [batch * tokens * 9 * h * size, batch * mlp + h * m * code]
        return given_bytes(config, call) + max(peaks)


# `GpuDiT.step_bytes` counts the peak working memory of a step. It relies on these functions: their
# temporary tensors are freed when they return.


def double_block(
    block: DoubleBlock, img: Tensor, txt: Tensor, step: StepModulation, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`DoubleBlock.forward`."""
    img1, img2 = block.img_mod(step)
    txt1, txt2 = block.txt_mod(step)
    joint = attend(
        *both(heads_of(block.txt_attn, txt, txt1), heads_of(block.img_attn, img, img1)),
        block.img_attn.qkv,
        bias,
    )
    txt_out, img_out = joint.split([txt.shape[1], img.shape[1]], dim=1)
    img = project(block.img_attn.proj, quantized(block.img_attn.proj, img_out), img, img1.gate)
    img = mlp(block.img_mlp, clipped(img, block.clips), img2)
    txt = project(block.txt_attn.proj, quantized(block.txt_attn.proj, txt_out), txt, txt1.gate)
    txt = mlp(block.txt_mlp, clipped(txt, block.clips), txt2)
    return clipped(img, block.clips), clipped(txt, block.clips)


def single_block(
    block: SingleBlock, z: Tensor, step: StepModulation, bias: Tensor | None = None
) -> Tensor:
    """`SingleBlock.forward`."""
    (mod,) = block.modulation(step)
    rows = attended(block, z, mod, bias)
    return clipped(project(block.linear2, rows, z, mod.gate), block.clips)


def attended(
    block: SingleBlock, z: Tensor, mod: Modulated, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Input of a single block's second linear: attention and GELU of the MLP, concatenated."""
    wants = wants_codes(block.linear1)
    fused = project(block.linear1, ops.modulate(z, mod.shift, mod.scale, wants), z)
    qkv, wide = fused.split(block.widths, dim=-1)
    norm = block.norm
    q, k = ops.qk_norm(qkv, norm.query_norm.scale, norm.key_norm.scale, block.heads)
    out = attend(q, k, values(qkv, block.heads), block.linear1, bias)
    del q, k
    return ops.join(out, wide, True, wants_codes(block.linear2))


def heads_of(
    attention: StreamAttention, x: Tensor, mod: Modulated
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one stream, (B, H, n, d) each."""
    rows = ops.modulate(x, mod.shift, mod.scale, wants_codes(attention.qkv))
    qkv = project(attention.qkv, rows, x)
    norm = attention.norm
    q, k = ops.qk_norm(qkv, norm.query_norm.scale, norm.key_norm.scale, attention.heads)
    return q, k, values(qkv, attention.heads)


def both(
    y_qkv: tuple[Tensor, Tensor, Tensor], x_qkv: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of both streams, condition first."""
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(y_qkv, x_qkv, strict=True))
    return q, k, v


def mlp(layers: nn.Sequential, x: Tensor, mod: Modulated) -> Tensor:
    """x + gate * MLP(adaLN(x)). GELU is fused with the next operation on the wide tensor."""
    first, second = layers[0], layers[2]
    rows = ops.modulate(x, mod.shift, mod.scale, wants_codes(first))
    if wants_codes(second):
        rows = ops.join(None, project(first, rows, x), True, True)
    else:
        rows = project(first, rows, x, gelu=True), None
    return project(second, rows, x, mod.gate)


def values(qkv: Tensor, heads: int) -> Tensor:
    """The values (B, H, n, d) as a view of qkv (B, n, 3 * H * d)."""
    return qkv.unflatten(-1, (3, heads, -1))[:, :, 2].transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, linear: nn.Module, bias: Tensor | None) -> Tensor:
    """Attention (B, H, n, d) to (B, n, H * d); may quantize if the block's linears use int8."""
    return attention.attention(q, k, v, wants_codes(linear), bias).transpose(1, 2).flatten(2)


def fused(linear: nn.Module) -> bool:
    """Whether Triton kernels support a linear's weight layout."""
    return isinstance(linear, PackedLinear) and "triton" in linear.layout.kernels


def wants_codes(linear: nn.Module) -> bool:
    """Whether a linear runs on int8 activations in Triton kernels."""
    return fused(linear) and linear.compute == "a8"


def quantized(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x in the form that its linear takes: int8 codes and scales, or (x, None)."""
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
    y, scales = rows
    if not fused(linear):
        out = linear(y)
        if gelu:
            out = F.gelu(out, approximate="tanh")
        return out if gate is None else ops.gate_residual(stream, gate, out)
    assert isinstance(linear, PackedLinear)
    dispatch.announce_gpu(linear.layout, linear.compute, stream)
    epilogue = Epilogue(
        linear.bias,
        0 if gelu else None,
        None if gate is None else stream.flatten(0, 1),
        None if gate is None else gate[:, 0],
        stream.shape[1],
    )
    scales = scales.flatten() if linear.compute == "a8" and scales is not None else None
    out = gpu_ops.gemm(y.flatten(0, 1), scales, linear.packed(), epilogue, stream.dtype)
    return out.unflatten(0, stream.shape[:2])
