"""A packed file becomes a network: `load_packed_dit`, and the parts embedded beside it.

    dit = load_packed_dit("model.safetensors", device="cpu", compute="a16")

The network is built on the meta device, so nothing is allocated but the packed tensors themselves.
This module imports torch only where tensors are made; `read_header` works without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vitapack.runtime.container import content_digest
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.inspect_file import describe
from vitapack.runtime.layermap import BLOCK_FIELDS
from vitapack.runtime.packed_header import PARTS, PackedHeader, read_header
from vitapack.runtime.packed_layout import BLOCK_KINDS, FLOW, GROUP_OF, W16, network_linears

if TYPE_CHECKING:
    import torch

    from vitapack.runtime.dit import DiTConfig
    from vitapack.runtime.trellis import FlowConfig, Network

__all__ = [
    "PackedHeader",
    "describe",
    "embedded_tensors",
    "load_packed_dit",
    "read_header",
    "verify",
]

# Up to this size the content's sha256 is checked on every load (0.2 s here); beyond, on request.
VERIFY_BELOW = 256 << 20


def verify(path: str | os.PathLike[str]) -> str:
    """Computes the content's sha256 and returns it; FormatError if the file states another."""
    stated, actual = content_digest(path)
    if stated != actual:
        raise FormatError(
            f"{path}: the content's sha256 is {actual[:16]}..., the file states {stated[:16]}...; "
            "it was damaged or changed: copy or compress it again"
        )
    return actual


def dit_config(header: PackedHeader) -> DiTConfig | FlowConfig:
    from vitapack.runtime.dit import DiTConfig
    from vitapack.runtime.modulation import TimeEmbedding
    from vitapack.runtime.trellis import FlowConfig

    fields = {name: value for name, value in header.network.items() if name != "kind"}
    fields["time"] = TimeEmbedding(**fields["time"])
    for kind in BLOCK_KINDS[header.network["kind"]]:
        fields[BLOCK_FIELDS[kind]] = tuple(fields[BLOCK_FIELDS[kind]])
    return FlowConfig(**fields) if header.network["kind"] == FLOW else DiTConfig(**fields)


def network_of(
    config: DiTConfig | FlowConfig, device_type: str = "cpu", compute: str = "a16"
) -> Network:
    """The network with these hyper-parameters, not yet filled; in its fused form where there is
    one, for "cuda" and for int8 activations on a CPU."""
    from vitapack.runtime.dit import DiT, DiTConfig
    from vitapack.runtime.trellis import FlowTransformer

    engine = device_type == "cpu" and compute == "a8"
    if not isinstance(config, DiTConfig):
        if engine:
            from vitapack.runtime.flow_engine import EngineFlow

            return EngineFlow(config)
        return FlowTransformer(config)
    if device_type == "cuda":
        from vitapack.runtime.dit_gpu import GpuDiT

        return GpuDiT(config)
    if engine:
        from vitapack.runtime.dit_engine import EngineDiT

        return EngineDiT(config)
    return DiT(config)


def load_packed_dit(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    compute: str = "a16",
    *,
    dtype: torch.dtype | None = None,
    modulation: str | None = None,
    verify_content: bool | None = None,
) -> Network:
    """The network of a packed file, in eval mode.

    compute: "a16" (weight-only) or "a8" (int8 activations as well). dtype: of everything that is
    not packed; float32 on CPUs and float16 elsewhere by default. modulation: "table" or "int8"
    where the file holds both (default: the exact tables). verify_content: check the sha256; by
    default up to 256 MiB. Raises FormatError (a UserError) for anything wrong with the file.
    """
    import torch

    from vitapack.runtime.linear import COMPUTES, PackedLinear
    from vitapack.runtime.modulation import ModulationTable, TimeNodes

    header = read_header(path)
    if compute not in COMPUTES:
        raise UserError(f"compute {compute!r}: expected one of {', '.join(COMPUTES)}")
    chosen = _modulation(header, modulation)
    if verify_content or (verify_content is None and header.size <= VERIFY_BELOW):
        verify(path)
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    with torch.device("meta"):
        dit = network_of(dit_config(header), device.type, compute).eval()

    with TensorReader(header, device) as reader:
        for name, linear in network_linears(header.network).items():
            if chosen == "table" and linear.role == "modulation":
                count = linear.out // header.network["hidden"]
                table = reader.floats(f"model.{name}.table", dtype)
                # In the blocks the table takes the place of the module around the linear.
                replace_module(dit, name.removesuffix(".lin"), ModulationTable(table, count))
            elif layout := _packed_layout(header, name):
                prefix = f"model.{name}"
                bias = reader.floats(f"{prefix}.bias", dtype) if linear.bias else None
                codes = {
                    suffix: reader.read(f"{prefix}.weight.{suffix}")
                    for suffix in ("q8", "q4", "group")
                    if f"{prefix}.weight.{suffix}" in header.tensors
                }
                packed = PackedLinear(
                    linear.inputs,
                    reader.scales(f"{prefix}.weight.scale"),
                    bias,
                    group_size=GROUP_OF.get(layout, 0),
                    # Modulation runs once a step on one row: int8 activations would only cost.
                    compute="a16" if linear.role == "modulation" else compute,
                    **codes,
                )
                if compute == "a8" and device.type == "cpu":
                    packed.prepare()  # now, so that only one weight is ever held twice
                replace_module(dit, name, packed)
        if chosen == "table":
            nodes = reader.floats("modulation.t", torch.float64)
            if nodes.tolist() != header.nodes():
                raise FormatError(
                    f"{header.path}: tensor 'modulation.t': expected the times of "
                    f"{header.schedules()}, found others"
                )
            guidance = header.modulation["guidance"]
            dit.time_in = TimeNodes(nodes, guidance, header.schedules())
            if header.network.get("guidance_embed"):
                del dit.guidance_in
        rest = {name: reader.floats(f"model.{name}", dtype) for name in _empty(dit)}
    dit.load_state_dict(rest, strict=False, assign=True)
    if left := list(_empty(dit)):
        raise AssertionError(f"never loaded: {left}")
    return dit.requires_grad_(False)


