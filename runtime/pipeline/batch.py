"""Many images, or sets of views, to meshes: one outcome after another, for whoever consumes them.

    jobs = jobs_of([Path("photos")])
    for outcome in run_batch(pipeline, jobs, out=Path("meshes"), seed=1):
        print(outcome.file, outcome.error)

A bad image costs its own mesh only. Every mesh is written atomically, and before its outcome is
yielded: a batch that was interrupted, cancelled or no longer consumed has lost one image's work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vitapack.runtime.choices import VIEWS
from vitapack.runtime.condition.images import find_images, load_image
from vitapack.runtime.decode.mesh import load, save
from vitapack.runtime.errors import UserError
from vitapack.runtime.files import destination
from vitapack.runtime.options import GenerateOptions, merged
from vitapack.runtime.pipeline.pipeline import Pipeline
from vitapack.runtime.pipeline.result import Generated
from vitapack.runtime.progress import Control

Source = Image.Image | Path


@dataclass(frozen=True)
class Job:
    """One object: an image, or views of it by name ("front", "left", ...). Files are read when the
    job's turn has come."""

    name: str  # of its mesh file, without suffix
    source: Source | Mapping[str, Source]

    @property
    def sources(self) -> list[Source]:
        return list(self.source.values()) if isinstance(self.source, Mapping) else [self.source]

    @property
    def label(self) -> str:
        """The name of its image in messages."""
        first = self.sources[0]
        return str(first) if isinstance(first, Path) else self.name

    def images(self) -> Image.Image | dict[str, Image.Image]:
        """The decoded images. UserError."""
        if isinstance(self.source, Mapping):
            return {view: _image(source) for view, source in self.source.items()}
        return _image(self.source)


@dataclass(frozen=True, eq=False)
class Outcome:
    """The end of one job: a new mesh, an `error`, or (with `resume`) the file that was there."""

    job: Job
    file: Path | None = None
    generated: Generated | None = None
    error: UserError | None = None


def jobs_of(paths: Sequence[Path]) -> list[Job]:
    """A job for each image, folders expanded. UserError for none, or for two of one name."""
    if not paths:
        raise UserError(
            f"no picture: name pictures or folders, or views of one object with "
            f"--{', --'.join(VIEWS)}"
        )
    found = find_images(list(paths))
    stems = [path.stem for path in found]
    if repeated := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise UserError(
            f"two pictures are called {repeated[0]!r}, so one mesh would overwrite the other; "
            "rename one of them"
        )
    return [Job(path.stem, path) for path in found]


def job_of_views(views: Mapping[str, Path]) -> Job:
    """One job of several views, called as its first image. UserError."""
    for view, path in views.items():
        if path.is_dir():
            raise UserError(f"--{view} {path}: a folder; expected one picture")
    places = [path.resolve() for path in views.values()]
    if len(set(places)) < len(places):
        raise UserError(f"{places[0]}: the same picture for two views; they must differ")
    return Job(next(iter(views.values())).stem, views)


def run_batch(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    options: GenerateOptions | None = None,
    *,
    out: Path | None = None,
    resume: bool = False,
    control: Control | None = None,
    **changes: Any,
) -> Iterator[Outcome]:
    """Runs the jobs in order and yields their outcomes. `changes` are fields of the options.

    out: the folder for the meshes, NAME.FORMAT each; None: nothing is written. resume: meshes that
    are there already are kept, see `is_made`. Cancelled within a step, it raises Cancelled; the
    outcomes before that stand.

    Raises UserError at once for views that this model does not take, for a folder that cannot be
    written and for a format that cannot be resumed; later for a full disk, which ends the batch.
    """
    options = merged(GenerateOptions, options, changes)
    for job in jobs:
        if isinstance(job.source, Mapping):
            pipeline.check_views(job.source)
    if out is not None and jobs:
        destination(out / f"{jobs[0].name}.{options.format}")  # now, not after the first mesh
    if resume and options.format == "stl":
        raise UserError(
            "--resume: an STL file has no room for the settings that would be compared; choose "
            "--format glb, obj or ply"
        )
    return _outcomes(pipeline, jobs, options, out, resume, control or Control())


def _outcomes(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    options: GenerateOptions,
    out: Path | None,
    resume: bool,
    control: Control,
) -> Iterator[Outcome]:
    for number, job in enumerate(jobs):
        control.step("meshes", number, len(jobs))
        file = None if out is None else out / f"{job.name}.{options.format}"
        if resume and file is not None and is_made(file, job, pipeline.metadata(options)):
            yield Outcome(job, file)
            continue
        try:
            made = pipeline.generate(job.images(), options, name=job.label, control=control)
        except UserError as error:
            yield Outcome(job, error=error)
            continue
        if file is not None:
            save(made.mesh, file)
            made = replace(made, file=file)
        yield Outcome(job, file, made)
    control.report("meshes", len(jobs), len(jobs))


def is_made(file: Path, job: Job, metadata: Mapping[str, Any]) -> bool:
    """Whether a mesh file is what the job would write: whole, with the same metadata (vitapack's
    version, model and its digest, seed, sampler, steps, guidance, and the resolution if one is
    given) and no older than any of its images. Device and compute mode are not compared."""
    with suppress(UserError, OSError):
        times = [path.stat().st_mtime_ns for path in job.sources if isinstance(path, Path)]
        newer = all(file.stat().st_mtime_ns >= time for time in times)
        return newer and load(file).metadata == dict(metadata)
    return False


def _image(source: Source) -> Image.Image:
    return load_image(source) if isinstance(source, Path) else source
