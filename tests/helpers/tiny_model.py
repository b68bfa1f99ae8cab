"""A tiny original checkpoint in the released layout, with every kind of tensor a real one has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from vitapack.runtime.decode.shape_vae import ShapeDecoder
from vitapack.runtime.families.checkpoint import Checkpoint
from vitapack.runtime.families.hunyuan3d import decoder_config
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.format.architecture import DiTConfig
from vitapack.runtime.format.layermap import BlockEntry, LayerMap
from vitapack.runtime.networks.dit import DiT, hunyuan_time

# hidden 40: no multiple of 32 or 64, so that padding and cut groups are always in play.
MODEL = {
    "in_channels": 4, "context_in_dim": 6, "hidden_size": 40, "num_heads": 2, "depth": 2,
    "depth_single_blocks": 3, "mlp_ratio": 2.0, "qkv_bias": True, "guidance_embed": False,
}  # fmt: skip
VAE = {
    "num_latents": 8, "embed_dim": 4, "width": 16, "heads": 2, "num_decoder_layers": 1,
    "num_freqs": 2, "include_pi": False, "qkv_bias": False, "qk_norm": True, "scale_factor": 0.9,
}  # fmt: skip
CONDITIONER = {"target": "tiny.Encoder", "params": {"width": 6}}
TOTALS = {"double": 2, "single": 3}


# Of every kind of layer, some left out and each width once.
PRUNED = LayerMap(
    "hunyuan3d",
    TOTALS,
    (
        BlockEntry("double", 1, 4, 0.3),
        BlockEntry("single", 0, 8, 0.2),
        BlockEntry("single", 2, 16, 0.9),
    ),
    how="by hand",
    group=64,
)

# Every block, in every width.
MIXED = LayerMap(
    "hunyuan3d",
    TOTALS,
    (
        BlockEntry("double", 0, 4, 0.4),
        BlockEntry("double", 1, 16, 0.3),
        BlockEntry("single", 0, 8, 0.2),
        BlockEntry("single", 1, 4, 0.2),
        BlockEntry("single", 2, 16, 0.9),
    ),
    how="by hand",
    group=32,
)


def tiny_map(bits: int = 8, group: int = 32) -> LayerMap:
    return LayerMap.uniform("hunyuan3d", TOTALS, bits, group)


def tiny_dit(config: DiTConfig, seed: int = 0) -> DiT:
    """Every tensor random and an fp16 number, biases, norms and modulation included."""
    rng = torch.Generator().manual_seed(seed)
    dit = DiT(config).eval().requires_grad_(False)
    for parameter in dit.parameters():
        spread = 0.5 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=rng).mul_(spread).half())
    return dit


def tiny_config(**changes: Any) -> DiTConfig:
    fields = {
        "in_channels": 4, "cond_channels": 6, "hidden": 40, "heads": 2, "double_blocks": (0, 1),
        "single_blocks": (0, 1, 2), "mlp_ratio": 2.0, "qkv_bias": True, "guidance_embed": False,
    }  # fmt: skip
    fields |= changes
    return DiTConfig(**fields, time=hunyuan_time(fields["hidden"]))


def write_released(folder: Path, tensors: dict[str, Tensor], model: dict[str, Any] = MODEL) -> Path:
    """config.yaml and model.fp16.safetensors, keys with their prefixes."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = {
        "model": {"target": "x.Hunyuan3DDiT", "params": model},
        "vae": {"target": "x.ShapeVAE", "params": VAE},
        "conditioner": CONDITIONER,
        "scheduler": {"target": "x.FlowMatchEulerDiscreteScheduler", "params": {}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.fp16.safetensors",
    )
    return folder


def tiny_tensors(dit: DiT, seed: int = 0) -> dict[str, Tensor]:
    """DiT (fp16), shape decoder (fp32, rounded on embedding) and a conditioner with an integer."""
    rng = torch.Generator().manual_seed(seed + 1)
    decoder = ShapeDecoder(decoder_config(VAE, "tiny")).state_dict()
    tensors = {f"model.{name}": tensor.half() for name, tensor in dit.state_dict().items()}
    for name, tensor in decoder.items():
        tensors[f"vae.{name}"] = torch.randn(tensor.shape, generator=rng)
    tensors["conditioner.patch.weight"] = torch.randn(3, 5, generator=rng).half()
    tensors["conditioner.position_ids"] = torch.arange(4)
    return tensors


def tiny_checkpoint(folder: Path, **model: Any) -> tuple[Checkpoint, DiT]:
    """The checkpoint, opened from disk, and the float32 network that it holds."""
    dit = tiny_dit(tiny_config(**{k: v for k, v in model.items() if k == "guidance_embed"}))
    write_released(folder, tiny_tensors(dit), MODEL | model)
    return open_checkpoint(folder), dit
