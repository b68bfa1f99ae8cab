"""TRELLIS image-large: the sparse-structure flow with its occupancy decoder, and the SLAT flow.

Released layout: a folder with pipeline.json, which names the models by their paths in it
(`ckpts/ss_flow_img_dit_L_16l8_fp16` is a pair of .json and .safetensors). A folder stands for its
sparse-structure flow, or for the SLAT flow if pipeline.json names no other; one model's .json or
weight file stands for itself. Of the SLAT flow only the transformer blocks are read, to be
compressed and timed; its sparse convolutions are ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitapack.runtime.condition.conditioner import ImageConditioner, encoder_part
from vitapack.runtime.condition.dinov2 import from_hub
from vitapack.runtime.condition.recipes import trellis_framing
from vitapack.runtime.decode.decoders import OccupancyGrid, occupancy_grid
from vitapack.runtime.decode.occupancy import OccupancyConfig, OccupancyDecoder
from vitapack.runtime.engines.choose import Execution
from vitapack.runtime.errors import FormatError
from vitapack.runtime.families.checkpoint import Checkpoint, check_part, network_shapes, shapes_of
from vitapack.runtime.families.family import Family
from vitapack.runtime.families.params import Params
from vitapack.runtime.families.probe import PathProbe, read_json
from vitapack.runtime.format.architecture import FlowConfig
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.loading.checkpoint_files import PICKLED, Weights, merged, open_weights
from vitapack.runtime.loading.source import Source
from vitapack.runtime.networks.flow import trellis_time

NAME = "trellis"
ENCODER = "dinov2_vitl14_reg4_pretrain"
STRUCTURE, SLAT = "SparseStructureFlowModel", ("SLatFlowModel", "ElasticSLatFlowModel")
DECODER = "SparseStructureDecoder"
RELEASED = {(STRUCTURE, 24): "trellis-ss", ("slat", 24): "trellis-slat"}
# Position embeddings are computed, and the SLAT flow's outer layers are sparse convolutions.
NOT_NEEDED = ("pos_emb", "input_blocks.", "out_blocks.")
SLAT_ENDS = ("input_layer.", "out_layer.")

_PARTS = {
    "mod.lin": "adaLN_modulation.1",
    "self_attn.qkv": "self_attn.to_qkv",
    "self_attn.proj": "self_attn.to_out",
    "self_attn.norm.query_norm": "self_attn.q_rms_norm",
    "self_attn.norm.key_norm": "self_attn.k_rms_norm",
    "cross_norm": "norm2",
    "cross_attn.q": "cross_attn.to_q",
    "cross_attn.kv": "cross_attn.to_kv",
    "cross_attn.proj": "cross_attn.to_out",
    "mlp.0": "mlp.mlp.0",
    "mlp.2": "mlp.mlp.2",
}
_EDGES = {
    "latent_in": "input_layer",
    "time_in.in_layer": "t_embedder.mlp.0",
    "time_in.out_layer": "t_embedder.mlp.2",
    "final_layer.linear": "out_layer",
}


def released_name(name: str) -> str:
    """The released name of a canonical tensor."""
    owner, _, leaf = name.rpartition(".")
    leaf = "gamma" if leaf == "scale" else leaf
    if owner in _EDGES:
        return f"{_EDGES[owner]}.{leaf}"
    _, index, inner = owner.split(".", 2)
    return f"blocks.{index}.{_PARTS[inner]}.{leaf}"


@dataclass(frozen=True)
class Model:
    """One released model: its class, its settings and its two files."""

    kind: str
    args: dict[str, Any]
    config: Path
    weights: Path


def open_model(stem: Path, weights: Path | None = None) -> Model:
    """`stem`.json with its weights, by default `stem`.safetensors. Raises: FormatError."""
    config = stem.with_name(f"{stem.name}.json")
    data = read_json(config)
    kind, args = data.get("name"), data.get("args")
    if not isinstance(kind, str) or not isinstance(args, dict):
        raise FormatError(f"{config}: expected name and args of a model")
    places = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".safetensors", *PICKLED)]
    found = weights or next((place for place in places if place.is_file()), places[0])
    return Model(kind, args, config, found)


def flow_config(
    values: Mapping[str, Any], label: str, unknown: list[str], slat: bool
) -> FlowConfig:
    """From `args` of a flow model. Raises: FormatError: if no released model is built so."""
    params = Params(values, label)
    params.drop("use_fp16", "use_checkpoint", "num_io_res_blocks", "io_block_channels")
    params.drop("num_head_channels", "use_skip_connection", "out_channels")
    for name, only in (("pe_mode", "ape"), ("qk_rms_norm", True), ("share_mod", False)):
        if params.take(name, type(only), only) != only:
            raise FormatError(f"{label}: {name} is {values[name]!r}; only {only!r} is supported")
    if params.take("qk_rms_norm_cross", bool, False):
        raise FormatError(f"{label}: qk_rms_norm_cross is not supported (no released model has it)")
    hidden, depth = params.size("model_channels", 1024), params.size("num_blocks", 24)
    channels, patch = params.size("in_channels", 8), params.size("patch_size", 1)
    resolution = params.size("resolution", 64 if slat else 16)
    if depth > 1000 or resolution > 256 or patch > 16:
        raise FormatError(
            f"{label}: {depth} blocks, resolution {resolution}, patches of {patch}; expected at "
            "most 1000, 256 and 16"
        )
    if not slat and values.get("out_channels", channels) != channels:
        raise FormatError(f"{label}: out_channels must be in_channels, {channels}")
    try:
        config = FlowConfig(
            resolution=0 if slat else resolution,
            in_channels=0 if slat else channels,
            patch=1 if slat else patch,
            cond_channels=params.size("cond_channels", 1024),
            hidden=hidden,
            heads=params.size("num_heads", 16),
            blocks=tuple(range(depth)),
            mlp_ratio=params.take("mlp_ratio", float, 4.0),
            time=trellis_time(hidden),
        )
    except ValueError as error:
        raise FormatError(f"{label}: {error}") from error
    unknown += params.left()
    return config


def decoder_config(values: Mapping[str, Any], label: str, resolution: int = 16) -> OccupancyConfig:
    """From `args` of the occupancy decoder. Raises: FormatError."""
    params = Params(values, label)
    params.drop("use_fp16")
    channels = params.take("channels", list)
    if not channels or len(channels) > 6 or not all(type(c) is int and c > 0 for c in channels):
        raise FormatError(f"{label}: channels are {channels!r}; expected one to six widths")
    if params.take("norm_type", str, "layer") != "layer" or params.size("out_channels", 1) != 1:
        raise FormatError(f"{label}: only layer norms and one output channel are supported")
    config = OccupancyConfig(
        latent_channels=params.size("latent_channels"),
        channels=tuple(channels),
        blocks=params.size("num_res_blocks"),
        middle=params.size("num_res_blocks_middle", 2, least=0),
        resolution=resolution,
    )
    if config.blocks + config.middle > 100:
        raise FormatError(f"{label}: more than 100 residual blocks per level")
    params.done()
    return config


def sampler_defaults(args: Mapping[str, Any], label: str, slat: bool) -> SamplerDefaults:
    """From pipeline.json; by default 25 steps, guidance 1 + 5 on the noisier half, shift 3."""
    section = args.get("slat_sampler" if slat else "sparse_structure_sampler") or {}
    params = section.get("params") if isinstance(section, dict) else None
    given = Params(params or {}, f"{label}: sampler")
    interval = given.values.get("cfg_interval", [0.5, 1.0])
    if not isinstance(interval, list) or len(interval) != 2:
        raise FormatError(f"{label}: cfg_interval is {interval!r}; expected two levels")
    return SamplerDefaults(
        "euler",
        steps=given.size("steps", 25),
        # (1 + w) c - w u is u + (1 + w) (c - u).
        guidance=1.0 + given.take("cfg_strength", float, 5.0),
        shift=given.take("rescale_t", float, 3.0),
        flow="trellis",
        guidance_interval=(interval[0], interval[1]),
    )


def _stem(probe: PathProbe) -> Path | None:
    """Path of the flow model's two files without suffix; None if the path holds no TRELLIS."""
    if probe.path.is_file():
        if probe.path.suffix not in (".json", ".safetensors", *PICKLED):
            return None
        stem = probe.path.with_suffix("")
        config = stem.with_name(f"{stem.name}.json")
        named = read_json(config).get("name") if config.is_file() else None
        return stem if named in (STRUCTURE, *SLAT) else None
    return _model(probe, "sparse_structure_flow_model") or _model(probe, "slat_flow_model")


