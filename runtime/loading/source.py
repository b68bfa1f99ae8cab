"""Sources of tensors: the names, shapes, layouts and values with which a module is filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vitapack.kernels.linear.layouts import W8, WeightLayout
from vitapack.runtime.errors import UserError
from vitapack.runtime.format.header import PARTS, PackedHeader
from vitapack.runtime.format.reader import TensorReader


@dataclass(frozen=True)
class Source:
    """The stored tensors of one module, read one by one.

    `read(name)` returns a tensor in its stored dtype. It raises FormatError, naming file and
    tensor, if a float is not finite or a scale not above 0. `layouts` holds the layout of each
    packed linear by module name; all other tensors are floats.
    """

    label: str  # names the file or folder in messages
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    layouts: Mapping[str, WeightLayout] = field(default_factory=dict)

    def below(self, prefix: str) -> Source:
        """The tensors whose names start with `prefix`, with it removed."""
        names = {n.removeprefix(prefix): n for n in self.shapes if n.startswith(prefix)}
        return self.renamed(names)

    def renamed(self, names: Mapping[str, str]) -> Source:
        """A selection of the tensors under other names; `names` maps new to old."""
        linears = {
            new.removesuffix(f".weight.{self.layouts[linear].codes}"): self.layouts[linear]
            for new, old in names.items()
            for linear in [old.rpartition(".weight.")[0]]
            if linear in self.layouts and old == f"{linear}.weight.{self.layouts[linear].codes}"
        }
        shapes = {new: self.shapes[old] for new, old in names.items()}
        return Source(self.label, self.config, shapes, lambda name: self.read(names[name]), linears)

    def unpacked_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes with every packed weight as (N, K), where block layouts pad K."""
        shapes = dict(self.shapes)
        for linear, layout in self.layouts.items():
            rows, row_bytes = shapes[f"{linear}.weight.{layout.codes}"]
            for name in layout.names:
                del shapes[f"{linear}.weight.{name}"]
            shapes[f"{linear}.weight"] = rows, row_bytes * 8 // layout.bits
        return shapes


def packed_component(
    header: PackedHeader, component: str, original: Callable[[str], Source] | None
) -> Source:
    """Source of an embedded component, else `original(component)` for a referenced one.

    Raises UserError if the component is not embedded and `original` is None.
    """
    entry = getattr(header, component)
    if entry["storage"] != "embedded":
        if original is not None:
            return original(component)
        named = entry["source"]["name"] if entry["source"] else "an original checkpoint"
        raise UserError(
            f"{header.path} does not hold the {component.replace('_', ' ')}; give the folder of "
            f"{named} with --parts, or compress again with --embed"
        )
    prefix = f"{PARTS[component]}."
    shapes = {name: info.shape for name, info in header.tensors.items() if name.startswith(prefix)}
    # Components have one packed layout, recognised by the name of its codes (docs/format.md).
    suffix = f".weight.{W8.codes}"
    layouts = {n.removesuffix(suffix): W8 for n in shapes if n.endswith(suffix)}
    stored = Source(str(header.path), entry["config"], shapes, reading(header), layouts)
    return stored.below(prefix)


def reading(header: PackedHeader) -> Callable[[str], Tensor]:
    """`Source.read` for a packed file, which it opens for each tensor."""

    def read(name: str) -> Tensor:
        with TensorReader(header) as reader:
            return reader.read(name)

    return read
