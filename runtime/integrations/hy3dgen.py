"""Puts a packed network into a pipeline object of hy3dgen (tencent/Hunyuan3D-2).

    pipeline = Hunyuan3DDiTFlowMatchingPipeline.from_pretrained("tencent/Hunyuan3D-2mini")
    attach(pipeline, "mini.safetensors")
    mesh = pipeline(image="chair.png", num_inference_steps=20)[0]

hy3dgen itself is not needed here, and could not be installed where this was written: tests use a
stand-in with its call `model(x, t, {"main": cond}, guidance=...)` and its way of preparing t.
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
        place = self.dit.latent_in.weight
        wide, t, tokens = x.to(place), t[:1], cond.to(place)
        if self.guidance_embed:
            assert guidance is not None
            return self.dit(wide, t, tokens, guidance[:1]).to(x.dtype)
        half = len(x) // 2  # [with the picture, without]: there all tokens are alike
        if len(tokens) == len(x) == 2 * half and _alike(tokens[half:]):
            with_image = self.dit(wide[:half], t, tokens[:half])
            without = self.dit(
                wide[half:], t, Condition(tokens[half:, :1], repeats=tokens.shape[1])
            )
            return torch.cat([with_image, without]).to(x.dtype)
        return self.dit(wide, t, tokens).to(x.dtype)


def _alike(tokens: Tensor) -> bool:
    """Whether the tokens (B, N, D) of each entry are all the same."""
    return bool((tokens == tokens[:, :1]).all())


def _on_nodes(t: Tensor, nodes: Tensor) -> Tensor:
    """Times that a half-precision pipeline has rounded, back on the schedule that they came from.

    Only by the rounding of t's dtype: other times stay, and the tables refuse them.
    """
    wide = t.double()
    every = torch.cat([nodes, nodes.new_ones(1)])
    nearest = every[(wide[:, None] - every).abs().argmin(dim=1)]
    slack = max(torch.finfo(t.dtype).eps, 1e-6)
    return torch.where((wide - nearest).abs() <= slack, nearest, wide)


def attach(
    pipeline: Any,
    packed: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    compute: str = "a16",
) -> Any:
    """Replaces `pipeline.model` by the packed network and returns the pipeline.

    device and dtype: the pipeline's own by default. The original is let go first, so the two are
    never in memory together. UserError for a packed file of another kind of model.
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
    place = getattr(pipeline, "device", "cpu") if device is None else device
    kept = getattr(pipeline, "dtype", torch.float16) if dtype is None else dtype
    pipeline.model = model = latent = None
    dit = load_packed_dit(packed, device=place, dtype=kept, compute=compute)
    assert isinstance(dit, DiT)
    pipeline.model = Attached(dit, kept)
    return pipeline
