"""Hunyuan3D 2.0, 2.0-fast, 2.0-turbo, 2mini (fast, turbo) and 2mv.

Released layout: a folder with config.yaml (sections model, vae, conditioner, scheduler, ...) and
model.fp16.safetensors, whose tensor names start with model., vae. or conditioner.; those of model.
are the canonical DiT's. A DiT file without config.yaml is read by its tensors' shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vitapack.runtime.condition.conditioner import ImageConditioner, encoder_part
from vitapack.runtime.condition.recipes import hunyuan_framing
from vitapack.runtime.decode.decoders import VolumeDecoder, volume_decoder
from vitapack.runtime.decode.shape_vae import ShapeDecoder, ShapeDecoderConfig
from vitapack.runtime.engines.choose import Execution
from vitapack.runtime.errors import FormatError
from vitapack.runtime.families.checkpoint import Checkpoint, check_part, network_shapes, shapes_of
from vitapack.runtime.families.family import Family
from vitapack.runtime.families.params import Params
from vitapack.runtime.families.probe import PathProbe
from vitapack.runtime.format.architecture import DiTConfig
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.loading.checkpoint_files import Weights
from vitapack.runtime.loading.source import Source
from vitapack.runtime.networks.dit import hunyuan_time

NAME = "hunyuan3d"
RELEASED = {(16, 32): "2.0", (8, 16): "2mini"}
SCHEDULERS = {
    "": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "ConsistencyFlowMatchEulerDiscreteScheduler": "consistency",
}
LARGE_IMAGES = ("hunyuan3d-2mini-fast", "hunyuan3d-2mini-turbo")
# The autoencoder's encoder, which some released files hold.
NOT_NEEDED = ("vae.encoder.", "vae.pre_kl.")


def dit_config(values: Mapping[str, Any], label: str) -> DiTConfig:
    """From `model.params` of a config.yaml; defaults are those of the reference implementation.

    Raises: FormatError.
    """
    params = Params(values, label)
    params.drop("axes_dim", "theta", "ckpt_path")  # no rotary embedding is ever applied
    hidden = params.size("hidden_size", 1024)
    # The reference implementation passes time_factor as its sinusoid's max_period, and always
    # multiplies the times by 1000.
    period = params.take("time_factor", float, 1000.0)
    config = _dit(
        in_channels=params.size("in_channels", 64),
        cond_channels=params.size("context_in_dim", 1536),
        hidden=hidden,
        heads=params.size("num_heads", 16),
        depth=params.size("depth", 16, least=0),
        single=params.size("depth_single_blocks", 32, least=0),
        mlp_ratio=params.take("mlp_ratio", float, 4.0),
        qkv_bias=params.take("qkv_bias", bool, True),
        guidance_embed=params.take("guidance_embed", bool, False),
        label=label,
    )
    params.done()
    return replace(config, time=replace(config.time, max_period=period))


def dit_config_from_shapes(weights: Weights, label: str) -> DiTConfig:
    """The same without config.yaml: the shapes determine all but the time factor."""

    def shape(name: str) -> tuple[int, ...]:
        if f"model.{name}" not in weights:
            raise FormatError(f"{label}: no tensor {name}; without config.yaml it is needed")
        return weights.shape(f"model.{name}")

    def depth(kind: str) -> int:
        found = {n.split(".")[2] for n in weights if n.startswith(f"model.{kind}.")}
        return max((int(index) + 1 for index in found if index.isdecimal()), default=0)

    double = "double_blocks.0.img_attn"
    hidden, channels = shape("latent_in.weight")
    return _dit(
        in_channels=channels,
        cond_channels=shape("cond_in.weight")[1],
        hidden=hidden,
        heads=hidden // shape(f"{double}.norm.query_norm.scale")[0],
        depth=depth("double_blocks"),
        single=depth("single_blocks"),
        mlp_ratio=shape("double_blocks.0.img_mlp.0.weight")[0] / hidden,
        qkv_bias=f"model.{double}.qkv.bias" in weights,
        guidance_embed="model.guidance_in.in_layer.weight" in weights,
        label=label,
    )


def decoder_config(
    values: Mapping[str, Any], label: str, unknown: list[str] | None = None
) -> ShapeDecoderConfig:
    """From `vae.params` of a config.yaml. `unknown` collects unknown settings.

    Raises: FormatError.
    """
    params = Params(values, label)
    # Settings of the encoder, of training, or of the caller: none changes the decoder.
    params.drop(
        "num_encoder_layers", "pc_size", "pc_sharpedge_size", "point_feats", "downsample_ratio"
    )
    params.drop("label_type", "drop_path_rate", "use_ln_post", "ckpt_path")
    width = params.size("width", 1024)
    config = ShapeDecoderConfig(
        latents=params.size("num_latents", 3072),
        channels=params.size("embed_dim", 64),
        width=width,
        heads=params.size("heads", 16),
        layers=params.count("num_decoder_layers", 16),
        num_freqs=params.size("num_freqs", 8),
        include_pi=params.take("include_pi", bool, True),
        qkv_bias=params.take("qkv_bias", bool, True),
        qk_norm=params.take("qk_norm", bool, False),
        scale_factor=params.take("scale_factor", float, 1.0),
        geo_downsample=params.size("geo_decoder_downsample_ratio", 1),
        geo_mlp_expand=params.size("geo_decoder_mlp_expand_ratio", 4),
        geo_ln_post=params.take("geo_decoder_ln_post", bool, True),
    )
    if unknown is not None:
        unknown += params.left()
    if config.width % config.heads or config.heads % config.geo_downsample:
        raise FormatError(
            f"{label}: width {config.width}, heads {config.heads} and geo decoder downsampling "
            f"{config.geo_downsample} do not divide one another"
        )
    if not 0 < config.scale_factor < 1e6:
        raise FormatError(f"{label}: scale_factor is {config.scale_factor}; expected one near 1")
    return config


def sampler_defaults(probe: PathProbe, guidance_embed: bool) -> SamplerDefaults:
    """The released defaults: 50 Euler steps, or 5 on the distilled consistency schedule."""
    target = probe.target("scheduler")
    label = f"{probe.folder / 'config.yaml'}: scheduler"
    if target not in SCHEDULERS:
        raise FormatError(f"{label} is {target}; expected one of {', '.join(list(SCHEDULERS)[1:])}")
    params = probe.params("scheduler")
    train_steps = params.get("num_train_timesteps", 1000)
    if train_steps != 1000:
        raise FormatError(f"{label} has {train_steps!r} training steps; expected 1000")
    made = SamplerDefaults(
        SCHEDULERS[target], steps=50, guidance=5.0, shift=params.get("shift", 1.0)
    )
    if made.name == "consistency":
        return replace(made, steps=5, pcm_timesteps=params.get("pcm_timesteps", 50))
    return made


def variant(config: DiTConfig, sampler: SamplerDefaults, views: bool) -> str:
    """The released model's name, or its depths if there is no such release."""
    depths = len(config.double_blocks), len(config.single_blocks)
    size = RELEASED.get(depths, "{}+{}".format(*depths))
    size = "2mv" if views and size == "2.0" else f"{size}-mv" if views else size
    if sampler.name == "consistency":
        return f"{NAME}-{size}-turbo"
    return f"{NAME}-{size}-fast" if config.embeds_guidance else f"{NAME}-{size}"


