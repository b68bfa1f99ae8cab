"""The table of families, and which of them a path belongs to.

    checkpoint = open_checkpoint("hunyuan3d-dit-v2-mini")
    checkpoint.variant, checkpoint.config, checkpoint.sampler
    checkpoint.tensor("double_blocks.0.img_attn.qkv.weight")

A new family is one file here and one entry in FAMILIES (docs/adding.md).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from vitapack.runtime.errors import UserError
from vitapack.runtime.families import hunyuan3d, step1x3d, trellis
from vitapack.runtime.families.checkpoint import Checkpoint
from vitapack.runtime.families.family import Family
from vitapack.runtime.families.furniture import family as furniture
from vitapack.runtime.families.probe import PathProbe
from vitapack.runtime.loading.checkpoint_files import first_names, is_packed

# By name, in the order in which they are tried on a path.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (step1x3d.FAMILY, trellis.FAMILY, hunyuan3d.FAMILY, furniture.FAMILY)
}

log = logging.getLogger("vitapack.families")

# Models in the package, by the name that stands for their folder.
BUNDLED = {"furniture": Path(__file__).resolve().parents[1] / "bundled" / "furniture"}


def resolve(path: str | os.PathLike[str]) -> Path:
    """The existing path of a bundled model's name or of a path; `./furniture` is always a path."""
    name = os.fspath(path)
    if name in BUNDLED:
        if not BUNDLED[name].is_dir():
            raise UserError(f"the bundled model {name} is not in this installation")
        return BUNDLED[name]
    found = Path(name)
    if not found.exists():
        raise UserError(
            f"{found} does not exist; expected a checkpoint's folder or file, or one of the "
            f"bundled models: {', '.join(BUNDLED)}"
        )
    return found


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Detects the family of an original checkpoint (folder, file or bundled name) and reads it.

    Names and shapes of all tensors are checked against the configuration; none is loaded.

    Raises: UserError, FormatError: in one line, what was expected and what was found.
    """
    probe = PathProbe(resolve(path))
    if is_packed(probe.path):
        raise UserError(
            f"{probe.path} is a packed file of vitapack; expected an original checkpoint"
        )
    for family in FAMILIES.values():
        if family.recognises(probe):
            checkpoint = family.read(probe)
            for setting in checkpoint.unknown:
                log.warning("%s is not known here; the tensors fit without it", setting)
            if checkpoint.ignored:
                log.info("not needed, on purpose: %s", first_names(checkpoint.ignored))
            return checkpoint
    raise UserError(f"{probe.path} is no model that is known here: {_contents(probe)}")


def family_of(name: str, path: str | os.PathLike[str]) -> Family:
    """The family of a name that the file at `path` holds. Raises: UserError: if there is none."""
    if name not in FAMILIES:
        raise UserError(f"{path}: no family {name!r} here; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _contents(probe: PathProbe) -> str:
    wanted = "; or ".join(family.looks_for for family in FAMILIES.values())
    inside = [] if probe.path.is_file() else sorted(probe.path.glob("*/config.yaml"))
    if probe.config is not None:
        target = probe.target() or (probe.config.get("target") or "no model.target")
        return f"config.yaml says {target}; looked for {wanted}"
    if inside:
        names = ", ".join(str(path.parent) for path in inside[:4])
        return f"it has no config.yaml itself, but these folders have: {names}"
    if probe.path.is_file():
        names = ", ".join(sorted(probe.weights)[:3])
        return f"no config.yaml next to it, and its tensors are {names}, ...; looked for {wanted}"
    return f"looked for {wanted}; found {probe.listing()}"
