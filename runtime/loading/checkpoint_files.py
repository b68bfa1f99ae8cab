"""Checkpoint files, opened lazily: names and shapes first, tensors one by one.

    weights = open_weights(Path("model.fp16.safetensors"))
    weights.shape("model.latent_in.weight"), weights.read("model.latent_in.weight")

`.safetensors` (also sharded, through its index) is read with plain file reads, not mapped: a tensor
takes its own bytes and nothing else stays resident, so streaming a 5 GB checkpoint takes less than
1 GB. `.ckpt` goes through torch.load with weights_only=True, so no pickle ever runs.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.format.container import one_line, parse_json, read_container
from vitapack.runtime.format.header import KEY
from vitapack.runtime.format.reader import torch_dtype

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
INDEX = ".safetensors.index.json"
# Limits of a pickled checkpoint: characters of a name, entries.
LONGEST, MOST = 1000, 100_000

_NAMES = {
    torch_dtype(name): name
    for name in ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    file: str = ""  # for messages


@dataclass(frozen=True, eq=False)
class Weights:
    """All tensors of one checkpoint, under the names in its files or those that `renamed` gave."""

    files: tuple[Path, ...]
    stored: Mapping[str, StoredTensor]

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.stored[name].dtype

    def read(self, name: str) -> Tensor:
        """Reads a tensor in its stored dtype into its own memory on the CPU.

        Raises FormatError if a value is NaN or infinite, as in no released model.
        """
        entry = self.stored[name]
        tensor = entry.read()
        if tensor.is_floating_point() and not _all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise FormatError(
                f"{entry.file or self.files[0].name}: tensor {name} holds {bad} NaN or "
                f"infinite values of {tensor.numel()}; the file is damaged, get it again"
            )
        return tensor

    def renamed(self, rename: Callable[[str], str]) -> Weights:
        """The same tensors under other names. Raises FormatError if two get the same name."""
        stored: dict[str, StoredTensor] = {}
        for name, entry in self.stored.items():
            new = rename(name)
            if new in stored:
                raise FormatError(f"{self.files[0]}: {new} occurs twice, with and without prefix")
            stored[new] = entry
        return Weights(self.files, stored)


def merged(checkpoints: Mapping[str, Weights]) -> Weights:
    """Several checkpoints as one, each under its own prefix: {"vae.": ...}; names must differ."""
    stored: dict[str, StoredTensor] = {}
    for prefix, weights in checkpoints.items():
        stored |= weights.renamed(f"{prefix}{{}}".format).stored
    files = dict.fromkeys(file for weights in checkpoints.values() for file in weights.files)
    return Weights(tuple(files), stored)


def stacked(rows: list[StoredTensor]) -> StoredTensor:
    """Concatenates tensors, stored separately in the checkpoint, along the first dimension."""
    shape = (sum(entry.shape[0] for entry in rows), *rows[0].shape[1:])
    read = rows[0].read if len(rows) == 1 else lambda: torch.cat([entry.read() for entry in rows])
    return StoredTensor(shape, rows[0].dtype, read, rows[0].file)


def _all_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, without a temporary copy (aminmax propagates NaN).

    torch.isfinite makes a copy of absolute values, and its freed memory between the loaded tensors
    could stay unused: in one load of four, half as much again as the model.
    """
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def open_weights(path: Path) -> Weights:
    """Opens one file, or the shards of an index.

    Raises UserError if a file cannot be read, FormatError if it is malformed.
    """
    if path.name.endswith(INDEX):
        return _sharded(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix in PICKLED:
        return _pickled(path)
    raise FormatError(
        f"{path} is not a weight file: expected .safetensors, {INDEX} or {', '.join(PICKLED)}"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype: the inverse of `torch_dtype`."""
    return _NAMES[dtype]


def is_packed(path: Path) -> bool:
    """Whether it is a packed file; False for anything that is not a safetensors file."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return KEY in read_container(path).metadata


def _safetensors(path: Path) -> Weights:
    container = read_container(path)
    stored = {}
    for name, info in container.tensors.items():
        try:
            dtype = torch_dtype(info.dtype)
        except KeyError:
            raise FormatError(
                f"{path}: tensor {name} is stored as {info.dtype}, a dtype of no released model"
            ) from None
        read = _reader(path, container.data_start + info.start, info.nbytes, info.shape, dtype)
        stored[name] = StoredTensor(info.shape, dtype, read, str(path))
    return Weights((path,), stored)


def _reader(
    path: Path, offset: int, size: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        buffer = torch.empty(size, dtype=torch.uint8)
        with path.open("rb") as file:
            file.seek(offset)
            if file.readinto(buffer.numpy().data) != size:
                raise FormatError(f"{path} was cut off while it was being read; get it again")
        return buffer.view(dtype).view(shape)

    return read


def _sharded(path: Path) -> Weights:
    try:
        index = parse_json(path.read_text(encoding="utf-8"))
        names = dict(index["weight_map"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{path} is not a shard index: expected JSON with weight_map") from error
    if any(not isinstance(file, str) or Path(file).name != file for file in names.values()):
        raise FormatError(f"{path}: its weight_map points outside its folder; refused")
    files = tuple(path.parent / file for file in sorted(set(names.values())))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FormatError(f"{path}: {first_names(missing)} of its {len(files)} shards are missing")
    shards = {file.name: _safetensors(file) for file in files}
    absent = [name for name, file in names.items() if name not in shards[file]]
    if absent:
        raise FormatError(f"{path}: tensors {first_names(absent)} are not in the shards it names")
    return Weights(files, {name: shards[file].stored[name] for name, file in names.items()})


def _pickled(path: Path) -> Weights:
    """A torch file of nested dicts of tensors; their keys are joined with dots."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _expect_uncompressed(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FormatError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"Unsupported (?:global|class|operand)[^\n]*?([\w.]+\.\w+)", str(error))
        if found:
            raise FormatError(
                f"{path} holds a pickled {found[1]}, not only tensors: refused, since opening it "
                "could run code; use the .safetensors of this model"
            ) from error
        raise FormatError(f"{path} is not a torch checkpoint of plain tensors; refused") from error
    except Exception as error:
        # Damaged bytes make the unpickler raise almost anything: of 3,000 files with a few changed
        # bytes, 4 % ended in an IndexError, a TypeError or an AssertionError.
        raise FormatError(
            f"{path} is not a whole torch checkpoint ({one_line(error)}); get it again"
        ) from error
    if isinstance(content, dict) and set(content) == {"state_dict"}:
        content = content["state_dict"]
    stored = _flattened(content, path)
    odd = [name for name, entry in stored.items() if entry.dtype not in _NAMES]
    if odd:
        raise FormatError(f"{path}: {first_names(odd)} have a dtype of no released model")
    if not stored:
        raise FormatError(f"{path} holds no tensors; expected a dict of them")
    return Weights((path,), stored)


def _expect_uncompressed(path: Path) -> None:
    """Raises FormatError for a compressed zip, which could unpack to any size."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise FormatError(f"{path} is a compressed zip, which torch never writes; refused")


def _flattened(content: Any, path: Path) -> dict[str, StoredTensor]:
    """The tensors in nested dicts, by their joined keys.

    Raises FormatError for dicts that contain each other, for more than MOST entries, and for
    tensors that are not plain CPU memory.
    """
    stored: dict[str, StoredTensor] = {}
    waiting, entries = [("", content)], 0
    while waiting:
        name, value = waiting.pop()
        entries += 1
        if len(name) > LONGEST or entries > MOST:
            raise FormatError(
                f"{path} nests its dicts endlessly (at {name[:40]}...); expected tensors by name"
            )
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.device.type != "cpu":
                raise FormatError(
                    f"{path}: tensor {name} is {value.layout} on {value.device.type}; expected "
                    "plain numbers"
                )
            # Mapped from the file; the caller gets a clone.
            tensor = value.detach()
            stored[name] = StoredTensor(tuple(tensor.shape), tensor.dtype, tensor.clone, str(path))
        elif isinstance(value, dict):
            prefix = f"{name}." if name else ""
            waiting += [(f"{prefix}{key}", inner) for key, inner in reversed(value.items())]
    return stored


def first_names(names: Iterable[str], count: int = 3) -> str:
    """The first `count` names of a list, and the list's length if there are more."""
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > count else ""
    return ", ".join(names[:count]) + more
