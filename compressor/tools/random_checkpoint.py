"""Writes full-size checkpoints with random weights, in released layouts.

    write("hunyuan3d-2mini", Path("mini"))           # 3.8 GB: DiT, shape decoder, image encoder
    write("step1x-3d", Path("step1x"), parts=("dit",))

For tests and benchmarks. Names, shapes, dtypes and configuration files are those of the release.
Each tensor is drawn from its own generator, so networks do not depend on one another, and written
at once: memory holds one tensor. `sizes` makes a small model of the same layout.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from vitapack.runtime.choices import NETWORKS, check_choice
from vitapack.runtime.condition.dinov2 import MASK, Dinov2Config, released_shapes
from vitapack.runtime.decode.occupancy import OccupancyDecoder
from vitapack.runtime.decode.shape_vae import ShapeDecoder
from vitapack.runtime.errors import UserError
from vitapack.runtime.families import hunyuan3d, step1x3d, trellis
from vitapack.runtime.families.checkpoint import network_shapes, shapes_of
from vitapack.runtime.files import atomic_path
from vitapack.runtime.format.container import lay_out, write_container
from vitapack.runtime.progress import Control

Specs = dict[str, tuple[str, tuple[int, ...]]]  # tensor -> safetensors dtype, shape


@dataclass(frozen=True)
class Sizes:
    """The sizes that differ between a released model and a tiny one; 0 or empty: as released."""

    hidden: int = 0  # of the transformer
    heads: int = 0
    depth: tuple[int, ...] = ()  # blocks by kind
    latents: int = 0
    decoder_width: int = 0
    decoder_heads: int = 0
    decoder_layers: int = 0
    encoder: Dinov2Config | None = None
    pixels: int = 0  # side of the image encoder's input
    channels: tuple[int, ...] = ()  # of TRELLIS' occupancy decoder

    def over(self, **released: Any) -> Sizes:
        """These sizes, with `released` for those that are not set."""
        own = {name: value for name, value in vars(self).items() if value}
        return replace(Sizes(**released), **own)


@dataclass(frozen=True)
class Files:
    """The files of one checkpoint, known before a weight is drawn."""

    texts: dict[str, str] = field(default_factory=dict)  # relative path -> content
    tensors: dict[str, Specs] = field(default_factory=dict)  # relative path -> tensors

    @property
    def nbytes(self) -> int:
        return sum(
            math.prod(shape) * {"F16": 2, "F32": 4}[dtype]
            for specs in self.tensors.values()
            for dtype, shape in specs.values()
        )


GIANT = Dinov2Config(1536, 40, 24, 14, 37, 0, 4, swiglu=True)
LARGE = Dinov2Config(1024, 24, 16, 14, 37, 4, 4, swiglu=False)


def _hunyuan(
    sizes: Sizes, parts: Sequence[str], *, guidance: bool = False, turbo: bool = False,
    views: bool = False, mini: bool = False, pixels: int = 518,
) -> Files:  # fmt: skip
    released: dict[str, Any] = {"hidden": 1024, "heads": 16, "encoder": GIANT, "pixels": pixels}
    released |= {"decoder_width": 1024, "decoder_heads": 16, "decoder_layers": 16}
    released |= {"depth": (8, 16), "latents": 512} if mini else {"depth": (16, 32), "latents": 3072}
    s = sizes.over(**released)
    encoder = s.encoder
    assert encoder is not None
    model = {
        "in_channels": 64, "context_in_dim": encoder.hidden, "hidden_size": s.hidden,
        "mlp_ratio": 4.0, "num_heads": s.heads, "depth": s.depth[0],
        "depth_single_blocks": s.depth[1], "axes_dim": [64], "theta": 10_000, "qkv_bias": True,
        "guidance_embed": guidance,
    }  # fmt: skip
    vae = {
        "num_latents": s.latents, "embed_dim": 64, "num_freqs": 8, "include_pi": False,
        "heads": s.decoder_heads, "width": s.decoder_width, "num_decoder_layers": s.decoder_layers,
        "qkv_bias": False, "qk_norm": True,
        "scale_factor": 1.0188137142395404 if mini else 0.9990943042622529,
    }  # fmt: skip
    if turbo:
        vae |= {
            "geo_decoder_downsample_ratio": 2, "geo_decoder_mlp_expand_ratio": 1,
            "geo_decoder_ln_post": False,
        }  # fmt: skip
    dino = {"model_type": "dinov2", **encoder.settings()}
    kind = "ConsistencyFlowMatchEuler" if turbo else "FlowMatchEuler"
    scheduler: dict[str, Any] = {"num_train_timesteps": 1000}
    config = {
        "model": {"target": "hy3dgen.shapegen.models.Hunyuan3DDiT", "params": model},
        "vae": {"target": "hy3dgen.shapegen.models.ShapeVAE", "params": vae},
        "conditioner": {
            "target": "hy3dgen.shapegen.models.SingleImageEncoder",
            "params": {
                "main_image_encoder": {
                    "type": "DinoImageEncoderMV" if views else "DinoImageEncoder",
                    "kwargs": {"config": dino, "image_size": s.pixels},
                }
            },
        },
        "scheduler": {
            "target": f"hy3dgen.shapegen.schedulers.{kind}DiscreteScheduler",
            "params": scheduler | ({"pcm_timesteps": 100} if turbo else {}),
        },
        "image_processor": {
            "target": "hy3dgen.shapegen.preprocessors.ImageProcessorV2",
            "params": {"size": s.pixels if mini else 512, "border_ratio": 0.15},
        },
        "pipeline": {"target": "hy3dgen.shapegen.pipelines.Hunyuan3DDiTFlowMatchingPipeline"},
    }
    decoder = hunyuan3d.decoder_config(vae, "random")
    tensors = _parts(
        parts,
        dit=_prefixed("model.", network_shapes(hunyuan3d.dit_config(model, "random"))),
        decoder=_prefixed("vae.", shapes_of(lambda: ShapeDecoder(decoder))),
        conditioner=_prefixed("conditioner.main_image_encoder.model.", _dinov2(encoder)),
    )
    specs = {name: ("F16", shape) for name, shape in tensors.items()}
    return Files({"config.yaml": yaml.safe_dump(config)}, {"model.fp16.safetensors": specs})


def _step1x(sizes: Sizes, parts: Sequence[str], *, label: bool = False) -> Files:
    s = sizes.over(
        hidden=1280, heads=20, depth=(12, 24), latents=2048, decoder_width=768, decoder_heads=12,
        decoder_layers=16, encoder=LARGE,
    )  # fmt: skip
    encoder = s.encoder
    assert encoder is not None
    transformer = {
        "_class_name": "FluxDenoiser", "input_channels": 64, "width": s.hidden,
        "layers": s.depth[0], "num_single_layers": s.depth[1], "num_heads": s.heads,
        "condition_dim": encoder.hidden, "use_visual_condition": True,
        "visual_condition_dim": encoder.hidden, "use_label_condition": label,
    }  # fmt: skip
    vae = {
        "_class_name": "MichelangeloAutoencoder", "num_latents": s.latents, "embed_dim": 64,
        "num_freqs": 8, "include_pi": False, "heads": s.decoder_heads, "width": s.decoder_width,
        "num_decoder_layers": s.decoder_layers, "qkv_bias": False, "qk_norm": False,
        "use_ln_post": True, "z_scale_factor": 1.0,
    }  # fmt: skip
    config = step1x3d.dit_config(transformer, "random", [])
    decoder = step1x3d.decoder_config(vae, "random")
    places: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
        "transformer": (
            "dit",
            transformer,
            _prefixed("dit_model.", step1x3d.released_shapes(config)),
        ),
        "vae": ("decoder", vae, shapes_of(lambda: ShapeDecoder(decoder))),
        "visual_encoder": (
            "conditioner",
            {"_class_name": "Dinov2Encoder", "image_size": 518, "zero_uncond_embeds": True},
            _prefixed("dino_model.", _dinov2(encoder)),
        ),
    }
    if label:
        places["label_encoder"] = (
            "conditioner",
            {"_class_name": "LabelEncoder", "hidden_size": encoder.hidden},
            {
                table: (rows, encoder.hidden)
                for table, rows in zip(step1x3d.LABEL_TABLES, (3, 2, 3), strict=True)
            },
        )
    texts: dict[str, dict[str, Any]] = {
        "model_index.json": {"_class_name": "Step1X3DGeometryPipeline"}
    }
    texts["scheduler/scheduler_config.json"] = {"num_train_timesteps": 1000, "shift": 1.0}
    tensors: dict[str, Specs] = {}
    for place, (part, settings, shapes) in places.items():
        if part in parts:
            texts[f"{place}/config.json"] = settings
            tensors[f"{place}/diffusion_pytorch_model.safetensors"] = {
                name: ("F32", shape) for name, shape in shapes.items()
            }
    return Files({name: json.dumps(text, indent=1) for name, text in texts.items()}, tensors)


def _trellis(sizes: Sizes, parts: Sequence[str], *, slat: bool = False) -> Files:
    s = sizes.over(hidden=1024, heads=16, depth=(24,), channels=(512, 128, 32), encoder=LARGE,
                   latents=16)  # fmt: skip
    encoder = s.encoder
    assert encoder is not None
    args: dict[str, Any] = {
        "resolution": 64 if slat else s.latents, "in_channels": 8, "out_channels": 8,
        "model_channels": s.hidden, "cond_channels": encoder.hidden, "num_blocks": s.depth[0],
        "num_heads": s.heads, "mlp_ratio": 4, "patch_size": 2 if slat else 1, "pe_mode": "ape",
        "qk_rms_norm": True, "use_fp16": True,
    }  # fmt: skip
    if slat:
        args |= {"num_io_res_blocks": 2, "io_block_channels": [128]}
    config = trellis.flow_config(args, "random", [], slat)
    shapes = {trellis.released_name(name): shape for name, shape in network_shapes(config).items()}
    shapes |= _slat_ends(s.hidden) if slat else {"pos_emb": (s.latents**3, s.hidden)}
    # As released: the blocks' linears in fp16, other tensors in float32.
    flow: Specs = {}
    for name, shape in shapes.items():
        half = name.startswith("blocks.") and not name.endswith((".gamma", "norm2.weight"))
        half = half and not name.endswith("norm2.bias")
        half |= name.startswith(("input_blocks.", "out_blocks.")) and ".norm" not in name
        flow[name] = ("F16" if half else "F32", shape)
    stem = "ckpts/slat_flow_img_dit_L_64l8p2_fp16" if slat else "ckpts/ss_flow_img_dit_L_16l8_fp16"
    dec = "ckpts/ss_dec_conv3d_16l8_fp16"
    kind = "ElasticSLatFlowModel" if slat else trellis.STRUCTURE
    texts: dict[str, Any] = {f"{stem}.json": {"name": kind, "args": args}}
    tensors: dict[str, Specs] = {}
    models = {"slat_flow_model" if slat else "sparse_structure_flow_model": stem}
    if "dit" in parts:
        tensors[f"{stem}.safetensors"] = flow
    if "decoder" in parts and not slat:
        models["sparse_structure_decoder"] = dec
        decoder_args = {
            "out_channels": 1, "latent_channels": 8, "num_res_blocks": 2,
            "num_res_blocks_middle": 2, "channels": list(s.channels), "use_fp16": True,
        }  # fmt: skip
        texts[f"{dec}.json"] = {"name": trellis.DECODER, "args": decoder_args}
        occupancy = trellis.decoder_config(decoder_args, "random")
        tensors[f"{dec}.safetensors"] = {
            name: ("F16" if "conv" in name else "F32", shape)
            for name, shape in shapes_of(lambda: OccupancyDecoder(occupancy)).items()
        }
    if "conditioner" in parts and not slat:
        tensors[f"{trellis.ENCODER}.safetensors"] = {
            name: ("F32", shape) for name, shape in _hub(encoder).items()
        }
    params = {"steps": 25, "cfg_strength": 5.0, "cfg_interval": [0.5, 1.0], "rescale_t": 3.0}
    texts["pipeline.json"] = {
        "name": "TrellisImageTo3DPipeline",
        "args": {
            "models": models,
            "slat_sampler" if slat else "sparse_structure_sampler": {
                "name": "FlowEulerGuidanceIntervalSampler",
                "args": {"sigma_min": 1e-5},
                "params": params,
            },
            "image_cond_model": "dinov2_vitl14_reg",
        },
    }
    return Files({name: json.dumps(text, indent=1) for name, text in texts.items()}, tensors)


def _dinov2(config: Dinov2Config) -> dict[str, tuple[int, ...]]:
    return {MASK: (1, config.hidden), **released_shapes(config)}


def _hub(config: Dinov2Config) -> dict[str, tuple[int, ...]]:
    """The tensors of `_dinov2` by their torch hub names: the inverse of `dinov2.from_hub`."""
    h = config.hidden
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= {"cls_token": (1, 1, h), "pos_embed": (1, 1 + config.places**2, h)}
    shapes |= {"register_tokens": (1, config.registers, h), "mask_token": (1, h)}
    shapes |= {"patch_embed.proj.weight": (h, 3, config.patch, config.patch)}
    shapes |= {"patch_embed.proj.bias": (h,), "norm.weight": (h,), "norm.bias": (h,)}
    for index in range(config.layers):
        b = f"blocks.{index}"
        shapes |= {
            f"{b}.{n}.{leaf}": (h,) for n in ("norm1", "norm2") for leaf in ("weight", "bias")
        }
        shapes |= {f"{b}.{n}.gamma": (h,) for n in ("ls1", "ls2")}
        for name, rows, columns in (
            ("attn.qkv", 3 * h, h),
            ("attn.proj", h, h),
            ("mlp.fc1", config.wide, h),
            ("mlp.fc2", h, config.wide),
        ):
            shapes |= {f"{b}.{name}.weight": (rows, columns), f"{b}.{name}.bias": (rows,)}
    return shapes


def _slat_ends(h: int, io: int = 128) -> dict[str, tuple[int, ...]]:
    """The sparse convolutions around the SLAT flow's blocks."""
    shapes: dict[str, tuple[int, ...]] = {
        "input_layer.weight": (io, 8), "input_layer.bias": (io,),
        "out_layer.weight": (8, io), "out_layer.bias": (8,),
    }  # fmt: skip
    for name, inputs, outputs in (
        ("input_blocks.0", io, io),
        ("input_blocks.1", io, h),
        ("out_blocks.0", 2 * h, io),
        ("out_blocks.1", 2 * io, io),
    ):
        shapes |= {f"{name}.norm1.weight": (inputs,), f"{name}.norm1.bias": (inputs,)}
        for conv, width in (("conv1", inputs), ("conv2", outputs)):
            shapes |= {f"{name}.{conv}.conv.weight": (outputs, 3, 3, 3, width)}
            shapes |= {f"{name}.{conv}.conv.bias": (outputs,)}
        shapes |= {f"{name}.emb_layers.1.weight": (2 * outputs, h)}
        shapes |= {f"{name}.emb_layers.1.bias": (2 * outputs,)}
        if inputs != outputs:
            shapes |= {f"{name}.skip_connection.weight": (outputs, inputs)}
            shapes |= {f"{name}.skip_connection.bias": (outputs,)}
    return shapes


