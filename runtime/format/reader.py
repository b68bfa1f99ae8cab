"""Reads tensors of a packed file whose header has been checked, and verifies its digest."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vitapack.runtime.errors import FormatError
from vitapack.runtime.format.container import content_digest
from vitapack.runtime.format.header import PackedHeader

if TYPE_CHECKING:
    import torch


# Up to this size the content's sha256 is checked on every load (0.2 s); above it, on request.
VERIFY_BELOW = 256 << 20


def verify(path: str | os.PathLike[str]) -> str:
    """Returns the content's sha256. Raises FormatError if the file states another."""
    stated, actual = content_digest(path)
    if stated != actual:
        raise FormatError(
            f"{path}: the content's sha256 is {actual[:16]}..., the file states {stated[:16]}...; "
            "it was damaged or changed: copy or compress it again"
        )
    return actual


class TensorReader:
    """Reads tensors of a checked file one by one, each into its own memory."""

    def __init__(self, header: PackedHeader) -> None:
        self.header = header
        self.file = header.path.open("rb")

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor in its stored dtype, on the CPU.

        Raises FormatError if a value is NaN or infinite, or a scale of a packed weight not above 0.
        """
        tensor = self._stored(name)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise FormatError(f"{self.header.path}: tensor {name!r} holds NaN or infinite values")
        if name.endswith(".weight.scale") and not (tensor > 0).all():
            raise FormatError(
                f"{self.header.path}: tensor {name!r} holds {tensor.min():.3g}; scales are above 0"
            )
        return tensor

    def _stored(self, name: str) -> torch.Tensor:
        import torch

        info = self.header.tensors[name]
        try:
            dtype = torch_dtype(info.dtype)
        except KeyError:
            raise FormatError(
                f"{self.header.path}: tensor {name!r} is stored as {info.dtype}, a dtype of no "
                "packed file"
            ) from None
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        self.file.seek(self.header.data_start + info.start)
        if self.file.readinto(buffer.numpy().data) != info.nbytes:
            raise FormatError(f"{self.header.path}: tensor {name!r} is cut off")
        return buffer.view(dtype).view(info.shape)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name. Raises KeyError for unsupported dtypes."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U8": torch.uint8, "BOOL": torch.bool,
    }[name]  # fmt: skip
