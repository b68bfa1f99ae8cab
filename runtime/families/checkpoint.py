"""An original checkpoint as the other rooms see it: configuration, names, shapes, tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitapack.runtime.engines.choose import network_of
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.format.architecture import Architecture
from vitapack.runtime.format.container import NO_DIGEST
from vitapack.runtime.format.header import PARTS
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.loading.checkpoint_files import Weights, dtype_name, first_names
from vitapack.runtime.loading.source import Source


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One original checkpoint: everything but the tensors, which are read one by one.

    `part` is "shape_decoder" or "conditioner"; the network has methods of its own.
    """

    family: str
    variant: str  # "hunyuan3d-2mini-turbo": the released model's name, if it is one
    path: Path  # as given by the user
    config: Any  # an Architecture
    sampler: SamplerDefaults
    latents: tuple[int, ...] | None  # tokens, channels; None if only the DiT is present
    decoder: Any  # the family's decoder config (ShapeDecoderConfig, ...); None if unknown
    scale_factor: float | None  # the DiT's latents are the autoencoder's times this
    weights: Weights  # names "model.<canonical>", "vae.<...>", "conditioner.<...>"
    ignored: tuple[str, ...] = ()  # tensors that are deliberately not used
    unknown: tuple[str, ...] = ()  # unknown settings, assumed to be harmless
    sections: Mapping[str, Any] = field(default_factory=dict)  # of config.yaml

    def names(self) -> list[str]:
        """The network's tensors, by canonical name."""
        return self._names("model")

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(f"model.{name}")

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.dtype(f"model.{name}")

    def tensor(self, name: str) -> Tensor:
        """A tensor of the network in its stored dtype. Raises: FormatError: for NaN or infinity."""
        return self.weights.read(f"model.{name}")

    def part_config(self, part: str) -> dict[str, Any]:
        """`params` of the part's section in config.yaml, {} if it has none; JSON values."""
        section = self.sections.get(PARTS[part])
        return dict((section or {}).get("params") or {})

    def part_shapes(self, part: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """safetensors dtype name and shape of each of the part's tensors, by name."""
        prefix = PARTS[part]
        return {
            name: (
                dtype_name(self.weights.dtype(f"{prefix}.{name}")),
                self.weights.shape(f"{prefix}.{name}"),
            )
            for name in self._names(prefix)
        }

    def part_tensor(self, part: str, name: str) -> Tensor:
        """A tensor of a part in its stored dtype. Raises: FormatError: for NaN or infinity."""
        return self.weights.read(f"{PARTS[part]}.{name}")

    def network(self) -> Source:
        """The network's tensors."""
        shapes = {name: self.shape(name) for name in self.names()}
        return Source(str(self.path), {}, shapes, self.tensor)

    def component(self, part: str) -> Source:
        """The part's settings and tensors. Raises: UserError: if the checkpoint lacks the part."""
        shapes = {name: shape for name, (_, shape) in self.part_shapes(part).items()}
        if not shapes:
            raise UserError(f"{self.path} ({self.variant}) holds no {part.replace('_', ' ')}")
        return Source(
            str(self.path), self.part_config(part), shapes, partial(self.part_tensor, part)
        )

    def parameters(self, part: str | None = None) -> int:
        """Number of weights and biases of the network, or of a part."""
        shapes = (
            [self.shape(name) for name in self.names()]
            if part is None
            else [shape for _, shape in self.part_shapes(part).values()]
        )
        return sum(math.prod(shape) for shape in shapes)

    def source(self, hashed: bool) -> dict[str, Any]:
        """{"name", "sha256", "bytes"} of the weights; the digest is zeros unless `hashed`, which
        reads all files. Shards count as one file, in the order of their names.
        """
        files = self.weights.files
        digest = hashlib.sha256()
        for path in files if hashed else ():
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return {
            "name": files[0].name if len(files) == 1 else self.path.name,
            "sha256": digest.hexdigest() if hashed else NO_DIGEST,
            "bytes": sum(path.stat().st_size for path in files),
        }

    def _names(self, prefix: str) -> list[str]:
        start, ignored = f"{prefix}.", set(self.ignored)
        return [n[len(start) :] for n in self.weights if n.startswith(start) and n not in ignored]


def shapes_of(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's tensors; allocates nothing."""
    with torch.device("meta"):
        module = build()
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def network_shapes(config: Architecture) -> dict[str, tuple[int, ...]]:
    return shapes_of(lambda: network_of(config))


def check_part(
    weights: Weights,
    part: str,
    expected: Mapping[str, tuple[int, ...]],
    path: Path,
    ignored: Iterable[str] = (),
) -> None:
    """Raises FormatError unless the part's floating-point tensors are exactly the expected ones.

    The message counts the missing, the unexpected and the misshaped, and names the first of each.
    """
    prefix, skip = f"{part}.", set(ignored)
    found = {n[len(prefix) :]: n for n in weights if n.startswith(prefix) and n not in skip}
    missing = [prefix + name for name in expected if name not in found]
    unexpected = [full for name, full in found.items() if name not in expected]
    misshaped = [
        f"{full} {list(weights.shape(full))}, expected {list(expected[name])}"
        for name, full in found.items()
        if name in expected and weights.shape(full) != tuple(expected[name])
    ]
    whole = [f for f in found.values() if not weights.dtype(f).is_floating_point]
    problems = [
        f"{problem}: {first_names(names)}"
        for problem, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshaped),
            ("not floating point", whole),
        )
        if names
    ]
    if problems:
        raise FormatError(
            f"{path}: the {part}.* tensors do not fit its configuration; {'; '.join(problems)}"
        )
