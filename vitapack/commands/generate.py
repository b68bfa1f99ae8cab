"""`vitapack generate`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from vitapack.runtime.choices import COMPUTES, MEMORY_MODES, MESH_FORMATS, SAMPLERS, VIEWS
from vitapack.runtime.errors import UserError
from vitapack.runtime.options import GenerateOptions, PipelineOptions
from vitapack.terminal import COUNT, SEED, filled, say, watched

if TYPE_CHECKING:
    from vitapack.runtime.pipeline.batch import Job

HELP = "turn images into meshes"
EXAMPLE = "generate model.safetensors chair.png -o meshes --seed 1"


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("packed", help="a packed file, or an original checkpoint")
    add("images", type=Path, nargs="*", help="images or folders of images")
    for view in VIEWS:
        add(
            f"--{view}",
            type=Path,
            metavar="IMAGE",
            help="one view of an object, for multi-view models",
        )
    add("-o", "--out", type=Path, required=True, metavar="DIR")
    add(
        "--resume",
        action="store_true",
        help="keep existing meshes that are complete, no older than their images, and have the "
        "same model, seed, sampler, steps, guidance and resolution in their metadata",
    )
    add("--steps", type=COUNT)
    add("--guidance", type=float)
    add("--seed", type=SEED)
    add("--sampler", choices=SAMPLERS)
    add("--device")
    add("--compute", choices=COMPUTES)
    add("--parts", metavar="MODEL", help="original checkpoint with image encoder and shape decoder")
    add("--memory", choices=MEMORY_MODES, help="lean: evict each network after its phase")
    add(
        "--one-batch",
        action="store_true",
        help="guidance as one batch of two; the default is two passes, of which the "
        "unconditional one needs a single token, with the same result",
    )
    add(
        "--cuda-graphs",
        action="store_true",
        help="on a GPU: capture network evaluations once, then replay them",
    )
    add("--resolution", type=COUNT, help="cells per side of the decoded grid")
    add("--format", choices=MESH_FORMATS)


def run(options: Namespace) -> None:
    from vitapack.runtime.pipeline.batch import run_batch
    from vitapack.runtime.pipeline.pipeline import Pipeline

    settings = filled(GenerateOptions, options)
    jobs = jobs_from(options)
    pipeline = Pipeline.open(options.packed, filled(PipelineOptions, options))
    written, failed, kept = [], [], []
    with watched(options.quiet) as control:
        outcomes = run_batch(
            pipeline, jobs, settings, out=options.out, resume=options.resume, control=control
        )
        if not options.quiet:
            views = max(len(job.sources) for job in jobs)
            print(predicted(pipeline.predicted_bytes(views=views, one_batch=settings.one_batch)),
                  file=sys.stderr)  # fmt: skip
        for outcome in outcomes:
            if outcome.generated is not None:
                written.append(outcome.generated)
            elif outcome.error is None:
                kept.append(str(outcome.file))
            elif len(jobs) == 1:
                raise outcome.error
            else:
                failed.append(str(outcome.error))
    rows = {"written": [generated.to_json() for generated in written], "failed": failed}
    lines = [f"{file}  kept" for file in kept] + [generated.describe() for generated in written]
    say(options, rows | ({"kept": kept} if options.resume else {}), "\n".join(lines))
    if failed:
        for line in failed:
            print(f"vitapack: {line}", file=sys.stderr)
        raise UserError(f"{len(failed)} of {len(jobs)} images gave no mesh (named above)")


def jobs_from(options: Namespace) -> list[Job]:
    """One job per image, or a single job of all views. Raises UserError if both are given."""
    from vitapack.runtime.pipeline.batch import job_of_views, jobs_of

    views = {view: getattr(options, view) for view in VIEWS if getattr(options, view)}
    if views and options.images:
        raise UserError(
            f"--{next(iter(views))} gives views of one object, {options.images[0]} is another "
            "object; give one or the other"
        )
    return [job_of_views(views)] if views else jobs_of(options.images)


def predicted(peaks: dict[str, int]) -> str:
    """The predicted peak memory of each phase as text."""
    phases = (f"{phase} {count / 2**30:.2f} GiB" for phase, count in peaks.items())
    return f"memory: predicted peaks: {', '.join(phases)}"
