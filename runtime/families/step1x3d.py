"""Step1X-3D's geometry models, with and without labels.

Released layout, that of diffusers: a folder with model_index.json and transformer/, vae/,
visual_encoder/ (and label_encoder/), each with config.json and diffusion_pytorch_model.safetensors.
The transformer is the canonical DiT with separate q, k and v, and with the final scale and shift
swapped; its folder or file alone is accepted too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitapack.runtime.condition.conditioner import ImageConditioner, encoder_part
from vitapack.runtime.condition.recipes import step1x_framing
from vitapack.runtime.decode.decoders import VolumeDecoder, volume_decoder
from vitapack.runtime.decode.shape_vae import ShapeDecoder, ShapeDecoderConfig
from vitapack.runtime.engines.choose import Execution
from vitapack.runtime.errors import FormatError
from vitapack.runtime.families.checkpoint import Checkpoint, check_part, network_shapes, shapes_of
from vitapack.runtime.families.family import Family
from vitapack.runtime.families.params import Params
from vitapack.runtime.families.probe import PathProbe, read_json, weight_file
from vitapack.runtime.format.architecture import DiTConfig, TimeEmbedding
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.loading.checkpoint_files import (
    StoredTensor,
    Weights,
    first_names,
    merged,
    open_weights,
    stacked,
)
from vitapack.runtime.loading.source import Source

NAME = "step1x3d"
TRANSFORMER, AUTOENCODER = "transformer", "vae"  # folders
NOT_NEEDED = ("vae.encoder.", "vae.pre_kl.")
LABELS = "label."  # prefix of the label encoder's tensors among the conditioner's
# Names in the reference implementation (no released file was available). Row 0 of each is used
# without labels: pose unknown, no symmetry, ordinary geometry.
LABEL_TABLES = tuple(
    f"embedding_table_{label}.weight" for label in ("tpose", "symmetry_type", "geometry_quality")
)

_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
_EDGES = {
    "latent_in": "proj_in",
    "cond_in": "proj_cross_attention",
    "time_in.in_layer": "time_proj.linear_1",
    "time_in.out_layer": "time_proj.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}


def released_names(name: str) -> tuple[str, ...]:
    """The released tensors whose rows, concatenated, are the canonical tensor `name`."""
    owner, _, leaf = name.rpartition(".")
    leaf = "weight" if leaf == "scale" else leaf
    if owner in _EDGES:
        return (f"{_EDGES[owner]}.{leaf}",)
    kind, index, inner = owner.split(".", 2)
    blocks, names = (
        ("transformer_blocks", _DOUBLE)
        if kind == "double_blocks"
        else ("single_transformer_blocks", _SINGLE)
    )
    return tuple(f"{blocks}.{index}.{original}.{leaf}" for original in names[inner])


def released_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the released transformer."""
    shapes = {}
    for name, shape in network_shapes(config).items():
        names = released_names(name)
        rows = [config.hidden] * len(names)
        rows[-1] = shape[0] - sum(rows[:-1])  # proj_mlp is wider than q, k and v
        for original, count in zip(names, rows, strict=True):
            shapes[original] = (count, *shape[1:])
    return shapes


def canonical(weights: Weights, config: DiTConfig) -> Weights:
    """The transformer's tensors in the canonical DiT's names and layout."""
    stored = {}
    for name in network_shapes(config):
        entry = stacked([weights.stored[original] for original in released_names(name)])
        if name.startswith("final_layer.adaLN_modulation"):
            entry = _swapped(entry)
        stored[name] = entry
    return Weights(weights.files, stored)


def _swapped(entry: StoredTensor) -> StoredTensor:
    """(scale, shift) to (shift, scale)."""

    def read() -> Tensor:
        scale, shift = entry.read().chunk(2)
        return torch.cat([shift, scale])

    return StoredTensor(entry.shape, entry.dtype, read, entry.file)


