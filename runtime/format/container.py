"""The safetensors container, read and written with the standard library alone.

The layout is that of safetensors (8-byte little-endian header length, JSON header padded with
spaces, data without gaps), and tests check it against that library. The project has its own writer
because a large checkpoint is compressed one tensor at a time: the header is laid out from shapes
alone, then each tensor is written to its offset as soon as it exists. Reading touches only the
header, and checks all of it before anything is allocated for a tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vitapack.runtime.errors import FormatError
from vitapack.runtime.files import atomic_path

# Ordered as safetensors orders tensors: wide types first, so that every tensor is aligned.
ITEM_BYTES = {
    "U64": 8, "I64": 8, "F64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "U16": 2,
    "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_ORDER = {dtype: place for place, dtype in enumerate(ITEM_BYTES)}

# A packed Hunyuan3D-2.0 has 1,100 tensors and a header of 130 KB. 8 MiB of JSON becomes at most
# about 200 MB of Python objects, which bounds the memory that a hostile header can take.
MAX_HEADER = 8 << 20
MAX_TENSORS = 50_000
MAX_DIMS = 8
MAX_NAME = 512

# The first bytes of a header that `write_container` makes; the digest follows at file offset 35.
DIGEST_PREFIX = b'{"__metadata__":{"sha256":"'
DIGEST_AT = 8 + len(DIGEST_PREFIX)
NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: safetensors dtype name, shape, and bytes [start, end) of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Container:
    """The header of a safetensors file, checked against the file's size."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]  # in file order
    data_start: int
    size: int  # of the whole file, bytes


def describe(dtype: str, shape: Iterable[int]) -> str:
    return f"{dtype} [{', '.join(map(str, shape))}]"


def read_container(path: str | os.PathLike[str]) -> Container:
    """Reads and checks the header. Raises FormatError naming the file and the error in it."""
    path = Path(path)
    if path.exists() and not path.is_file():  # opening a pipe would wait forever
        raise FormatError(f"{path}: not a regular file; expected a .safetensors file")
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if len(start) < 8:
                raise FormatError(f"{path}: {size} bytes, too short for a safetensors file")
            (length,) = struct.unpack("<Q", start)
            if length > size - 8:
                raise FormatError(
                    f"{path}: not a safetensors file, or cut off: its header should have "
                    f"{length} bytes, the file has {size - 8} after the length"
                )
            if length > MAX_HEADER:
                raise FormatError(
                    f"{path}: header of {length} bytes, expected at most {MAX_HEADER}"
                )
            raw = file.read(length)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
    header = _parse(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path}: __metadata__: expected an object of strings")
    tensors = _tensor_table(path, header, size - 8 - length)
    return Container(path, metadata, tensors, 8 + length, size)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise FormatError(f"{path}: not a safetensors file: its header is not a JSON object")
    try:
        header = parse_json(raw.decode("utf-8"))
    except ValueError as error:
        raise FormatError(f"{path}: the header is not valid JSON: {one_line(error)}") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the header is not a JSON object")
    return header


