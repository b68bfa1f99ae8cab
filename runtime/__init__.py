"""Turns a packed file and an image into a mesh; the half of vitapack without training code.

    from vitapack.runtime import Pipeline, load_dit

The names here are loaded on first use, so that `inspect` and the command line work without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitapack.runtime.families.furniture import held_out
    from vitapack.runtime.integrations.hy3dgen import attach
    from vitapack.runtime.mesh import save
    from vitapack.runtime.options import GenerateOptions, PipelineOptions
    from vitapack.runtime.pipeline.batch import Job, jobs_of, run_batch
    from vitapack.runtime.pipeline.load import load_dit
    from vitapack.runtime.pipeline.pipeline import Pipeline
    from vitapack.runtime.progress import Cancelled, Control

__all__ = [
    "Cancelled",
    "Control",
    "GenerateOptions",
    "Job",
    "Pipeline",
    "PipelineOptions",
    "attach",
    "held_out",
    "jobs_of",
    "load_dit",
    "run_batch",
    "save",
]

_HOMES = {
    "Cancelled": "vitapack.runtime.progress",
    "Control": "vitapack.runtime.progress",
    "GenerateOptions": "vitapack.runtime.options",
    "Job": "vitapack.runtime.pipeline.batch",
    "Pipeline": "vitapack.runtime.pipeline.pipeline",
    "PipelineOptions": "vitapack.runtime.options",
    "attach": "vitapack.runtime.integrations.hy3dgen",
    "held_out": "vitapack.runtime.families.furniture",
    "jobs_of": "vitapack.runtime.pipeline.batch",
    "load_dit": "vitapack.runtime.pipeline.load",
    "run_batch": "vitapack.runtime.pipeline.batch",
    "save": "vitapack.runtime.mesh",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
