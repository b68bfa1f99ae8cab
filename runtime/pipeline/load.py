"""Opens networks: `load_dit` for original and packed files alike, `load_shape_decoder` beside it.

dit = load_dit("hunyuan3d-dit-v2-mini", dtype=torch.float16, device="cuda")
velocity = dit(x, t, cond)
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from vitapack.runtime.choices import COMPUTES, check_choice
from vitapack.runtime.decode.occupancy import OccupancyConfig, OccupancyDecoder
from vitapack.runtime.decode.shape_vae import ShapeDecoder
from vitapack.runtime.engines.choose import choose, network_of
from vitapack.runtime.errors import UserError
from vitapack.runtime.families.checkpoint import Checkpoint
from vitapack.runtime.families.open import open_checkpoint, resolve
from vitapack.runtime.format.header import PackedHeader
from vitapack.runtime.loading.checkpoint_files import is_packed
from vitapack.runtime.loading.fill import fill
from vitapack.runtime.networks.network import Network


def load_dit(
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    compute: str = "a16",
) -> Network:
    """The network of a packed file, or of an original checkpoint (folder, file, bundled name).

    Returns it in eval mode without gradients, called as dit(x, t, cond, guidance=None) in the
    family's own conventions. Tensors are read, checked for NaN, converted and moved one by one: the
    peak is the network in `dtype` plus one tensor. `compute` says how packed linears calculate:
    "a16" on the activations as they are, "a8" on int8 ones; an original checkpoint has none.
    Raises UserError or FormatError with one line.
    """
    check_choice("compute mode", compute, COMPUTES)
    packed = _packed_file(resolve(path))
    if packed is not None:
        from vitapack.runtime.loading.packed import load_packed_dit

        return load_packed_dit(packed, device=device, compute=compute, dtype=dtype)
    expect_floats(path, compute)
    return dit_of(open_checkpoint(path), dtype, device)


def expect_floats(path: str | os.PathLike[str], compute: str) -> None:
    """UserError unless an original checkpoint can compute so: it has no packed linears."""
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
    """The checkpoint that a packed file was made from, by its family and size."""
    original = open_checkpoint(parts)
    found = original.source(hashed=False)
    if (original.family, found["bytes"]) != (header.family, header.source["bytes"]):
        raise UserError(
            f"{parts} ({original.variant}, {found['bytes']} bytes of weights) is not what "
            f"{header.path} was made from: {header.variant}, {header.source['name']} of "
            f"{header.source['bytes']} bytes"
        )
    return original


def load_shape_decoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> ShapeDecoder | OccupancyDecoder:
    """The shape decoder of an original checkpoint, in eval mode without gradients: a ShapeVAE's,
    or TRELLIS' occupancy decoder."""
    config, source = checkpoint.decoder, checkpoint.component("shape_decoder")
    make = OccupancyDecoder if isinstance(config, OccupancyConfig) else ShapeDecoder
    return fill(lambda: make(config), source, choose(device, dtype=dtype, packed=False))


def _packed_file(path: Path) -> Path | None:
    """The packed file at a path, or in a folder that holds one instead of a checkpoint."""
    if path.is_dir() and not (path / "config.yaml").exists():
        path = path / "model.safetensors"
    return path if is_packed(path) else None