def recognises(probe: PathProbe) -> bool:
    if probe.config is not None:
        return probe.target() == "Hunyuan3DDiT"
    return probe.path.is_file() and "model.latent_in.weight" in probe.weights


def read(probe: PathProbe) -> Checkpoint:
    """Reads the configuration and checks every tensor's name and shape; loads no tensor."""
    weights, path = probe.weights, probe.path
    label = str(probe.folder / "config.yaml")
    alone = probe.config is None
    config = (
        dit_config_from_shapes(weights, str(path))
        if alone
        else dit_config(probe.params("model"), f"{label}: model.params")
    )
    check_part(weights, "model", network_shapes(config), path)
    ignored = tuple(name for name in weights if name.startswith(NOT_NEEDED))
    decoder, unknown = None, list[str]()
    if probe.target("vae"):
        decoder = decoder_config(probe.params("vae"), f"{label}: vae.params", unknown)
        if any(name.startswith("vae.") for name in weights):
            expected = shapes_of(lambda: ShapeDecoder(decoder))
            check_part(weights, "vae", expected, path, ignored)
    stray = [name for name in weights if not name.startswith(("model.", "vae.", "conditioner."))]
    if stray:
        raise FormatError(
            f"{path}: {len(stray)} tensors are neither model.*, vae.* nor conditioner.*: "
            f"{', '.join(stray[:3])}"
        )
    sampler = sampler_defaults(probe, config.embeds_guidance)
    encoder = probe.params("conditioner").get("main_image_encoder") or {}
    views = isinstance(encoder, dict) and str(encoder.get("type", "")).endswith("MV")
    return Checkpoint(
        family=NAME,
        variant=variant(config, sampler, views),
        path=path,
        config=config,
        sampler=sampler,
        latents=None if decoder is None else (decoder.latents, decoder.channels),
        decoder=decoder,
        scale_factor=None if decoder is None else decoder.scale_factor,
        weights=weights,
        ignored=ignored,
        unknown=tuple(unknown),
        sections=_sections(probe),
    )