def _model(probe: PathProbe, which: str) -> Path | None:
    """Path of one of the folder's models by its pipeline.json; None if that does not name it."""
    models = (probe.pipeline or {}).get("models")
    name = models.get(which) if isinstance(models, dict) else None
    if not isinstance(name, str):
        return None
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise FormatError(
            f"{probe.path / 'pipeline.json'}: {name} points out of its folder; refused"
        )
    return probe.path / name


def image_encoder(folder: Path) -> Path | None:
    """The torch-hub file of DINOv2-large with registers, which TRELLIS downloads on first use:
    from the model's folder or from torch.hub's cache."""
    cache = os.environ.get("TORCH_HOME") or Path.home() / ".cache" / "torch"
    for place in (folder, folder / "ckpts", Path(cache) / "hub" / "checkpoints"):
        for suffix in (".safetensors", ".pth"):
            if (place / f"{ENCODER}{suffix}").is_file():
                return place / f"{ENCODER}{suffix}"
    return None


def conditioner(source: Source, execution: Execution, bits: int) -> ImageConditioner:
    """DINOv2-large with registers on a black background; all tokens, normalised without affine."""
    part = encoder_part(source, execution, bits, plain_norm=True)
    return ImageConditioner(part, trellis_framing(518), registers=True)


def shape_decoder(source: Source, execution: Execution) -> OccupancyGrid:
    params = dict(source.config)
    resolution = params.pop("resolution", 16)
    config = decoder_config(params, source.label, resolution)
    return occupancy_grid(source, config, execution)


