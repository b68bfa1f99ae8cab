"""Replaces the network of a hy3dgen pipeline by a packed one (tencent/Hunyuan3D-2).

    pipeline = Hunyuan3DDiTFlowMatchingPipeline.from_pretrained("tencent/Hunyuan3D-2mini")
    attach(pipeline, "mini.safetensors")
    mesh = pipeline(image="chair.png", num_inference_steps=20)[0]

Does not import hy3dgen. Not run against the real package, which could not be installed for
development: tests use a stand-in with its call `model(x, t, {"main": cond}, guidance=...)` and its
way of preparing t.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from vitapack.runtime.errors import UserError
from vitapack.runtime.format.header import read_header
from vitapack.runtime.loading.packed import load_packed_dit
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.dit import DiT
from vitapack.runtime.networks.modulation import TimeNodes


class Attached(nn.Module):
    """A packed DiT with the call signature and attributes that hy3dgen's pipeline uses."""

    def __init__(self, dit: DiT, dtype: torch.dtype) -> None:
        super().__init__()
        self.dit, self._dtype = dit, dtype
        self.guidance_embed = dit.config.embeds_guidance
        self.in_channels = dit.config.in_channels

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self.dit.latent_in.weight.device

    def forward(
        self, x: Tensor, t: Tensor, contexts: Any, guidance: Tensor | None = None, **_: Any
    ) -> Tensor:
        """x (B, L, C), t (B,) in 0..1, contexts {"main": (B, N, D)}; velocity in x's dtype."""
        cond = contexts["main"] if isinstance(contexts, dict) else contexts
        times = self.dit.time_in
        if isinstance(times, TimeNodes):
            t = _on_nodes(t, times.nodes)
            if bool((t == 1).all()) and float(times.nodes[-1]) < 1:
                # hy3dgen evaluates once more at the end and multiplies it by 1 - 1.
                return torch.zeros_like(x)
        weight = self.dit.latent_in.weight
        latents, t, tokens = x.to(weight), t[:1], cond.to(weight)
        if self.guidance_embed:
            assert guidance is not None
            return self.dit(latents, t, tokens, guidance[:1]).to(x.dtype)
        half = len(x) // 2  # first half conditional, second unconditional: its tokens are all equal
        if len(tokens) == len(x) == 2 * half and _all_equal(tokens[half:]):
            conditional = self.dit(latents[:half], t, tokens[:half])
            unconditional = self.dit(
                latents[half:], t, Condition(tokens[half:, :1], repeats=tokens.shape[1])
            )
            return torch.cat([conditional, unconditional]).to(x.dtype)
        return self.dit(latents, t, tokens).to(x.dtype)


def _all_equal(tokens: Tensor) -> bool:
    """Whether, in each batch entry, all tokens of (B, N, D) are equal."""
    return bool((tokens == tokens[:, :1]).all())


def _on_nodes(t: Tensor, nodes: Tensor) -> Tensor:
    """Restores schedule times, float64, that a half-precision pipeline has rounded.

    Moves a time by no more than the rounding of t's dtype; others stay, and the tables reject them.
    """
    exact = t.double()
    times = torch.cat([nodes, nodes.new_ones(1)])
    nearest = times[(exact[:, None] - times).abs().argmin(dim=1)]
    slack = max(torch.finfo(t.dtype).eps, 1e-6)
    return torch.where((exact - nearest).abs() <= slack, nearest, exact)


def attach(
    pipeline: Any,
    packed: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    compute: str = "a16",
) -> Any:
    """Replaces `pipeline.model` by the packed network and returns the pipeline.

    device and dtype: the pipeline's own by default. The original is freed first, so the two are
    never in memory together. Raises UserError for a packed file of another kind of model.
    """
    model = getattr(pipeline, "model", None)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{type(pipeline).__name__} has no network called model; expected a pipeline of hy3dgen"
        )
    header = read_header(packed)
    embedded = bool(getattr(model, "guidance_embed", False))
    if header.family != "hunyuan3d" or header.network.embeds_guidance != embedded:
        kind = "with" if embedded else "without"
        raise UserError(
            f"{packed} is {header.variant} ({header.family}); this pipeline runs a Hunyuan3D model "
            f"{kind} embedded guidance"
        )
    latent = next((p for name, p in model.named_parameters() if name == "latent_in.weight"), None)
    if latent is not None and latent.shape[1] != header.network.in_channels:
        raise UserError(
            f"{packed} takes latents of {header.network.in_channels} channels, the pipeline's "
            f"model {latent.shape[1]}"
        )
    device = getattr(pipeline, "device", "cpu") if device is None else device
    dtype = getattr(pipeline, "dtype", torch.float16) if dtype is None else dtype
    pipeline.model = model = latent = None
    dit = load_packed_dit(packed, device=device, dtype=dtype, compute=compute)
    assert isinstance(dit, DiT)
    pipeline.model = Attached(dit, dtype)
    return pipeline
