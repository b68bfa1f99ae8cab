"""Sparse files with real headers and no data: full size, almost no bytes on disk.

    with hollow.checkpoint(work, "hunyuan3d-2.0", ("dit",)) as checkpoint: ...
    hollow.packed(checkpoint, work / "x.safetensors")

Sizes, operations and predicted memory need no weights, so they take seconds with these files.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vitapack.compressor.options import CompressOptions
from vitapack.compressor.packing.compress import make_plan
from vitapack.compressor.planning.files import resolve_plan
from vitapack.compressor.tools.random_checkpoint import files_of
from vitapack.runtime.families.checkpoint import Checkpoint
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.format.container import DIGEST_AT, Layout, content_digest, lay_out


def _write(place: Path, layout: Layout) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.size)


@contextmanager
def checkpoint(work: Path, name: str, parts: Sequence[str]) -> Iterator[Checkpoint]:
    """A checkpoint in the released layout, removed on exit; arguments as in `random_checkpoint`."""
    folder = work / f"{name}-hollow"
    files = files_of(name, parts)
    for place, specs in files.tensors.items():
        _write(folder / place, lay_out(specs, {}))
    for place, text in files.texts.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text)
    try:
        yield open_checkpoint(folder)
    finally:
        shutil.rmtree(folder)


def packed(original: Checkpoint, out: Path) -> None:
    """The file that `compress --plan paper --no-embed` would write, with zeros as its data."""
    options = CompressOptions(embed=False)
    plan = make_plan(original, resolve_plan("paper", original), options, hashed=False)
    _write(out, plan.layout)
    _, digest = content_digest(out)
    with out.open("r+b") as file:
        file.seek(DIGEST_AT)
        file.write(digest.encode())
