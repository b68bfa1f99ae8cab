"""DINOv2, the published models' image encoder: transformers' networks, filled from any source.

    config = config_of(source.unpacked_shapes(), settings, label)  # checked, without transformers
    encoder = load(source, config, torch.float32, "cpu", bits=8)
    encoder(images).last_hidden_state                         # (B, 1 + registers + patches, h)

transformers is an extra; only `load` imports it, since the import takes seconds and 220 MB. It
receives hyper-parameters, never a checkpoint's whole configuration, so it does not go online.
Released files have the tensor names of its version 4, under any prefix; version 5 renamed some of
them (`RENAMED`). `from_hub` maps the names of torch-hub files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitapack.runtime.engines.choose import Execution
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.format.container import one_line
from vitapack.runtime.loading.checkpoint_files import StoredTensor, Weights
from vitapack.runtime.loading.fill import fill
from vitapack.runtime.loading.source import Source

HEAD = 64  # channels per head in every released size
LAYER = "encoder.layer."  # in the names of the blocks' tensors
MASK = "embeddings.mask_token"  # used in training only
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet statistics, for images in 0..1
NEEDED = "its image encoder needs transformers: pip install 'vitapack[dinov2]'"

# Released module name -> its names in transformers 5; two of them share the rows in order.
RENAMED = {
    "attention.attention.query": ("attention.q_proj",),
    "attention.attention.key": ("attention.k_proj",),
    "attention.attention.value": ("attention.v_proj",),
    "attention.output.dense": ("attention.o_proj",),
    "mlp.weights_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.weights_out": ("mlp.down_proj",),
}
_OWNED = re.compile(r"(encoder\.layer\.\d+\.)(.+?)\.((?:weight|bias)(?:\.q8|\.scale)?)")


@dataclass(frozen=True)
class Dinov2Config:
    hidden: int
    layers: int
    heads: int
    patch: int  # pixels per side
    places: int  # patches per side of the stored position embeddings: 37 for 518 px
    registers: int
    mlp_ratio: int
    swiglu: bool
    eps: float = 1e-6  # of the LayerNorms

    @property
    def wide(self) -> int:
        """Inner channels of the MLP; a gated one has two thirds, up to a multiple of 8."""
        wide = self.hidden * self.mlp_ratio
        return (int(wide * 2 / 3) + 7) // 8 * 8 if self.swiglu else wide

    def working_bytes(self, pixels: int, dtype: torch.dtype, *, expands: bool = False) -> int:
        """Peak memory of one square image, excluding weights: the MLP of a layer, with the tokens
        held three times around it.

        A gated MLP's first two projections are one or two tensors, by transformers' version.
        `expands`: a packed weight is expanded to floats for its product, as on GPUs.
        """
        tokens = 1 + self.registers + (pixels // self.patch) ** 2
        wide = (4 if self.swiglu else 2) * self.wide
        weight = self.hidden * self.wide if expands else 0
        return dtype.itemsize * (tokens * (3 * self.hidden + wide) + weight + 3 * pixels**2)

    def settings(self) -> dict[str, Any]:
        """The configuration under the names of transformers and of released config.json files."""
        registers = {"num_register_tokens": self.registers} if self.registers else {}
        return registers | {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
            "hidden_act": "gelu",
            "layer_norm_eps": self.eps,
            "image_size": self.places * self.patch,
            "patch_size": self.patch,
            "num_channels": 3,
            "qkv_bias": True,
            "use_swiglu_ffn": self.swiglu,
        }


def config_of(
    shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], label: str
) -> Dinov2Config:
    """The configuration by the tensors' shapes and the checkpoint's settings ({} if it has none).

    Raises: FormatError: if the tensors are not a DINOv2's, or do not fit the settings.
    """
    config = config_from_shapes(shapes, label)
    heads, eps = settings.get("num_attention_heads", config.heads), config.eps
    try:  # YAML reads 1e-06 as a string
        eps = float(settings.get("layer_norm_eps", eps))
    except (TypeError, ValueError):
        eps = math.nan
    if type(heads) is not int or not 0 < heads <= config.hidden or config.hidden % heads:
        raise FormatError(
            f"{label}: the image encoder's num_attention_heads is {heads!r}; expected a divisor "
            f"of its {config.hidden} channels"
        )
    if not 0 < eps < 1:
        raise FormatError(
            f"{label}: the image encoder's layer_norm_eps is {settings['layer_norm_eps']!r}; "
            "expected a number near 1e-6"
        )
    config = Dinov2Config(**vars(config) | {"heads": heads, "eps": eps})
    for name, value in config.settings().items():
        if name != "layer_norm_eps" and settings.get(name, value) != value:
            raise FormatError(
                f"{label}: the image encoder's {name} is {settings[name]!r} in its configuration; "
                f"its tensors and this reader expect {value!r}"
            )
    expected, actual = released_shapes(config), dict(shapes)
    actual.pop(MASK, None)
    if odd := sorted(set(expected.items()) ^ set(actual.items())):
        name, shape = odd[0]
        raise FormatError(
            f"{label}: the image encoder's tensors are not those of a DINOv2 of its size: "
            f"{name} {list(shape)} ({len(odd)} differ in all)"
        )
    return config


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], label: str) -> Dinov2Config:
    """The configuration by the tensors' shapes alone; heads have 64 channels.

    Raises: FormatError: if they are not a DINOv2's.
    """

    def shape(name: str, dims: int) -> tuple[int, ...]:
        size = shapes.get(name)
        if size is None or len(size) != dims or 0 in size:
            raise FormatError(
                f"{label}: the image encoder should be a DINOv2; {name} is "
                f"{'missing' if size is None else list(size)}"
            )
        return size

    hidden, _, patch, _ = shape("embeddings.patch_embeddings.projection.weight", 4)
    table = shape("embeddings.position_embeddings", 3)[1] - 1
    places = round(table**0.5)
    layers = {name.split(".")[2] for name in shapes if name.startswith(LAYER)}
    swiglu = f"{LAYER}0.mlp.weights_in.weight" in shapes
    outer = "weights_out" if swiglu else "fc2"
    wide = shape(f"{LAYER}0.mlp.{outer}.weight", 2)[1]
    if hidden % HEAD or places**2 != table or len(layers) > 1000:
        raise FormatError(
            f"{label}: an image encoder of {hidden} channels, {table} places, {len(layers)} "
            f"layers is no DINOv2 (heads have {HEAD} channels, places form a square)"
        )
    registers = shapes.get("embeddings.register_tokens")
    config = Dinov2Config(
        hidden=hidden,
        layers=len(layers),
        heads=hidden // HEAD,
        patch=patch,
        places=places,
        registers=registers[1] if registers and len(registers) == 3 else 0,
        mlp_ratio=round(wide / hidden * (1.5 if swiglu else 1)),
        swiglu=swiglu,
    )
    if config.wide != wide:
        raise FormatError(
            f"{label}: an image encoder of {hidden} channels with {wide} in its MLP is no DINOv2"
        )
    return config


def released_shapes(config: Dinov2Config) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a released file, except the mask token, used in training only."""
    h, wide = config.hidden, config.wide
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, h),
        "embeddings.position_embeddings": (1, 1 + config.places**2, h),
        "embeddings.patch_embeddings.projection.weight": (h, 3, config.patch, config.patch),
        "embeddings.patch_embeddings.projection.bias": (h,),
    }
    if config.registers:
        shapes["embeddings.register_tokens"] = (1, config.registers, h)
    linears = {f"attention.attention.{name}": (h, h) for name in ("query", "key", "value")}
    linears["attention.output.dense"] = (h, h)
    if config.swiglu:
        linears |= {"mlp.weights_in": (2 * wide, h), "mlp.weights_out": (h, wide)}
    else:
        linears |= {"mlp.fc1": (wide, h), "mlp.fc2": (h, wide)}
    for start in (f"{LAYER}{index}." for index in range(config.layers)):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{start}{norm}.weight": (h,), f"{start}{norm}.bias": (h,)}
        shapes |= {f"{start}layer_scale{index}.lambda1": (h,) for index in (1, 2)}
        for name, size in linears.items():
            shapes |= {f"{start}{name}.weight": size, f"{start}{name}.bias": size[:1]}
    return shapes | {"layernorm.weight": (h,), "layernorm.bias": (h,)}