def dit_config(values: Mapping[str, Any], label: str, unknown: list[str]) -> DiTConfig:
    """From transformer/config.json; defaults are the released model's. Raises: FormatError."""
    params = Params(values, label)
    hidden = params.size("width", 1280)
    cond = params.size("condition_dim", 1024)
    for kind in ("visual", "caption", "label"):
        given = values.get(f"{kind}_condition_dim")
        params.drop(f"use_{kind}_condition", f"{kind}_condition_dim")
        if given is not None and values.get(f"use_{kind}_condition") and given != cond:
            raise FormatError(
                f"{label}: {kind}_condition_dim is {given!r}, condition_dim {cond}; models that "
                "project their condition first are not supported (no released one does)"
            )
    try:
        config = DiTConfig(
            in_channels=params.size("input_channels", 64),
            cond_channels=cond,
            hidden=hidden,
            heads=params.size("num_heads", 20),
            double_blocks=tuple(range(_depth(params, "layers", 12))),
            single_blocks=tuple(range(_depth(params, "num_single_layers", 24))),
            mlp_ratio=4.0,
            qkv_bias=True,
            guidance_embed=False,
            time=TimeEmbedding(hidden, 4 * hidden, 1.0, 10_000.0, cos_first=False,
                               activation="gelu"),
        )  # fmt: skip
    except ValueError as error:
        raise FormatError(f"{label}: {error}") from error
    unknown += params.left()
    return config


def _depth(params: Params, name: str, default: int) -> int:
    depth = params.size(name, default, least=0)
    if depth > 1000:
        raise FormatError(f"{params.label}: {name} is {depth}; expected at most 1000")
    return depth


def decoder_config(
    values: Mapping[str, Any], label: str, unknown: list[str] | None = None
) -> ShapeDecoderConfig:
    """From vae/config.json: Hunyuan3D's graph, other epsilons and names. Raises: FormatError."""
    params = Params(values, label)
    params.drop("n_samples", "use_downsample", "point_feats", "out_dim", "num_encoder_layers")
    params.drop("init_scale", "use_flash", "use_checkpoint", "with_sharp_data")
    config = ShapeDecoderConfig(
        latents=params.size("num_latents", 2048),
        channels=params.size("embed_dim", 64),
        width=params.size("width", 768),
        heads=params.size("heads", 12),
        layers=params.count("num_decoder_layers", 16),
        num_freqs=params.size("num_freqs", 8),
        include_pi=params.take("include_pi", bool, False),
        qkv_bias=params.take("qkv_bias", bool, False),
        qk_norm=params.take("qk_norm", bool, False),
        scale_factor=params.take("z_scale_factor", float, 1.0),
        geo_name="decoder",
        geo_ln_post=params.take("use_ln_post", bool, True),
        eps=1e-5,
        bounds=1.05,
    )
    if config.width % config.heads or config.layers > 1000:
        raise FormatError(
            f"{label}: width {config.width}, heads {config.heads}, {config.layers} layers: "
            "expected a width that the heads divide, and at most 1000 layers"
        )
    if not (math.isfinite(config.scale_factor) and 0 < config.scale_factor < 1e6):
        raise FormatError(f"{label}: z_scale_factor is {config.scale_factor}; expected one near 1")
    if unknown is not None:
        unknown += params.left()
    return config


def sampler_defaults(folder: Path) -> SamplerDefaults:
    """30 steps of diffusers' Euler scheduler, guidance 7.5, the first prediction set to zero."""
    path = folder / "scheduler" / "scheduler_config.json"
    shift: Any = 1.0
    if path.is_file():
        params = Params(read_json(path), str(path))
        if params.take("num_train_timesteps", int, 1000) != 1000:
            raise FormatError(f"{path}: num_train_timesteps must be 1000")
        if params.values.get("use_dynamic_shifting"):
            raise FormatError(f"{path}: dynamic shifting is not supported")
        shift = params.take("shift", float, 1.0)
    return SamplerDefaults(
        "euler", steps=30, guidance=7.5, shift=shift, flow="step1x", zero_init=True
    )


def _transformer(probe: PathProbe) -> Path | None:
    """The transformer's folder, None if the path holds none of this family."""
    folder = probe.folder
    for place in (folder / TRANSFORMER, folder):
        path = place / "config.json"
        if not path.is_file() or (probe.path.is_file() and place != folder):
            continue
        config = read_json(path)
        named = config.get("_class_name")
        if named == "FluxDenoiser" or (
            named is None and {"input_channels", "num_single_layers"} <= config.keys()
        ):
            return place
    return None


def recognises(probe: PathProbe) -> bool:
    return probe.config is None and _transformer(probe) is not None