def recognises(probe: PathProbe) -> bool:
    return probe.config is None and _stem(probe) is not None


def read(probe: PathProbe) -> Checkpoint:
    """Reads the configuration and checks every tensor's name and shape; loads no tensor."""
    stem = _stem(probe)
    assert stem is not None
    given = probe.path.is_file() and probe.path.suffix != ".json"
    model = open_model(stem, probe.path if given else None)
    slat = model.kind in SLAT
    unknown: list[str] = []
    config = flow_config(model.args, str(model.config), unknown, slat)
    raw = open_weights(model.weights)
    ignored = NOT_NEEDED + (SLAT_ENDS if slat else ())
    skipped = tuple(name for name in raw if name.startswith(ignored))
    shapes = network_shapes(config)
    expected = {released_name(name): shape for name, shape in shapes.items()}
    flow = merged({"flow.": raw})
    check_part(flow, "flow", expected, model.weights, [f"flow.{name}" for name in skipped])
    stored = {name: raw.stored[released_name(name)] for name in shapes}
    left = {name: raw.stored[name] for name in skipped}
    parts = {"model.": Weights(raw.files, stored | left)}
    sections: dict[str, Any] = {"model": {"params": model.args}}
    decoder = None
    if probe.path.is_dir() and not slat:
        place = _model(probe, "sparse_structure_decoder")
        if place is not None:
            part = open_model(place)
            if part.kind != DECODER:
                raise FormatError(f"{part.config} is a {part.kind}; expected {DECODER}")
            decoder = decoder_config(part.args, str(part.config), config.resolution)
            sections["vae"] = {"params": part.args | {"resolution": config.resolution}}
            parts["vae."] = open_weights(part.weights)
            check_part(
                merged({"vae.": parts["vae."]}),
                "vae",
                shapes_of(lambda: OccupancyDecoder(decoder)),
                part.weights,
            )
        encoder = image_encoder(probe.path)
        if encoder is not None:
            parts["conditioner."] = from_hub(open_weights(encoder))
            sections["conditioner"] = {"params": {"file": encoder.name}}
    depth = len(config.blocks)
    kind = "slat" if slat else STRUCTURE
    return Checkpoint(
        family=NAME,
        variant=RELEASED.get((kind, depth), f"trellis-{'slat' if slat else 'ss'}-{depth}"),
        path=probe.path,
        config=config,
        sampler=sampler_defaults(probe.pipeline or {}, str(probe.path / "pipeline.json"), slat),
        latents=None if slat else (config.in_channels, *(3 * [config.resolution])),
        decoder=decoder,
        scale_factor=None if decoder is None else 1.0,
        weights=merged(parts),
        ignored=tuple(f"model.{name}" for name in skipped),
        unknown=tuple(unknown),
        sections=sections,
    )


FAMILY = Family(
    name=NAME,
    looks_for="pipeline.json naming a sparse_structure_flow_model, or one flow's .json (TRELLIS)",
    recognises=recognises,
    read=read,
    conditioner=conditioner,
    shape_decoder=shape_decoder,
    condition_tokens=lambda variant: 1374,  # CLS, four registers, 37 x 37 patches
    blocks_only="TRELLIS' flow of structured latents, of which only the transformer blocks are "
    "read: they can be compressed and timed, but give no mesh; the sparse-structure flow gives one",
)
