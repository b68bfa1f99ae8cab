"""DINOv2 as the published models condition on it: giant (SwiGLU) and large with registers.

    encoder = Dinov2(config_from_shapes(shapes))
    tokens = encoder(images)                     # (B, 1 + registers + patches, h), normalised

Tensor names are those of released Hugging Face files (`Dinov2Model`), below any prefix; torch-hub
files are mapped by `from_hub`. It is written out here, checked against transformers' outputs,
because a lean process cannot carry that package: its import takes seconds, and its names changed.
Every hyper-parameter shows in a shape, so no configuration file is needed either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitapack.runtime.errors import FormatError
from vitapack.runtime.weights import Stored, Weights

HEAD = 64  # channels of a head in every released size
LAYER = "encoder.layer.0"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pictures in 0..1


@dataclass(frozen=True)
class Dinov2Config:
    hidden: int
    layers: int
    heads: int
    patch: int  # pixels a side
    places: int  # patches a side of the stored position table: 37 for 518 px
    registers: int
    wide: int  # inner channels of the MLP
    swiglu: bool


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], where: str) -> Dinov2Config:
    """From the tensors' shapes. FormatError where they are no DINOv2."""

    def shape(name: str, dims: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None or len(found) != dims or 0 in found:
            raise FormatError(
                f"{where}: the image encoder should be a DINOv2; {name} is "
                f"{'missing' if found is None else list(found)}"
            )
        return found

    hidden, _, patch, _ = shape("embeddings.patch_embeddings.projection.weight", 4)
    table = shape("embeddings.position_embeddings", 3)[1] - 1
    places = round(table**0.5)
    layers = {name.split(".")[2] for name in shapes if name.startswith("encoder.layer.")}
    swiglu = f"{LAYER}.mlp.weights_in.weight" in shapes
    name = f"{LAYER}.mlp.weights_out.weight" if swiglu else f"{LAYER}.mlp.fc2.weight"
    if hidden % HEAD or places**2 != table or len(layers) > 1000:
        raise FormatError(
            f"{where}: an image encoder of {hidden} channels, {table} places, {len(layers)} "
            f"layers is no DINOv2 (heads have {HEAD} channels, places form a square)"
        )
    registers = shapes.get("embeddings.register_tokens")
    return Dinov2Config(
        hidden=hidden,
        layers=len(layers),
        heads=hidden // HEAD,
        patch=patch,
        places=places,
        registers=registers[1] if registers and len(registers) == 3 else 0,
        wide=shape(name, 2)[1],
        swiglu=swiglu,
    )


class Projections(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)


class Dense(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, hidden)


class Attention(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention = Projections(config.hidden)
        self.output = Dense(config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.attention
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (inner.query, inner.key, inner.value)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.output.dense(out)


class MLP(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden, config.wide)
        self.fc2 = nn.Linear(config.wide, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.weights_in = nn.Linear(config.hidden, 2 * config.wide)
        self.weights_out = nn.Linear(config.wide, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.weights_in(x).chunk(2, dim=-1)
        return self.weights_out(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(hidden))


class Layer(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden, eps=1e-6)
        self.attention = Attention(config)
        self.layer_scale1 = LayerScale(config.hidden)
        self.norm2 = nn.LayerNorm(config.hidden, eps=1e-6)
        self.mlp = SwiGLU(config) if config.swiglu else MLP(config)
        self.layer_scale2 = LayerScale(config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale1.lambda1 * self.attention(self.norm1(x))
        return x + self.layer_scale2.lambda1 * self.mlp(self.norm2(x))


class Embeddings(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + config.places**2, config.hidden))
        if config.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.registers, config.hidden))
        self.patch_embeddings = nn.ModuleDict(
            {"projection": nn.Conv2d(3, config.hidden, config.patch, config.patch)}
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), sides multiples of the patch, to [CLS | registers | patches]."""
        grid = self.patch_embeddings["projection"](images)
        batch, _, rows, columns = grid.shape
        x = torch.cat([self.cls_token.expand(batch, -1, -1), grid.flatten(2).transpose(1, 2)], 1)
        x = x + self.places(rows, columns)
        if self.config.registers:
            registers = self.register_tokens.expand(batch, -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        return x

    def places(self, rows: int, columns: int) -> Tensor:
        """The position table, interpolated for pictures of another size than it was learned at."""
        table, side = self.position_embeddings, self.config.places
        if rows == columns == side:
            return table
        grid = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
        grid = F.interpolate(
            grid,
            size=(rows, columns),
            mode="bicubic",
            antialias=bool(self.config.registers),  # as the two reference classes differ
        )
        return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


class Encoder(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.layers))


class Dinov2(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.layernorm = nn.LayerNorm(config.hidden, eps=1e-6)

    def forward(self, images: Tensor, normalise: bool = True) -> Tensor:
        """Normalised pictures (B, 3, H, W) to tokens (B, 1 + registers + patches, h).

        `normalise`: through the final LayerNorm, as everybody but TRELLIS takes them.
        """
        x = self.embeddings(images.to(self.embeddings.cls_token.dtype))
        for layer in self.encoder.layer:
            x = layer(x)
        return self.layernorm(x) if normalise else x


def from_hub(weights: Weights) -> Weights:
    """A torch-hub file (facebookresearch/dinov2) under the names above, q, k and v apart."""
    names = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
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
    stored: dict[str, Stored] = {}
    for name, entry in weights.stored.items():
        start, inner = "", name
        if name.startswith("blocks."):
            index, inner = name.removeprefix("blocks.").split(".", 1)
            start = f"encoder.layer.{index}."
        owner, _, leaf = inner.rpartition(".")
        if owner == "attn.qkv":
            for place, which in enumerate(("query", "key", "value")):
                full = f"{start}attention.attention.{which}.{leaf}"
                stored[full] = _third(entry, place)
        elif inner in names:
            stored[start + names[inner]] = entry
        else:
            stored[f"{start}{names.get(owner, owner)}.{leaf}"] = entry
    return Weights(weights.files, stored)


def _third(entry: Stored, place: int) -> Stored:
    shape = (entry.shape[0] // 3, *entry.shape[1:])
    return Stored(shape, entry.dtype, lambda: entry.read().chunk(3)[place].clone(), entry.file)
