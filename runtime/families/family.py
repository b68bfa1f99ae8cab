"""All that a model family brings: one row of `FAMILIES` (open.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vitapack.runtime.condition.conditioner import Conditioner
from vitapack.runtime.decode.decoders import Decoder
from vitapack.runtime.engines.choose import Execution
from vitapack.runtime.families.checkpoint import Checkpoint
from vitapack.runtime.families.probe import PathProbe
from vitapack.runtime.loading.source import Source


@dataclass(frozen=True)
class Family:
    """Models that share architecture, tensor names, conditioner and shape decoder.

    `conditioner(source, execution, bits)` takes the bits that an image encoder's linears are packed
    to while it is loaded (16: not packed); `shape_decoder(source, execution)`. Both read names,
    shapes and settings from their `source`, and raise FormatError if these do not fit.
    """

    name: str
    looks_for: str  # its files, for the message that no family recognised a path
    recognises: Callable[[PathProbe], bool]
    read: Callable[[PathProbe], Checkpoint]  # checks names and shapes, loads no tensor
    conditioner: Callable[[Source, Execution, int], Conditioner]
    shape_decoder: Callable[[Source, Execution], Decoder]
    condition_tokens: Callable[[str], int]  # variant -> tokens of one image at the released size
    blocks_only: str = ""  # message about models of which only the transformer blocks are read
