"""The published networks once more, plain functions on the released tensors: the measure of ours.

    plain = Plain(weights, torch.bfloat16)
    velocity = hunyuan3d(plain, config, x, t, cond)

Written from their formulas with torch's own operations and nothing of the runtime's, so that an
error of ours in bf16 can be held against what any PyTorch model has there. Times stay float32,
which only helps them. Shapes as in `vitapack.runtime`; `config` is the reference constructor's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Plain:
    """Weights in one dtype, and the two layers that every network has."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.w, self.dtype = {name: t.to(dtype) for name, t in weights.items()}, dtype

    def lin(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def sinusoid(self, t: Tensor, channels: int, period: float, cos_first: bool) -> Tensor:
        half = channels // 2
        angles = t[:, None] * torch.exp(-math.log(period) * torch.arange(half) / half)
        parts = [angles.cos(), angles.sin()]
        return torch.cat(parts if cos_first else parts[::-1], -1).to(self.dtype)


def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def rms(x: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x) * scale


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# --- Hunyuan3D and Step1X-3D ---------------------------------------------------------------------

# Of a stream: modulation, qkv, output, q norm, k norm, MLP in and out.
HUNYUAN = {
    stream: (
        f"{stream}_mod.lin", [f"{stream}_attn.qkv"], f"{stream}_attn.proj",
        f"{stream}_attn.norm.query_norm.scale", f"{stream}_attn.norm.key_norm.scale",
        f"{stream}_mlp.0", f"{stream}_mlp.2",
    )
    for stream in ("txt", "img")
}  # fmt: skip
STEP1X = {
    "txt": (
        "norm1_context.linear", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "attn.to_add_out", "attn.norm_added_q.weight", "attn.norm_added_k.weight",
        "ff_context.net.0.proj", "ff_context.net.2",
    ),
    "img": (
        "norm1.linear", ["attn.to_q", "attn.to_k", "attn.to_v"], "attn.to_out.0",
        "attn.norm_q.weight", "attn.norm_k.weight", "ff.net.0.proj", "ff.net.2",
    ),
}  # fmt: skip


def double(n: Plain, at: str, names: dict, x: dict, s: Tensor, count: int) -> dict[str, Tensor]:
    mods, made = {}, []
    for stream, (mod, qkv, _, q_norm, k_norm, _, _) in names.items():
        mods[stream] = n.lin(s, at + mod)[:, None].chunk(6, -1)
        u = adaln(x[stream], *mods[stream][:2])
        q, k, v = torch.cat([n.lin(u, at + name) for name in qkv], -1).chunk(3, -1)
        q, k = rms(heads(q, count), n.w[at + q_norm]), rms(heads(k, count), n.w[at + k_norm])
        made.append((q, k, heads(v, count)))
    out = attend(*(torch.cat(parts, 2) for parts in zip(*made, strict=True)))
    length = x["txt"].shape[1]
    outs = {"txt": out[:, :length], "img": out[:, length:]}
    done = {}
    for stream, (_, _, proj, _, _, up, down) in names.items():
        _, _, gate1, shift2, scale2, gate2 = mods[stream]
        y = x[stream] + gate1 * n.lin(outs[stream], at + proj)
        inner = F.gelu(n.lin(adaln(y, shift2, scale2), at + up), approximate="tanh")
        done[stream] = y + gate2 * n.lin(inner, at + down)
    return done


def single(n: Plain, z: Tensor, qkvm: Tensor, norms: tuple, gate: Tensor, out: str, count: int):
    h = z.shape[-1]
    q, k, v = (heads(part, count) for part in qkvm[..., : 3 * h].chunk(3, -1))
    tokens = attend(rms(q, n.w[norms[0]]), rms(k, n.w[norms[1]]), v)
    inner = F.gelu(qkvm[..., 3 * h :], approximate="tanh")
    return z + gate * n.lin(torch.cat([tokens, inner], -1), out)


def hunyuan3d(
    n: Plain, config: dict[str, Any], x: Tensor, t: Tensor, cond: Tensor, guidance=None
) -> Tensor:
    count = config["num_heads"]

    def embedded(value: Tensor, name: str) -> Tensor:
        inner = n.lin(n.sinusoid(1000 * value, 256, 1000.0, True), f"{name}.in_layer")
        return n.lin(F.silu(inner), f"{name}.out_layer")

    vector = embedded(t, "time_in")
    if guidance is not None:
        vector = vector + embedded(guidance, "guidance_in")
    s = F.silu(vector)
    streams = {"txt": n.lin(cond, "cond_in"), "img": n.lin(x, "latent_in")}
    for index in range(config["depth"]):
        streams = double(n, f"double_blocks.{index}.", HUNYUAN, streams, s, count)
    z = torch.cat([streams["txt"], streams["img"]], 1)
    for index in range(config["depth_single_blocks"]):
        at = f"single_blocks.{index}."
        shift, scale, gate = n.lin(s, f"{at}modulation.lin")[:, None].chunk(3, -1)
        norms = f"{at}norm.query_norm.scale", f"{at}norm.key_norm.scale"
        qkvm = n.lin(adaln(z, shift, scale), f"{at}linear1")
        z = single(n, z, qkvm, norms, gate, f"{at}linear2", count)
    shift, scale = n.lin(s, "final_layer.adaLN_modulation.1")[:, None].chunk(2, -1)
    return n.lin(adaln(z[:, cond.shape[1] :], shift, scale), "final_layer.linear")


def step1x3d(n: Plain, config: dict[str, Any], x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    count, root = config["num_heads"], "dit_model."
    inner = n.lin(n.sinusoid(t, config["width"], 1e4, False), f"{root}time_proj.linear_1")
    s = F.silu(n.lin(F.gelu(inner), f"{root}time_proj.linear_2"))
    streams = {
        "txt": n.lin(cond, f"{root}proj_cross_attention"), "img": n.lin(x, f"{root}proj_in")
    }  # fmt: skip
    for index in range(config["layers"]):
        streams = double(n, f"{root}transformer_blocks.{index}.", STEP1X, streams, s, count)
    z = torch.cat([streams["txt"], streams["img"]], 1)
    for index in range(config["num_single_layers"]):
        at = f"{root}single_transformer_blocks.{index}."
        shift, scale, gate = n.lin(s, f"{at}norm.linear")[:, None].chunk(3, -1)
        u = adaln(z, shift, scale)
        names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        qkvm = torch.cat([n.lin(u, at + name) for name in names], -1)
        norms = f"{at}attn.norm_q.weight", f"{at}attn.norm_k.weight"
        z = single(n, z, qkvm, norms, gate, f"{at}proj_out", count)
    scale, shift = n.lin(s, f"{root}norm_out.linear")[:, None].chunk(2, -1)
    return n.lin(adaln(z[:, cond.shape[1] :], shift, scale), f"{root}proj_out")


# --- TRELLIS -------------------------------------------------------------------------------------


def trellis_flow(n: Plain, config: dict[str, Any], x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """Patches of one cell a side, as the sparse-structure flow has them."""
    count = config["num_heads"]
    inner = F.silu(n.lin(n.sinusoid(t, 256, 1e4, True), "t_embedder.mlp.0"))
    s = F.silu(n.lin(inner, "t_embedder.mlp.2"))
    z = n.lin(x.flatten(2).transpose(1, 2), "input_layer") + n.w["pos_emb"]

    def unit(v: Tensor, gamma: Tensor) -> Tensor:
        wide = F.normalize(v.float(), dim=-1) * gamma.float()[:, None] * v.shape[-1] ** 0.5
        return wide.to(n.dtype)

    for index in range(config["num_blocks"]):
        at = f"blocks.{index}."
        mod = n.lin(s, f"{at}adaLN_modulation.1")[:, None].chunk(6, -1)
        qkv = n.lin(adaln(z, mod[0], mod[1]), f"{at}self_attn.to_qkv").chunk(3, -1)
        q, k, v = (heads(part, count) for part in qkv)
        q = unit(q, n.w[f"{at}self_attn.q_rms_norm.gamma"])
        k = unit(k, n.w[f"{at}self_attn.k_rms_norm.gamma"])
        z = z + mod[2] * n.lin(attend(q, k, v), f"{at}self_attn.to_out")
        q = heads(n.lin(n.norm(z, f"{at}norm2", 1e-6), f"{at}cross_attn.to_q"), count)
        k, v = (heads(part, count) for part in n.lin(cond, f"{at}cross_attn.to_kv").chunk(2, -1))
        z = z + n.lin(attend(q, k, v), f"{at}cross_attn.to_out")
        inner = n.lin(adaln(z, mod[3], mod[4]), f"{at}mlp.mlp.0")
        z = z + mod[5] * n.lin(F.gelu(inner, approximate="tanh"), f"{at}mlp.mlp.2")
    out = n.lin(F.layer_norm(z, z.shape[-1:], eps=1e-5), "out_layer")
    return out.transpose(1, 2).reshape(x.shape)


def trellis_decoder(n: Plain, config: dict[str, Any], z: Tensor) -> Tensor:
    def conv(x: Tensor, name: str) -> Tensor:
        return F.conv3d(x, n.w[f"{name}.weight"], n.w[f"{name}.bias"], padding=1)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.silu(n.norm(x.movedim(1, -1), name, 1e-5).movedim(-1, 1))

    def res(x: Tensor, at: str) -> Tensor:
        inner = conv(norm(x, f"{at}.norm1"), f"{at}.conv1")
        return x + conv(norm(inner, f"{at}.norm2"), f"{at}.conv2")

    x = conv(z, "input_layer")
    for index in range(config["num_res_blocks_middle"]):
        x = res(x, f"middle_block.{index}")
    place = 0
    for level in range(len(config["channels"])):
        if level:
            x = conv(x, f"blocks.{place}.conv").unflatten(1, (-1, 2, 2, 2))
            x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
            place += 1
        for _ in range(config["num_res_blocks"]):
            x = res(x, f"blocks.{place}")
            place += 1
    return conv(norm(x, "out_layer.0"), "out_layer.2")


# --- Shape decoders and the image encoder --------------------------------------------------------


def shape_decoder(n: Plain, config: dict[str, Any], latents: Tensor, queries: Tensor) -> Tensor:
    """Hunyuan3D's ShapeVAE, its turbo form, and Step1X-3D's with other epsilons and names."""
    step1x = "z_scale_factor" in config
    geo, eps = ("decoder", 1e-5) if step1x else ("geo_decoder", 1e-6)
    count, qk_norm = config["heads"], config["qk_norm"]
    post = config["use_ln_post"] if step1x else config.get("geo_decoder_ln_post", True)

    def packed(x: Tensor, heads_: int, parts: int) -> list[Tensor]:
        return [
            part.transpose(1, 2) for part in x.unflatten(-1, (heads_, -1)).chunk(parts, -1)
        ]  # inside each head

    def qk(x: Tensor, at: str, which: str, on: bool) -> Tensor:
        return n.norm(x, f"{at}.attention.{which}_norm", 1e-6) if on else x

    def mlp(x: Tensor, at: str) -> Tensor:
        return n.lin(F.gelu(n.lin(x, f"{at}.c_fc")), f"{at}.c_proj")

    scale = config["z_scale_factor" if step1x else "scale_factor"]
    x = n.lin(latents / scale, "post_kl")
    for index in range(config["num_decoder_layers"]):
        at = f"transformer.resblocks.{index}"
        q, k, v = packed(n.lin(n.norm(x, f"{at}.ln_1", eps), f"{at}.attn.c_qkv"), count, 3)
        q, k = (qk(part, f"{at}.attn", which, qk_norm) for part, which in ((q, "q"), (k, "k")))
        x = x + n.lin(attend(q, k, v), f"{at}.attn.c_proj")
        x = x + mlp(n.norm(x, f"{at}.ln_2", eps), f"{at}.mlp")
    down = config.get("geo_decoder_downsample_ratio", 1)
    if down != 1:
        x, count = n.lin(x, f"{geo}.latents_proj"), count // down
    at = f"{geo}.cross_attn_decoder"
    angles = (queries.float()[..., None] * 2.0 ** torch.arange(config["num_freqs"])).flatten(-2)
    points = torch.cat([queries.float(), angles.sin(), angles.cos()], -1).to(n.dtype)
    y = n.lin(points, f"{geo}.query_proj")
    (q,) = packed(n.lin(n.norm(y, f"{at}.ln_1", eps), f"{at}.attn.c_q"), count, 1)
    k, v = packed(n.lin(n.norm(x, f"{at}.ln_2", eps), f"{at}.attn.c_kv"), count, 2)
    on = qk_norm and post
    q, k = (qk(part, f"{at}.attn", which, on) for part, which in ((q, "q"), (k, "k")))
    y = y + n.lin(attend(q, k, v), f"{at}.attn.c_proj")
    y = y + mlp(n.norm(y, f"{at}.ln_3", eps), f"{at}.mlp")
    return n.lin(n.norm(y, f"{geo}.ln_post", 1e-5) if post else y, f"{geo}.output_proj")


def dinov2(n: Plain, config: dict[str, Any], images: Tensor) -> Tensor:
    """At the size that the position table was learned at."""
    patches = "embeddings.patch_embeddings.projection"
    x = F.conv2d(images, n.w[f"{patches}.weight"], n.w[f"{patches}.bias"], config["patch_size"])
    batch = x.shape[0]
    x = torch.cat([n.w["embeddings.cls_token"].expand(batch, -1, -1),
                   x.flatten(2).transpose(1, 2)], 1)  # fmt: skip
    x = x + n.w["embeddings.position_embeddings"]
    if (registers := n.w.get("embeddings.register_tokens")) is not None:
        x = torch.cat([x[:, :1], registers.expand(batch, -1, -1), x[:, 1:]], 1)
    for index in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{index}."
        u, attention = n.norm(x, f"{at}norm1", 1e-6), f"{at}attention.attention."
        qkv = [n.lin(u, attention + which) for which in ("query", "key", "value")]
        out = attend(*(heads(part, config["num_attention_heads"]) for part in qkv))
        scales = n.w[f"{at}layer_scale1.lambda1"], n.w[f"{at}layer_scale2.lambda1"]
        x = x + scales[0] * n.lin(out, f"{at}attention.output.dense")
        u = n.norm(x, f"{at}norm2", 1e-6)
        if f"{at}mlp.fc1.weight" in n.w:
            out = n.lin(F.gelu(n.lin(u, f"{at}mlp.fc1")), f"{at}mlp.fc2")
        else:
            gate, value = n.lin(u, f"{at}mlp.weights_in").chunk(2, -1)
            out = n.lin(F.silu(gate) * value, f"{at}mlp.weights_out")
        x = x + scales[1] * out
    return n.norm(x, "layernorm", 1e-6)