def loaded_bytes(header: PackedHeader, dtype: torch.dtype) -> int:
    """Bytes of the network that `load_packed_dit` makes: codes as stored, floats in `dtype`."""
    total = 0
    for name, info in header.tensors.items():
        if not name.startswith(("model.", "modulation.")):
            continue
        fixed = info.dtype in ("I8", "U8", "F64") or name.endswith(".weight.scale")
        items = info.nbytes // (4 if info.dtype == "F32" else 2)
        total += info.nbytes if fixed else items * dtype.itemsize
    return total


def embedded_tensors(
    path: str | os.PathLike[str] | PackedHeader, part: str
) -> dict[str, torch.Tensor]:
    """Tensors of an embedded part ("shape_decoder" or "conditioner"), names without its prefix.

    Raises UserError where the part is only referenced: the message names the file that holds it.
    """
    header = path if isinstance(path, PackedHeader) else read_header(path)
    entry = getattr(header, part)
    if entry["storage"] != "embedded":
        source = entry["source"]
        where = f"it is in {source['name']}" if source else "the file says nothing of one"
        raise UserError(f"{header.path}: the {part.replace('_', ' ')} is not embedded; {where}")
    prefix = f"{PARTS[part]}."
    with TensorReader(header, "cpu") as reader:
        return {
            name.removeprefix(prefix): reader.read(name)
            for name in header.tensors
            if name.startswith(prefix)
        }


class TensorReader:
    """Reads tensors of a checked file one by one, straight into memory of their own."""

    def __init__(self, header: PackedHeader, device: str | torch.device) -> None:
        self.header, self.device = header, device
        self.file = header.path.open("rb")

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def read(self, name: str) -> torch.Tensor:
        import torch

        info = self.header.tensors[name]
        try:
            dtype = torch_dtype(info.dtype)
        except KeyError:
            raise FormatError(
                f"{self.header.path}: tensor {name!r} is stored as {info.dtype}, which no packed "
                "model is"
            ) from None
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        self.file.seek(self.header.data_start + info.start)
        if self.file.readinto(buffer.numpy().data) != info.nbytes:
            raise FormatError(f"{self.header.path}: tensor {name!r} is cut off")
        return buffer.view(dtype).view(info.shape).to(self.device)

    def floats(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """As `read`, in another float dtype; FormatError if a value is NaN or infinite."""
        import torch

        tensor = self.read(name)
        if not torch.isfinite(tensor).all():
            raise FormatError(f"{self.header.path}: tensor {name!r} holds NaN or infinite values")
        return tensor.to(dtype)

    def scales(self, name: str) -> torch.Tensor:
        """As `floats`, in float32; FormatError if one is not above 0."""
        import torch

        scales = self.floats(name, torch.float32)
        if not (scales > 0).all():
            raise FormatError(
                f"{self.header.path}: tensor {name!r} holds {scales.min():.3g}; scales are above 0"
            )
        return scales


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name; KeyError for what no model here has."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U8": torch.uint8, "BOOL": torch.bool,
    }[name]  # fmt: skip


def _modulation(header: PackedHeader, wanted: str | None) -> str:
    kind = header.modulation["kind"]
    held = ("table", "int8") if kind == "both" else (kind,)
    if wanted is not None and wanted not in held:
        raise UserError(
            f"{header.path}: holds modulation as {' and '.join(held)}, not as {wanted!r}; "
            "compress it again with --modulation"
        )
    return wanted or held[0]


def _packed_layout(header: PackedHeader, name: str) -> str | None:
    layout = header.linears.get(name, W16)
    return None if layout == W16 else layout


def _empty(dit: torch.nn.Module) -> Iterator[str]:
    """Names of the tensors that are still on the meta device.

    Not from state_dict(): that would make every packed weight that the CPU engine holds again.
    """
    for prefix, module in dit.named_modules():
        fleeting = module._non_persistent_buffers_set
        kept = {name: t for name, t in module._buffers.items() if name not in fleeting}
        for name, tensor in {**module._parameters, **kept}.items():
            if tensor is not None and tensor.is_meta:
                yield f"{prefix}.{name}" if prefix else name


def replace_module(dit: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Puts `module` in the place of the one of that name."""
    parent, _, last = name.rpartition(".")
    setattr(dit.get_submodule(parent), last, module)
