"""Packed weights in plain PyTorch: packing, and exact expansion to int8.

    weight = PackedWeight(layout, {"q4": q4, "group": group, "scale": scale}, in_features=1024)
    expand(weight)          # int8 (N, K), exact
    dequantize(weight)      # float32 (N, K)

Every layout expands EXACTLY to int8: w8 = s * (code - z) with small integers s and z per group. The
one float scale per output channel is applied after the product (QServe's idea). So an int8 GEMM
serves all bit widths, and the integer part of every path is exact, bit for bit.

Codes by tensor name: "q8" is int8 (N, K). "q4" is uint8 (N, Kp/2), Kp = K rounded up to a multiple
of 64; within each block of 64 inputs, byte j holds input j in its low nibble and input j + 32 in
its high nibble. "group" is uint8 (N, ceil(Kp / G)): high nibble s - 1, low nibble z.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitapack.kernels.linear.layouts import LAYOUTS, W8, WeightLayout

INT8_MAX = 127  # -128 is never used, so negation is safe in every kernel
NIBBLE_BLOCK = 64  # inputs interleaved in 32 bytes of q4
DTYPES = {"I8": torch.int8, "U8": torch.uint8, "F32": torch.float32}


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight (N, K) in its layout: the tensors of the packed file, unchanged."""

    layout: WeightLayout
    tensors: Mapping[str, Tensor]  # by name, see WeightLayout.tensors
    in_features: int  # K: rows of codes may be padded

    @property
    def codes(self) -> Tensor:
        return self.tensors[self.layout.codes]

    @property
    def group(self) -> Tensor | None:
        return self.tensors.get("group")

    @property
    def scale(self) -> Tensor:
        """float32 (N,)"""
        return self.tensors["scale"]

    @property
    def out_features(self) -> int:
        return self.scale.shape[0]

    def checked(self) -> PackedWeight:
        """Returns self. Raises ValueError unless the tensors match the layout."""
        expected = self.layout.tensors(self.tensors["scale"].shape[0], self.in_features)
        if sorted(self.tensors) != sorted(expected):
            raise ValueError(
                f"a weight in {self.layout.id} holds {', '.join(expected)}; "
                f"found {', '.join(self.tensors)}"
            )
        for name, (dtype, shape) in expected.items():
            tensor = self.tensors[name]
            if tensor.dtype != DTYPES[dtype] or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} in {self.layout.id}: expected {DTYPES[dtype]} {shape}, "
                    f"found {tensor.dtype} {tuple(tensor.shape)}"
                )
        return self

    def to(self, device: torch.device | str) -> PackedWeight:
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return PackedWeight(self.layout, moved, self.in_features)

    def flat(self) -> tuple[list[Tensor], str]:
        """As arguments of torch.library operators; `unflat` is the inverse."""
        return [self.tensors[name] for name in self.layout.names], self.layout.id

    @classmethod
    def unflat(cls, tensors: Sequence[Tensor], layout: str, in_features: int) -> PackedWeight:
        """From tensors in the order of `WeightLayout.names`; `layout` is an id."""
        known = LAYOUTS[layout]
        return cls(known, dict(zip(known.names, tensors, strict=True)), in_features)


def int8_weight(codes: Tensor, scale: Tensor) -> PackedWeight:
    """A packed weight of int8 codes (N, K) and float32 channel scales (N,)."""
    return PackedWeight(W8, {"q8": codes, "scale": scale}, codes.shape[1])


def pack_int4(codes: Tensor) -> Tensor:
    """Packs codes 0..15, uint8 (N, Kp) with Kp a multiple of 64, to bytes (N, Kp/2)."""
    if codes.dtype != torch.uint8 or codes.ndim != 2 or codes.shape[1] % NIBBLE_BLOCK:
        raise ValueError(
            f"int4 codes must be uint8 (N, multiple of {NIBBLE_BLOCK}), "
            f"found {codes.dtype} {tuple(codes.shape)}"
        )
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"int4 codes must lie in 0..15, found {int(codes.max())}")
    low, high = codes.unflatten(1, (-1, 2, NIBBLE_BLOCK // 2)).unbind(2)
    return (low | (high << 4)).flatten(1)


def unpack_int4(packed: Tensor) -> Tensor:
    """Unpacks bytes (N, Kp/2) to codes 0..15, uint8 (N, Kp). The inverse of `pack_int4`."""
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] % (NIBBLE_BLOCK // 2):
        raise ValueError(
            f"packed int4 must be uint8 (N, multiple of {NIBBLE_BLOCK // 2}), "
            f"found {packed.dtype} {tuple(packed.shape)}"
        )
    halves = packed.unflatten(1, (-1, NIBBLE_BLOCK // 2))
    return torch.stack([halves & 15, halves >> 4], dim=2).flatten(1)


def pack_group(s: Tensor, z: Tensor) -> Tensor:
    """Packs each group scale s in 1..16 and zero point z in 0..15 into one byte."""
    return ((s - 1).to(torch.uint8) << 4) | z.to(torch.uint8)


def unpack_group(group: Tensor) -> tuple[Tensor, Tensor]:
    """Unpacks group bytes to (s, z), uint8. The inverse of `pack_group`."""
    return (group >> 4) + 1, group & 15


# By name of the tensor of codes: (N, Kp) codes to bytes, and back.
PACK: dict[str, Callable[[Tensor], Tensor]] = {"q8": lambda codes: codes, "q4": pack_int4}
UNPACK: dict[str, Callable[[Tensor], Tensor]] = {"q8": lambda codes: codes, "q4": unpack_int4}


def from_codes(
    layout: WeightLayout,
    in_features: int,
    codes: Tensor,
    scale: Tensor,
    group: Tensor | None = None,
) -> PackedWeight:
    """Packs codes (N, Kp), padded to whole blocks; `group` (N, groups) if the layout has groups."""
    tensors = {layout.codes: PACK[layout.codes](codes), "group": group, "scale": scale}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return PackedWeight(layout, present, in_features)


def expand(weight: PackedWeight) -> Tensor:
    """The exact int8 weight (N, K). Raises ValueError unless the tensors match the layout.

    Values beyond +-127, which no quantizer writes, wrap around as in every kernel; `check` rejects
    them.
    """
    return _expanded(weight, torch.int8)[:, : weight.in_features].contiguous()


def dequantize(weight: PackedWeight) -> Tensor:
    """The dequantized weight, float32 (N, K)."""
    return expand(weight).float() * weight.scale[:, None]


def check(weight: PackedWeight) -> None:
    """Raises ValueError unless every weight expands into [-127, 127] and the padding to 0."""
    wide, name = _expanded(weight, torch.int16), weight.layout.name
    if wide.numel() and int(wide.abs().max()) > INT8_MAX:
        raise ValueError(f"a weight in {name} expands to {int(wide.abs().max())}, beyond 127")
    if wide[:, weight.in_features :].any():
        raise ValueError(f"the padding of a weight in {name} does not expand to 0")


def _expanded(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """s * (code - z), (N, Kp)."""
    layout = weight.checked().layout
    codes = UNPACK[layout.codes](weight.codes).to(dtype)
    if weight.group is None:
        return codes
    s, z = (
        values.to(dtype).repeat_interleave(layout.group, 1)[:, : codes.shape[1]]
        for values in unpack_group(weight.group)
    )
    return (codes - z) * s
