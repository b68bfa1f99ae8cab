"""Reads tensors of a packed file whose header has been checked, and verifies its digest."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vitapack.runtime.errors import FormatError
from vitapack.runtime.format.container import content_digest
from vitapack.runtime.format.header import PackedHeader

if TYPE_CHECKING:
    import torch

    from vitapack.kernels.linear.layouts import WeightLayout
    from vitapack.kernels.linear.weights import PackedWeight


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

    def weight(self, name: str, layout: WeightLayout, in_features: int) -> PackedWeight:
        """The packed weight of a linear, `name` ending in ".weight". FormatError if a scale is not
        above 0."""
        from vitapack.kernels.linear.weights import PackedWeight

        tensors = {
            part: (self.scales if part == "scale" else self.read)(f"{name}.{part}")
            for part in layout.names
        }
        return PackedWeight(layout, tensors, in_features)

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
