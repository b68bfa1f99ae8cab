"""Weight layouts: how the weight of one linear is stored."""

from __future__ import annotations

from typing import Any

from vitapack.runtime.format.architecture import Linear

# Layout ids, one per linear. A change of byte order gets a new id, never a new meaning.
W16, W8 = "w16-v1", "w8-c-v1"


W4 = {group: f"w4-b64-g{group}-v1" for group in (32, 64, 128)}


BITS_OF = {W16: 16, W8: 8, **{layout: 4 for layout in W4.values()}}


GROUP_OF = {layout: group for group, layout in W4.items()}


def weight_tensors(name: str, linear: Linear, layout: str, rest: str) -> dict[str, Any]:
    """The tensors that hold one linear's weight: name -> (dtype, shape)."""
    n, k = linear.out, linear.inputs
    if layout == W16:
        return {f"{name}.weight": (rest, (n, k))}
    if layout == W8:
        codes = {f"{name}.weight.q8": ("I8", (n, k))}
    else:
        padded, group = -(-k // 64) * 64, GROUP_OF[layout]
        codes = {
            f"{name}.weight.q4": ("U8", (n, padded // 2)),
            f"{name}.weight.group": ("U8", (n, -(-padded // group))),
        }
    return codes | {f"{name}.weight.scale": ("F32", (n,))}
