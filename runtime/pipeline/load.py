"""Opens single networks, of packed files and of original checkpoints.

dit = load_dit("hunyuan3d-dit-v2-mini", dtype=torch.float16, device="cuda")
velocity = dit(x, t, cond)
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from vitapack.runtime.choices import COMPUTES, check_choice
from vitapack.runtime.engines.choose import choose, network_of
from vitapack.runtime.errors import UserError
from vitapack.runtime.families.checkpoint import Checkpoint
from vitapack.runtime.families.open import FAMILIES, open_checkpoint, resolve
from vitapack.runtime.format.header import PackedHeader
from vitapack.runtime.loading.checkpoint_files import is_packed
from vitapack.runtime.loading.fill import fill
from vitapack.runtime.loading.packed import load_packed_dit
from vitapack.runtime.networks.network import Network


def load_dit(
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    compute: str = "a16",
) -> Network:
    """The network of a packed file, or of an original checkpoint (folder, file, bundled name).

    In eval mode without gradients, called as dit(x, t, cond, guidance=None); t as the family
    counts it. Tensors are read, checked, converted and moved one by one, so the peak is the network
    in `dtype` plus one tensor. compute: "a16" (weight-only) or "a8" (int8 activations), for packed
    files only. Raises UserError or FormatError, each with a message of one line.
    """
    check_choice("compute mode", compute, COMPUTES)
    packed = _packed_file(resolve(path))
    if packed is not None:
        return load_packed_dit(packed, device=device, compute=compute, dtype=dtype)
    expect_floats(path, compute)
    return dit_of(open_checkpoint(path), dtype, device)


def expect_floats(path: str | os.PathLike[str], compute: str) -> None:
    """Raises UserError unless `compute` is "a16": an original checkpoint has no packed linears."""
    if compute != "a16":
        raise UserError(f"{path} is not packed, so it cannot compute in {compute}; compress it")


def dit_of(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Network:
    """The network of an open original checkpoint; see `load_dit`."""
    execution = choose(device, dtype=dtype, packed=False)
    return fill(lambda: network_of(checkpoint.config), checkpoint.network(), execution)


def original_of(header: PackedHeader, parts: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint `parts`, which must be the packed file's original, by family and size.

    Raises: UserError: if it is not.
    """
    original = open_checkpoint(parts)
    source = original.source(hashed=False)
    if (original.family, source["bytes"]) != (header.family, header.source["bytes"]):
        raise UserError(
            f"{parts} ({original.variant}, {source['bytes']} bytes of weights) is not the "
            f"original of {header.path}, which is {header.variant}, {header.source['name']} of "
            f"{header.source['bytes']} bytes"
        )
    return original


def load_shape_decoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The shape decoder's network of an original checkpoint, in eval mode without gradients.

    Raises: UserError: if the checkpoint holds none, or the family has no separate decoder network.
    """
    family, source = FAMILIES[checkpoint.family], checkpoint.component("shape_decoder")
    decoder = family.shape_decoder(source, choose(device, dtype=dtype, packed=False))
    if decoder.component is None:
        raise UserError(f"{checkpoint.variant} has no shape decoder network of its own")
    return decoder.component()


def _packed_file(path: Path) -> Path | None:
    """The packed file at a path, or in a folder that holds one instead of a checkpoint."""
    if path.is_dir() and not (path / "config.yaml").exists():
        path = path / "model.safetensors"
    return path if is_packed(path) else None
