"""The lean half: a packed file and a picture become a mesh.

    from vitapack.runtime import Pipeline, load_dit

The names here are loaded on first use, so that `inspect` and the command line work without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitapack.runtime.hy3dgen import attach
    from vitapack.runtime.load import load_dit
    from vitapack.runtime.pipeline import Pipeline

__all__ = ["Pipeline", "attach", "load_dit"]

_HOMES = {
    "Pipeline": "vitapack.runtime.pipeline",
    "attach": "vitapack.runtime.hy3dgen",
    "load_dit": "vitapack.runtime.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