def _prefixed(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def _parts(
    wanted: Sequence[str], **parts: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    return {name: shape for part in wanted for name, shape in parts[part].items()}


Maker = Callable[[Sizes, Sequence[str]], Files]
MODELS: dict[str, Maker] = {
    "hunyuan3d-2.0": _hunyuan,
    "hunyuan3d-2.0-fast": lambda s, p: _hunyuan(s, p, guidance=True),
    "hunyuan3d-2.0-turbo": lambda s, p: _hunyuan(s, p, guidance=True, turbo=True),
    "hunyuan3d-2mini": lambda s, p: _hunyuan(s, p, mini=True),
    "hunyuan3d-2mini-fast": lambda s, p: _hunyuan(s, p, mini=True, guidance=True, pixels=1022),
    "hunyuan3d-2mini-turbo": lambda s, p: _hunyuan(
        s, p, mini=True, guidance=True, turbo=True, pixels=1022
    ),
    "hunyuan3d-2mv": lambda s, p: _hunyuan(s, p, views=True),
    "step1x-3d": _step1x,
    "step1x-3d-label": lambda s, p: _step1x(s, p, label=True),
    "trellis-ss": _trellis,
    "trellis-slat": lambda s, p: _trellis(s, p, slat=True),
}


def files_of(name: str, parts: Sequence[str] = NETWORKS, sizes: Sizes | None = None) -> Files:
    """The files that `write` writes, by path. Raises UserError for unknown names and networks."""
    check_choice("model", name, tuple(MODELS))
    if odd := [part for part in parts if part not in NETWORKS] or (not parts and ["nothing"]):
        raise UserError(f"no part {odd[0]!r}: choose among {', '.join(NETWORKS)}")
    return MODELS[name](sizes or Sizes(), tuple(parts))


def write(
    name: str,
    out: Path,
    *,
    parts: Sequence[str] = NETWORKS,
    seed: int = 0,
    sizes: Sizes | None = None,
    control: Control | None = None,
) -> Files:
    """Writes the checkpoint into the folder `out`; existing files of these names are replaced."""
    files = files_of(name, parts, sizes)
    done, control = 0, control or Control()
    for place, specs in files.tensors.items():
        target = out / place
        target.parent.mkdir(parents=True, exist_ok=True)

        def drawn(specs: Specs = specs) -> Iterator[tuple[str, memoryview]]:
            nonlocal done
            for tensor, (dtype, shape) in specs.items():
                control.step(name, done, files.nbytes)
                made = draw(tensor, shape, seed)
                half = made.half() if dtype == "F16" else made
                done += half.nbytes
                yield tensor, half.view(-1).view(torch.uint8).numpy().data

        write_container(target, lay_out(specs, {}), drawn())
    for place, text in files.texts.items():
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out / place) as part:
            part.write_text(text + "\n")
    control.report(name, files.nbytes, files.nbytes)
    return files


def draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Draws a float32 tensor, scaled so that activations neither vanish nor explode with depth."""
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    noise = torch.randn(shape, generator=rng)
    owner = name.rsplit(".", 2)[-2:]
    if name.endswith(("scale", "gamma", "lambda1")) or (
        len(shape) == 1 and name.endswith("weight")
    ):
        return noise.mul_(0.05).add_(0.1 if "ls" in owner[0] or "lambda1" in name else 1.0)
    if len(shape) == 1:
        return noise.mul_(0.02)
    noise.mul_((math.prod(shape[1:]) or 1) ** -0.5)
    if owner == ["query_proj", "weight"]:
        # A trained field is smooth. Without this, the surface of a random field crosses 61 % of the
        # cells at any resolution; with it, 5 % of 32^3, and half that at twice the resolution.
        bands = (shape[1] - 3) // 6
        octaves = 4.0 ** -torch.arange(bands)
        noise[:, 3:].unflatten(1, (6, bands)).mul_(octaves)
    return noise
