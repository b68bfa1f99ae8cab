"""Architectures, torch-free: a network's hyper-parameters and the tensors that follow from them.

    architecture = architecture_from_json(header["network"])
    architecture.linears()["double_blocks.0.img_attn.qkv"].out

A new network kind is a subclass of `Architecture`, listed in ARCHITECTURES, and its modules in
`vitapack.runtime.networks`. Tensor names are those of the modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from vitapack.runtime.format.checks import (
    Check,
    expect,
    expect_choice,
    expect_keys,
    expect_object,
    is_count,
    is_flag,
    is_indices,
    is_positive,
)
from vitapack.runtime.format.layermap import BLOCK_FIELDS


@dataclass(frozen=True)
class Linear:
    """Sizes of one linear, and its role in the network."""

    out: int
    inputs: int
    bias: bool
    role: str  # "block", "modulation", "time" or "edge" (input and output of the network)


@dataclass(frozen=True)
class TimeEmbedding:
    """Hyper-parameters of the embedding of a time or guidance value as a modulation vector."""

    channels: int  # of the sinusoid: 256 (Hunyuan3D) or the hidden size (Step1X-3D)
    hidden: int  # of the MLP's hidden layer: the hidden size of the network, or 4x of it
    scale: float  # multiplies t: 1000 for t in 0..1, 1 for t in 0..1000
    max_period: float  # 1000 in Hunyuan3D (its code passes time_factor as max_period), else 10000
    cos_first: bool
    activation: str  # "silu" or "gelu" (exact)

    CHECKS: ClassVar[Mapping[str, Check]] = {
        "channels": (is_count, "a size"),
        "hidden": (is_count, "a size"),
        "scale": (is_positive, "a number > 0"),
        "max_period": (is_positive, "a number > 0"),
        "cos_first": (is_flag, "true or false"),
        "activation": (lambda v: v in ("silu", "gelu"), "'silu' or 'gelu'"),
    }

    @classmethod
    def from_json(cls, data: Any) -> TimeEmbedding:
        """Raises ValueError naming the wrong field."""
        _check_fields("network time", data, cls.CHECKS)
        return cls(**data)

    def linears(self, name: str, out: int) -> dict[str, Linear]:
        """The embedding's two linears as module `name`."""
        return {
            f"{name}.in_layer": Linear(self.hidden, self.channels, True, "time"),
            f"{name}.out_layer": Linear(out, self.hidden, True, "time"),
        }


