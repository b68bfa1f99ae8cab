"""Weight layouts: how the weight of one linear is stored. Needs no torch.

    layout = LAYOUTS["w4-b64-g32-v1"]
    layout.tensors(4096, 1024)    # {"q4": ("U8", (4096, 512)), "group": ..., "scale": ...}

Every packed layout expands exactly to int8: w = scale[n] * w8[n, k], with w8 the code itself or, in
groups of inputs, s * (code - z) with small integers s and z. docs/format.md specifies the bytes.
A layout is data. weights.py packs and expands it in plain PyTorch, which also serves layouts that
no fast kernel reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ITEM_BYTES = {"I8": 1, "U8": 1, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class WeightLayout:
    """One layout, for linears of N outputs (channels) and K inputs."""

    id: str  # as in packed files; another byte order needs another id
    bits: int  # per weight, without scales
    codes: str = ""  # name of the tensor of codes, which implies their byte order; "": plain floats
    dtype: str = ""  # of the tensor of codes
    block: int = 1  # inputs packed together; rows are padded to whole blocks
    group: int = 0  # inputs that share one byte of s and z; 0: no groups
    kernels: tuple[str, ...] = ()  # fast kernels that read it: "cpu" (csrc/int8), "triton"

    @property
    def packed(self) -> bool:
        return bool(self.codes)

    @property
    def name(self) -> str:
        """For messages: "int8", "int4 group 32"."""
        if not self.packed:
            return "float"
        return f"int{self.bits}" + (f" group {self.group}" if self.group else "")

    @property
    def largest(self) -> int:
        """The largest code: codes lie in 0..largest in groups, else in -largest..largest."""
        return 2**self.bits - 1 if self.group else 2 ** (self.bits - 1) - 1

    def padded(self, k: int) -> int:
        """K rounded up to whole blocks."""
        return -(-k // self.block) * self.block

    def groups(self, k: int) -> int:
        """Groups per row, the padded inputs included. 0 without groups."""
        return -(-self.padded(k) // self.group) if self.group else 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors of a packed weight."""
        return (self.codes, "group", "scale") if self.group else (self.codes, "scale")

    def tensors(self, n: int, k: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors of a packed weight: name -> (dtype, shape)."""
        specs = {
            self.codes: (self.dtype, (n, self.padded(k) * self.bits // 8)),
            "group": ("U8", (n, self.groups(k))),
            "scale": ("F32", (n,)),
        }
        return {name: specs[name] for name in self.names}

    def stored(
        self, weight: str, n: int, k: int, floats: str = "F16"
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors in a packed file of the weight named `weight` ("double_blocks.0.x.weight").

        `floats`: dtype of a weight that is not packed."""
        if not self.packed:
            return {weight: (floats, (n, k))}
        return {f"{weight}.{name}": spec for name, spec in self.tensors(n, k).items()}

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of the weight with its scales; plain floats count as F16."""
        specs = self.stored("weight", n, k).values()
        return sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in specs)


BOTH = ("cpu", "triton")
W16 = WeightLayout("w16-v1", 16)
W8 = WeightLayout("w8-c-v1", 8, "q8", "I8", kernels=BOTH)
W4 = tuple(
    WeightLayout(f"w4-b64-g{group}-v1", 4, "q4", "U8", block=64, group=group, kernels=BOTH)
    for group in (32, 64, 128)
)
LAYOUTS = {layout.id: layout for layout in (W16, W8, *W4)}


def layout_for(bits: int, group: int) -> WeightLayout:
    """The layout of `bits` bits that has no groups, or groups of `group` inputs.

    Raises KeyError if there is none."""
    for layout in LAYOUTS.values():
        if layout.bits == bits and layout.group in (0, group):
            return layout
    raise KeyError(f"no layout of {bits} bits in groups of {group}")
