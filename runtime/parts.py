"""Networks beside the DiT: where their tensors come from, and that they come only when needed.

source = part_of(checkpoint, "conditioner")         # or packed_part(header, "conditioner")
encoder = Part(lambda: ..., source.nbytes)
encoder()                                           # loads it the first time
encoder.free()
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from vitapack.kernels import cpu, reference
from vitapack.runtime.ahead import ahead
from vitapack.runtime.errors import UserError
from vitapack.runtime.linear import PackedLinear
from vitapack.runtime.memory import return_memory
from vitapack.runtime.packed import TensorReader
from vitapack.runtime.packed_header import PARTS, PackedHeader

if TYPE_CHECKING:  # families build their parts with this module
    from vitapack.runtime.families.checkpoint import Checkpoint

T = TypeVar("T")
Net = TypeVar("Net", bound=nn.Module)
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


class Part(Generic[T]):
    """A network that is loaded on first use and can be freed again.

    `nbytes` of weights, `working_bytes` of what a call holds beside them (see activations.py).
    """

    def __init__(self, load: Callable[[], T], nbytes: int, working_bytes: int = 0) -> None:
        self._load: Callable[[], T] | None = load
        self._coming: Callable[[], T] | None = None
        self._network: T | None = None
        self.nbytes, self.working_bytes = nbytes, working_bytes

    def __call__(self) -> T:
        if self._network is None:
            load, self._coming = self._coming or self._load, None
            assert load is not None
            self._network = load()
        return self._network

    def begin(self, device: str) -> None:
        """Has it loaded beside other work (ahead.py); calling it waits for that, and raises what
        went wrong."""
        if self._network is None and self._coming is None and self._load is not None:
            self._coming = ahead(self._load, device)

    @property
    def loaded(self) -> bool:
        return self._network is not None

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: the network itself, since a loader cannot travel."""
        return vars(self) | {"_load": None, "_coming": None, "_network": self()}

    def free(self) -> None:
        if self._load is None:
            return
        if self._coming is not None:
            with suppress(Exception):
                self._coming()
        self._network = self._coming = None
        gc.collect()
        return_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def part_of(checkpoint: Checkpoint, part: str) -> Source:
    """From an original checkpoint. UserError where it holds no such part."""
    shapes = {name: shape for name, (_, shape) in checkpoint.part_shapes(part).items()}
    if not shapes:
        raise UserError(
            f"{checkpoint.path} ({checkpoint.variant}) holds no {part.replace('_', ' ')}"
        )
    return Source(
        str(checkpoint.path),
        checkpoint.part_config(part),
        shapes,
        lambda name: checkpoint.part_tensor(part, name),
    )


def packed_part(header: PackedHeader, part: str, original: Checkpoint | None) -> Source:
    """From a packed file, or from the `original` that it refers to. UserError."""
    entry = getattr(header, part)
    if entry["storage"] != "embedded":
        if original is not None:
            return part_of(original, part)
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


def fill(
    make: Callable[[], Net],
    source: Source,
    dtype: torch.dtype,
    device: str | torch.device,
    bits: int = 16,
    ignored: tuple[str, ...] = (),
) -> Net:
    """A module made on the meta device and filled tensor by tensor, in eval mode.

    `bits` 8 packs the linears as they come (round to nearest, a scale a row), so that the module in
    `dtype` never exists as a whole; linears that are stored packed stay so in any case.
    UserError where tensors are missing, left over or of another shape.
    """
    with torch.device("meta"):
        module = make()
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {n: s for n, s in source.weights().items() if not n.startswith(ignored or ("\0",))}
    if wanted != found:
        odd = sorted(set(wanted.items()) ^ set(found.items()))
        raise UserError(
            f"{source.where}: the tensors do not fit {type(module).__name__}: {odd[0][0]} "
            f"{list(odd[0][1])} ({len(odd)} differ in all)"
        )
    for name, part in list(module.named_modules()):
        if not isinstance(part, nn.Linear):
            continue
        stored = f"{name}{Q8}" in source.shapes
        if not stored and bits != 8:
            continue
        if stored:
            q8, scale = source.read(f"{name}{Q8}"), source.read(f"{name}{SCALE}")
        else:
            q8, scale = in_8_bits(source.read(f"{name}.weight"))
        bias = None if part.bias is None else source.read(f"{name}.bias").to(device, dtype)
        packed = PackedLinear(part.in_features, scale.to(device), bias, q8=q8.to(device))
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, packed)
    for name, tensor in module.state_dict().items():
        if tensor.is_meta:
            parent, _, leaf = name.rpartition(".")
            value = source.read(name).to(device=device, dtype=dtype)
            owner = module.get_submodule(parent)
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    return module.eval().requires_grad_(False)


def in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (N, K) as int8 and a scale a row, float32 (N): rows are quantized as tokens are, by
    their largest value. DINOv2 giant takes the CPU engine 0.8 s, plain PyTorch 7.5."""
    if cpu.available() and weight.dtype in cpu.TYPES:
        codes, scale = cpu.quantize_activations(weight)
    else:  # in slices: the float32 copies of a whole one take eight times its packed bytes
        sliced = [reference.quantize_activations(rows) for rows in weight.split(512)]
        codes, scale = (torch.cat(parts) for parts in zip(*sliced, strict=True))
    return codes, scale[:, 0]


def filled_bytes(
    source: Source, dtype: torch.dtype, bits: int, linear: Callable[[str, tuple[int, ...]], bool]
) -> int:
    """Bytes of the module that `fill` makes; `linear(name, shape)`: may it be packed?"""
    total = 0
    for name, shape in source.weights().items():
        count = torch.Size(shape).numel()
        packed = f"{name}.q8" in source.shapes or (bits == 8 and linear(name, shape))
        total += count + 4 * shape[0] if packed else count * dtype.itemsize
    return total