def parse_json(text: str) -> Any:
    """Parses strict JSON.

    Raises ValueError for duplicate keys, NaN, infinities and too deep nesting.
    """
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def one_line(error: object) -> str:
    """An error's text without line breaks, cut to a readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _tensor_table(path: Path, header: dict[str, Any], available: int) -> dict[str, TensorInfo]:
    if len(header) > MAX_TENSORS:
        raise FormatError(f"{path}: {len(header)} tensors, expected at most {MAX_TENSORS}")
    table = {name: _tensor_info(path, name, entry) for name, entry in header.items()}
    table = dict(sorted(table.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 0
    for name, info in table.items():
        if info.start != position:
            raise FormatError(
                f"{path}: tensor {name!r}: expected to start at byte {position} of the data, "
                f"found {info.start} (tensors must follow each other without gaps)"
            )
        position = info.end
    if position != available:
        raise FormatError(
            f"{path}: the header describes {position} bytes of data, the file holds {available}; "
            f"{'it is cut off' if available < position else 'bytes were appended'}"
        )
    return table


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    label = f"{path}: tensor {name[:80]!r}"
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise FormatError(f"{label}: expected a printable name of 1 to {MAX_NAME} characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{label}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise FormatError(f"{label}: unknown dtype {one_line(dtype)[:40]!r}")
    if not _counts(shape) or len(shape) > MAX_DIMS:
        raise FormatError(f"{label}: expected a shape of at most {MAX_DIMS} sizes >= 0")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{label}: expected data_offsets [start, end] with 0 <= start <= end")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise FormatError(
            f"{label}: {describe(dtype, shape)} needs {expected} bytes, "
            f"its offsets span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 48 for v in value
    )


@dataclass(frozen=True)
class Layout:
    """Header and tensor offsets of a file to be written, from names, dtypes and shapes alone."""

    header: bytes  # length field, JSON and padding, with a digest of zeros
    tensors: dict[str, TensorInfo]  # in file order

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + max((info.end for info in self.tensors.values()), default=0)


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> Layout:
    """Lays out `tensors` (name -> dtype, shape) in the order of safetensors: by dtype, then name.

    Raises ValueError if the header is longer than MAX_HEADER.
    """
    table: dict[str, TensorInfo] = {}
    position = 0
    for name in sorted(tensors, key=lambda name: (_ORDER[tensors[name][0]], name.encode())):
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        table[name] = TensorInfo(dtype, tuple(shape), position, end)
        position = end
    header: dict[str, Any] = {"__metadata__": {"sha256": NO_DIGEST, **metadata}}
    for name, info in table.items():
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [info.start, info.end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"header of {len(text)} bytes, at most {MAX_HEADER} can be read back")
    return Layout(struct.pack("<Q", len(text)) + text, table)


class Writer:
    """Fills a file opened for reading and writing, one tensor at a time and in any order."""

    def __init__(self, file: BinaryIO, layout: Layout) -> None:
        self.file, self.layout = file, layout
        self.missing = set(layout.tensors)
        file.seek(0)
        file.write(layout.header)
        file.truncate(layout.size)

    def put(self, name: str, data: Any) -> None:
        """Writes one bytes-like tensor.

        Raises ValueError if its name is unknown, it was written before or its length is wrong.
        """
        if name not in self.missing:
            raise ValueError(f"tensor {name!r} is not in the layout, or was written twice")
        view, info = memoryview(data).cast("B"), self.layout.tensors[name]
        if view.nbytes != info.nbytes:
            raise ValueError(f"tensor {name!r}: {view.nbytes} bytes, expected {info.nbytes}")
        self.file.seek(len(self.layout.header) + info.start)
        self.file.write(view)
        self.missing.remove(name)

    def finish(self) -> str:
        """Writes the content's sha256 into the header and returns it.

        Raises ValueError if tensors are missing.
        """
        if self.missing:
            raise ValueError(f"tensors not written: {', '.join(sorted(self.missing)[:5])}")
        self.file.flush()
        digest = _digest(self.file)
        self.file.seek(DIGEST_AT)
        self.file.write(digest.encode())
        self.file.flush()
        return digest


def write_container(
    path: str | os.PathLike[str], layout: Layout, tensors: Iterable[tuple[str, Any]]
) -> str:
    """Writes a file atomically from (name, bytes-like) pairs in any order; returns its sha256.

    One tensor is held at a time. Raises ValueError as `Writer` does, UserError if the disk is full.
    """
    with atomic_path(path) as temporary, temporary.open("r+b") as file:
        writer = Writer(file, layout)
        for name, data in tensors:
            writer.put(name, data)
        return writer.finish()


def content_digest(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Returns (stated, computed) sha256; for the computation the stated digest counts as 64 zeros.

    Raises FormatError if the file does not start as `write_container` starts it.
    """
    with Path(path).open("rb") as file:
        start = file.read(DIGEST_AT + 64)
        if start[8:DIGEST_AT] != DIGEST_PREFIX or len(start) != DIGEST_AT + 64:
            raise FormatError(f"{path}: it states no sha256, so it was not written by vitapack")
        return start[DIGEST_AT:].decode("latin-1"), _digest(file)


def _digest(file: BinaryIO) -> str:
    file.seek(0)
    total = hashlib.sha256(file.read(DIGEST_AT) + NO_DIGEST.encode())
    file.seek(DIGEST_AT + 64)
    while chunk := file.read(1 << 20):
        total.update(chunk)
    return total.hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """sha256 of the whole file, as `sha256sum` prints it."""
    total = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()
