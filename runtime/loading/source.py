"""Where the tensors of an image encoder or a shape decoder come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitapack.runtime.errors import UserError
from vitapack.runtime.format.header import PARTS, PackedHeader
from vitapack.runtime.format.reader import TensorReader

Q8, SCALE = ".weight.q8", ".weight.scale"


@dataclass(frozen=True)
class Source:
    """A part's settings and tensors, read one by one."""

    where: str  # for messages
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    def below(self, prefix: str) -> Source:
        """The tensors whose names start so, without that start."""
        names = {n.removeprefix(prefix): n for n in self.shapes if n.startswith(prefix)}
        shapes = {name: self.shapes[full] for name, full in names.items()}
        return Source(self.where, self.config, shapes, lambda name: self.read(names[name]))

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Shapes as the unpacked network has them."""
        return {
            n.replace(Q8, ".weight"): s for n, s in self.shapes.items() if not n.endswith(SCALE)
        }


def packed_part(
    header: PackedHeader, part: str, original: Callable[[str], Source] | None
) -> Source:
    """The component inside a packed file, else `original(part)` of the file it refers to.

    Raises UserError where neither is there.
    """
    entry = getattr(header, part)
    if entry["storage"] != "embedded":
        if original is not None:
            return original(part)
        what = entry["source"]["name"] if entry["source"] else "an original checkpoint"
        raise UserError(
            f"{header.path} does not hold the {part.replace('_', ' ')}; give the folder of {what} "
            "with --parts, or compress again with --embed"
        )
    prefix = f"{PARTS[part]}."
    shapes = {
        name.removeprefix(prefix): info.shape
        for name, info in header.tensors.items()
        if name.startswith(prefix)
    }

    def read(name: str) -> Tensor:
        with TensorReader(header, "cpu") as reader:
            return reader.read(prefix + name)

    return Source(str(header.path), entry["config"], shapes, read)