@dataclass(frozen=True)
class Architecture:
    """Hyper-parameters of one (possibly pruned) network; subclasses add theirs.

    Blocks are lists of ORIGINAL indices in ascending order, one field per block kind
    (`BLOCK_FIELDS`): pruning shortens a list and renumbers nothing. Raises ValueError for
    impossible values.
    """

    kind: ClassVar[str]
    block_kinds: ClassVar[tuple[str, ...]]  # in the order in which they run
    CHECKS: ClassVar[Mapping[str, Check]]  # by field, in addition to those common to all

    in_channels: int
    cond_channels: int
    hidden: int
    heads: int
    mlp_ratio: float
    time: TimeEmbedding

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        if not 0 < self.mlp_ratio <= 64:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}; expected above 0, at most 64")
        for kind, kept in self.blocks_by_kind().items():
            if list(kept) != sorted(set(kept)) or any(index < 0 for index in kept):
                raise ValueError(
                    f"{BLOCK_FIELDS[kind]} {kept} must be ascending distinct original indices"
                )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden * self.mlp_ratio)

    @property
    def embeds_guidance(self) -> bool:
        """Whether guidance is an input of the network, which replaces the unconditional pass."""
        return False

    @property
    def has_edges(self) -> bool:
        """Whether the network has the linears from latents to tokens and back; SLAT has not."""
        return True

    def blocks_by_kind(self) -> dict[str, tuple[int, ...]]:
        """Original indices of the kept blocks, in the order in which they run."""
        return {kind: getattr(self, BLOCK_FIELDS[kind]) for kind in self.block_kinds}

    def with_blocks(self, kept: Mapping[str, tuple[int, ...]]) -> Any:
        """The same architecture with only these blocks, given by kind."""
        lists: dict[str, Any] = {BLOCK_FIELDS[kind]: tuple(kept[kind]) for kind in kept}
        return replace(self, **lists)

    def linears(self) -> dict[str, Linear]:
        """Every linear by name, in model order."""
        raise NotImplementedError

    def norms(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors that belong to no linear, by name."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The JSON object in packed headers and vitality tables."""
        lists = {BLOCK_FIELDS[kind]: list(kept) for kind, kept in self.blocks_by_kind().items()}
        return {"kind": self.kind, **asdict(self), **lists}


@dataclass(frozen=True, kw_only=True)
class DiTConfig(Architecture):
    """The double/single-block DiT of Hunyuan3D and Step1X-3D (networks/dit.py)."""

    kind: ClassVar[str] = "double-single-dit"
    block_kinds: ClassVar[tuple[str, ...]] = ("double", "single")
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "in_channels": (is_count, "a size"),
        "qkv_bias": (is_flag, "true or false"),
        "guidance_embed": (is_flag, "true or false"),
    }

    double_blocks: tuple[int, ...]
    single_blocks: tuple[int, ...]
    qkv_bias: bool
    guidance_embed: bool

    @property
    def embeds_guidance(self) -> bool:
        return self.guidance_embed

    @property
    def clips(self) -> bool:
        """Whether token streams are clipped to fp16's range when running in fp16.

        Step1X-3D's reference implementation does this, Hunyuan3D's does not; without it one
        overflow is NaN everywhere a layer later. The two are told apart by the activation of the
        time MLP, which the packed format stores.
        """
        return self.time.activation == "gelu"

    def linears(self) -> dict[str, Linear]:
        h, wide = self.hidden, self.mlp_hidden
        linears = {
            "latent_in": Linear(h, self.in_channels, True, "edge"),
            "cond_in": Linear(h, self.cond_channels, True, "edge"),
        }
        for name in ("time_in", "guidance_in") if self.guidance_embed else ("time_in",):
            linears |= self.time.linears(name, h)
        for index in self.double_blocks:
            for stream in ("img", "txt"):
                name = f"double_blocks.{index}.{stream}"
                linears[f"{name}_mod.lin"] = Linear(6 * h, h, True, "modulation")
                linears[f"{name}_attn.qkv"] = Linear(3 * h, h, self.qkv_bias, "block")
                linears[f"{name}_attn.proj"] = Linear(h, h, True, "block")
                linears[f"{name}_mlp.0"] = Linear(wide, h, True, "block")
                linears[f"{name}_mlp.2"] = Linear(h, wide, True, "block")
        for index in self.single_blocks:
            name = f"single_blocks.{index}"
            linears[f"{name}.linear1"] = Linear(3 * h + wide, h, True, "block")
            linears[f"{name}.linear2"] = Linear(h, h + wide, True, "block")
            linears[f"{name}.modulation.lin"] = Linear(3 * h, h, True, "modulation")
        linears["final_layer.linear"] = Linear(self.in_channels, h, True, "edge")
        linears["final_layer.adaLN_modulation.1"] = Linear(2 * h, h, True, "modulation")
        return linears

    def norms(self) -> dict[str, tuple[int, ...]]:
        attentions = [
            f"double_blocks.{index}.{stream}_attn"
            for index in self.double_blocks
            for stream in ("img", "txt")
        ]
        attentions += [f"single_blocks.{index}" for index in self.single_blocks]
        return {
            f"{name}.norm.{side}_norm.scale": (self.head_dim,)
            for name in attentions
            for side in ("query", "key")
        }


