"""The lean half: a packed file and a picture become a mesh.

    from vitapack.runtime import Pipeline, load_dit

The names here are loaded on first use, so that `inspect` and the command line work without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitapack.runtime.families.furniture import held_out
    from vitapack.runtime.integrations.hy3dgen import attach
    from vitapack.runtime.mesh import save
    from vitapack.runtime.pipeline.load import load_dit
    from vitapack.runtime.pipeline.pipeline import Pipeline

__all__ = ["Pipeline", "attach", "held_out", "load_dit", "save"]

_HOMES = {
    "Pipeline": "vitapack.runtime.pipeline.pipeline",
    "attach": "vitapack.runtime.integrations.hy3dgen",
    "held_out": "vitapack.runtime.families.furniture",
    "load_dit": "vitapack.runtime.pipeline.load",
    "save": "vitapack.runtime.mesh",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