def read(probe: PathProbe) -> Checkpoint:
    """Reads the configuration and checks every tensor's name and shape; loads no tensor."""
    place = _transformer(probe)
    assert place is not None
    unknown: list[str] = []
    settings = read_json(place / "config.json")
    config = dit_config(settings, str(place / "config.json"), unknown)
    file = probe.path if probe.path.is_file() else weight_file(place)
    raw = open_weights(file).renamed(lambda name: name.removeprefix("dit_model."))
    expected = released_shapes(config)
    check_part(merged({f"{TRANSFORMER}.": raw}), TRANSFORMER, expected, file)
    parts = {"model.": canonical(raw, config)}
    sections: dict[str, Any] = {"model": {"params": settings}}
    whole = place.name == TRANSFORMER and place != probe.folder
    root = probe.folder if whole else place
    decoder = None
    if whole and (root / AUTOENCODER / "config.json").is_file():
        path = root / AUTOENCODER / "config.json"
        sections["vae"] = {"params": read_json(path)}
        decoder = decoder_config(sections["vae"]["params"], str(path), unknown)
        file = weight_file(root / AUTOENCODER)
        parts["vae."] = open_weights(file).renamed(lambda name: name.removeprefix("shape_model."))
        vae = merged({"vae.": parts["vae."]})
        ignored = tuple(name for name in vae if name.startswith(NOT_NEEDED))
        check_part(vae, "vae", shapes_of(lambda: ShapeDecoder(decoder)), file, ignored)
    else:
        ignored = ()
    labelled = bool(settings.get("use_label_condition"))
    for name, prefix in (
        ("visual_encoder", "conditioner."),
        ("label_encoder", f"conditioner.{LABELS}"),
    ):
        path = root / name / "config.json"
        if whole and path.is_file():
            params = read_json(path)
            labelled |= name == "label_encoder"
            section = sections.setdefault("conditioner", {"params": {}})["params"]
            section |= params if name == "visual_encoder" else {"label": params}
            parts[prefix] = open_weights(weight_file(root / name))
    return Checkpoint(
        family=NAME,
        variant=_variant(config, labelled),
        path=probe.path,
        config=config,
        sampler=sampler_defaults(root),
        latents=None if decoder is None else (decoder.latents, decoder.channels),
        decoder=decoder,
        scale_factor=None if decoder is None else decoder.scale_factor,
        weights=merged(parts),
        ignored=ignored,
        unknown=tuple(unknown),
        sections=sections,
    )


def conditioner(source: Source, execution: Execution, bits: int) -> ImageConditioner:
    """DINOv2-large with registers on a white background; the label tokens, if any, are last."""
    labels = source.below(LABELS)
    names = [n for n in source.shapes if not n.startswith(LABELS)]
    visual = Source(source.label, source.config, {n: source.shapes[n] for n in names}, source.read)
    # The configuration of Step1X-3D's own encoder class holds no sizes.
    settings = source.config if "hidden_size" in source.config else None
    return ImageConditioner(
        encoder_part(visual, execution, bits, settings),
        step1x_framing(518, 0.95),
        extra=label_tokens(labels) if labels.shapes else None,
    )


def label_tokens(source: Source) -> Tensor:
    """(1, 3, D): the first row of each of `LABEL_TABLES`, under any prefix. Raises: FormatError."""
    rows = []
    for table in LABEL_TABLES:
        names = [n for n, s in source.shapes.items() if n.endswith(table) and len(s) == 2 and s[0]]
        if len(names) != 1:
            raise FormatError(
                f"{source.label}: its label encoder should hold the table {table} once, and has it "
                f"{len(names)} times; it holds {first_names(sorted(source.shapes), 6)}"
            )
        rows.append(source.read(names[0])[0].float())
    if len({row.shape for row in rows}) != 1:
        raise FormatError(
            f"{source.label}: the label encoder's tables have {[len(row) for row in rows]} "
            "columns; expected as many in each"
        )
    return torch.stack(rows)[None]


def condition_tokens(variant: str) -> int:
    """CLS, 37 x 37 patches and, with labels, three more."""
    return 1370 + (len(LABEL_TABLES) if variant.endswith("-label") else 0)


def shape_decoder(source: Source, execution: Execution) -> VolumeDecoder:
    return volume_decoder(source, decoder_config(source.config, source.label), execution)


def _variant(config: DiTConfig, labelled: bool) -> str:
    depths = len(config.double_blocks), len(config.single_blocks)
    name = "step1x-3d" if depths == (12, 24) else "step1x-3d-{}+{}".format(*depths)
    return f"{name}-label" if labelled else name


FAMILY = Family(
    name=NAME,
    looks_for="a folder with transformer/config.json of class FluxDenoiser (Step1X-3D)",
    recognises=recognises,
    read=read,
    conditioner=conditioner,
    shape_decoder=shape_decoder,
    condition_tokens=condition_tokens,
)