@dataclass(frozen=True, kw_only=True)
class FlowConfig(Architecture):
    """The flow transformer of TRELLIS (networks/flow.py)."""

    kind: ClassVar[str] = "flow-transformer"
    block_kinds: ClassVar[tuple[str, ...]] = ("block",)
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "in_channels": (lambda v: type(v) is int and 0 <= v <= 1024, "0..1024"),
        "resolution": (lambda v: type(v) is int and 0 <= v <= 1024, "0..1024"),
        "patch": (lambda v: type(v) is int and 1 <= v <= 16, "1..16"),
    }

    # resolution and in_channels are those of the latent cube; both 0 for blocks alone (SLAT)
    resolution: int
    patch: int  # cells per side of one token
    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution % self.patch:
            raise ValueError(f"resolution {self.resolution} is not a multiple of {self.patch}")

    @property
    def token_channels(self) -> int:
        return self.in_channels * self.patch**3

    @property
    def has_edges(self) -> bool:
        return self.in_channels > 0

    def linears(self) -> dict[str, Linear]:
        h, wide, token = self.hidden, self.mlp_hidden, self.token_channels
        linears = {"latent_in": Linear(h, token, True, "edge")} if self.has_edges else {}
        linears |= self.time.linears("time_in", h)
        for index in self.blocks:
            name = f"blocks.{index}"
            linears[f"{name}.mod.lin"] = Linear(6 * h, h, True, "modulation")
            linears[f"{name}.self_attn.qkv"] = Linear(3 * h, h, True, "block")
            linears[f"{name}.self_attn.proj"] = Linear(h, h, True, "block")
            linears[f"{name}.cross_attn.q"] = Linear(h, h, True, "block")
            linears[f"{name}.cross_attn.kv"] = Linear(2 * h, self.cond_channels, True, "block")
            linears[f"{name}.cross_attn.proj"] = Linear(h, h, True, "block")
            linears[f"{name}.mlp.0"] = Linear(wide, h, True, "block")
            linears[f"{name}.mlp.2"] = Linear(h, wide, True, "block")
        if self.has_edges:
            linears["final_layer.linear"] = Linear(token, h, True, "edge")
        return linears

    def norms(self) -> dict[str, tuple[int, ...]]:
        norms: dict[str, tuple[int, ...]] = {}
        for index in self.blocks:
            name = f"blocks.{index}"
            for side in ("query", "key"):
                norms[f"{name}.self_attn.norm.{side}_norm.scale"] = (self.heads, self.head_dim)
            norms |= {f"{name}.cross_norm.{leaf}": (self.hidden,) for leaf in ("weight", "bias")}
        return norms


ARCHITECTURES: dict[str, type[Architecture]] = {cls.kind: cls for cls in (DiTConfig, FlowConfig)}

_COMMON: Mapping[str, Check] = {
    "cond_channels": (is_count, "a size"),
    "hidden": (is_count, "a size"),
    "heads": (is_count, "a count"),
    "mlp_ratio": (lambda v: is_positive(v) and v <= 64, "a number in 0..64"),
    "time": (lambda v: isinstance(v, dict), "an object"),
}


def architecture_from_json(data: Any) -> Any:
    """Reads an `Architecture` of any kind. Raises ValueError naming the wrong field."""
    expect_object("network", data)
    expect_choice("network kind", data.get("kind"), tuple(ARCHITECTURES))
    cls = ARCHITECTURES[data["kind"]]
    lists = {
        BLOCK_FIELDS[kind]: (is_indices, "ascending original indices") for kind in cls.block_kinds
    }
    values = {name: value for name, value in data.items() if name != "kind"}
    _check_fields("network", values, {**_COMMON, **cls.CHECKS, **lists})
    time = TimeEmbedding.from_json(data["time"])
    if data["hidden"] % data["heads"] or time.channels % 2:
        raise ValueError(
            f"network: hidden {data['hidden']} must be a multiple of heads {data['heads']}, "
            f"and time channels {time.channels} even"
        )
    return cls(**values | {name: tuple(values[name]) for name in lists} | {"time": time})


def _check_fields(label: str, data: Any, checks: Mapping[str, Check]) -> None:
    expect_keys(label, expect_object(label, data), tuple(checks))
    for name, check in checks.items():
        expect(f"{label} {name}", data[name], *check)