def is_packable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a released tensor, under any prefix, is the weight of a linear that can be packed."""
    return LAYER in name and name.endswith(".weight") and len(shape) == 2


def load(source: Source, config: Dinov2Config, execution: Execution, bits: int) -> nn.Module:
    """Loads transformers' network, created on the meta device and filled tensor by tensor.

    `bits` 8 packs unquantized linears while loading; packed ones stay packed.

    Raises: UserError: without transformers.
    """
    with torch.device("meta"):
        network = _network(config)
    network.embeddings.mask_token = None
    inner = as_installed(source, network.state_dict().keys())
    return fill(lambda: network, inner, execution, bits=bits, ignored=(MASK,))


def _network(config: Dinov2Config) -> Any:
    try:
        from transformers import Dinov2Config as PlainConfig
        from transformers import Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise UserError(f"transformers lacks {error.name}; {NEEDED}") from error
        raise UserError(f"transformers is not installed; {NEEDED}") from error
    except (ImportError, RuntimeError) as error:  # too old, or its dependencies do not fit
        raise UserError(f"transformers does not work ({one_line(error)}); {NEEDED}") from error
    settings = config.settings() | {"attn_implementation": "sdpa"}
    if config.registers:
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings))
    return Dinov2Model(PlainConfig(**settings))


def as_installed(source: Source, wanted: Set[str]) -> Source:
    """The released tensors, packed ones included, under the installed transformers' names."""
    reads: dict[str, Callable[[], Tensor]] = {}
    shapes, layouts = {}, {}
    for name, shape in source.shapes.items():
        names = [name]
        if found := _OWNED.fullmatch(name):
            start, owner, leaf = found.groups()
            owners = RENAMED.get(owner, ())
            if all(f"{start}{new}.weight" in wanted for new in owners):
                names = [f"{start}{new}.{leaf}" for new in owners] or names
        whole: Callable[[], Tensor] = partial(source.read, name)
        each = [whole] if len(names) == 1 else in_parts(whole, len(names))
        for new, read in zip(names, each, strict=True):
            reads[new] = read
            linear, _, stored = name.rpartition(".weight.")
            if (layout := source.layouts.get(linear)) and stored == layout.codes:
                layouts[new.rpartition(".weight.")[0]] = layout
            shapes[new] = shape if len(names) == 1 else (shape[0] // len(names), *shape[1:])
    return Source(source.label, source.config, shapes, lambda name: reads[name](), layouts)


def from_hub(weights: Weights) -> Weights:
    """A torch-hub file's tensors (facebookresearch/dinov2) by released name, q, k, v split."""
    names = {
        "cls_token": "embeddings.cls_token",
        "mask_token": MASK,
        "pos_embed": "embeddings.position_embeddings",
        "register_tokens": "embeddings.register_tokens",
        "norm": "layernorm",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "mlp.w12": "mlp.weights_in",
        "mlp.w3": "mlp.weights_out",
    }
    stored: dict[str, StoredTensor] = {}
    for name, entry in weights.stored.items():
        start, inner = "", name
        if name.startswith("blocks."):
            index, inner = name.removeprefix("blocks.").split(".", 1)
            start = f"{LAYER}{index}."
        owner, _, leaf = inner.rpartition(".")
        if owner == "attn.qkv":
            shape = (entry.shape[0] // 3, *entry.shape[1:])
            for role, read in zip(("query", "key", "value"), in_parts(entry.read, 3), strict=True):
                full = f"{start}attention.attention.{role}.{leaf}"
                stored[full] = StoredTensor(shape, entry.dtype, read, entry.file)
        elif inner in names:
            stored[start + names[inner]] = entry
        else:
            stored[f"{start}{names.get(owner, owner)}.{leaf}"] = entry
    return Weights(weights.files, stored)


def in_parts(read: Callable[[], Tensor], count: int) -> list[Callable[[], Tensor]]:
    """Readers of `count` equal row blocks of a tensor, which share one read: the other blocks are
    kept in memory until they are read. Reading a block twice reads the tensor again."""
    waiting: dict[int, Tensor] = {}

    def rows_of(index: int) -> Tensor:
        if index not in waiting:
            waiting.update(enumerate(rows.clone() for rows in read().chunk(count)))
        return waiting.pop(index)

    return [partial(rows_of, index) for index in range(count)]