def _sections(probe: PathProbe) -> dict[str, Any]:
    """config.yaml, with the image processor's settings among those of the conditioner."""
    sections = dict(probe.config or {})
    if isinstance(sections.get("conditioner"), dict):
        params = probe.params("conditioner") | {"image_processor": probe.params("image_processor")}
        sections["conditioner"] = sections["conditioner"] | {"params": params}
    return sections


def conditioner(source: Source, execution: Execution, bits: int) -> ImageConditioner:
    """DINOv2-giant on a white background; CLS and patches are the tokens."""
    main = source.config.get("main_image_encoder")
    main = main if isinstance(main, dict) else {}
    kwargs = main.get("kwargs") if isinstance(main.get("kwargs"), dict) else {}
    image = Params(source.config.get("image_processor") or {}, f"{source.label}: image_processor")
    encoder = Params(kwargs or {}, f"{source.label}: main_image_encoder")
    pixels = encoder.size("image_size", 518)
    prepare = hunyuan_framing(
        image.size("size", 512), pixels, image.take("border_ratio", float, 0.15)
    )
    if pixels % 14 or pixels > 4096:
        raise FormatError(f"{source.label}: image_size {pixels} is no multiple of 14 below 4096")
    views = str(main.get("type", "")).endswith("MV")
    settings = kwargs.get("config") if isinstance(kwargs, dict) else None
    settings = settings if isinstance(settings, dict) else None
    part = encoder_part(source, execution, bits, settings, pixels=pixels)
    return ImageConditioner(part, prepare, views=views)


def condition_tokens(variant: str) -> int:
    """CLS and patches of 14 px, of images of 1022 px in two variants and of 518 px in others."""
    side = 1022 if variant in LARGE_IMAGES else 518
    return 1 + (side // 14) ** 2


def shape_decoder(source: Source, execution: Execution) -> VolumeDecoder:
    return volume_decoder(source, decoder_config(source.config, source.label), execution)


def _dit(
    *,
    in_channels: int,
    cond_channels: int,
    hidden: int,
    heads: int,
    depth: int,
    single: int,
    mlp_ratio: float,
    qkv_bias: bool,
    guidance_embed: bool,
    label: str,
) -> DiTConfig:
    if max(depth, single) > 1000:
        raise FormatError(f"{label}: {depth} double and {single} single blocks; expected <= 1000")
    try:
        return DiTConfig(
            in_channels=in_channels,
            cond_channels=cond_channels,
            hidden=hidden,
            heads=heads,
            double_blocks=tuple(range(depth)),
            single_blocks=tuple(range(single)),
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            guidance_embed=guidance_embed,
            time=hunyuan_time(hidden),
        )
    except ValueError as error:
        raise FormatError(f"{label}: {error}") from error


FAMILY = Family(
    name=NAME,
    looks_for="config.yaml with model.target ...Hunyuan3DDiT next to model.fp16.safetensors",
    recognises=recognises,
    read=read,
    conditioner=conditioner,
    shape_decoder=shape_decoder,
    condition_tokens=condition_tokens,
)
