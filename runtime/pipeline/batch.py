"""Turns many images, or sets of views, into meshes and yields one outcome per job.

    jobs = jobs_of([Path("photos")])
    for outcome in run_batch(pipeline, jobs, out=Path("meshes"), seed=1):
        print(outcome.file, outcome.error)

A bad image fails its own job only. Every mesh is written atomically before its outcome is yielded,
so a batch that is interrupted, cancelled or no longer consumed loses at most one image's work.
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
    """One object: an image, or views of it by name ("front", "left", ...). Files are read only when
    the job starts."""

    name: str  # stem of the mesh file
    source: Source | Mapping[str, Source]

    @property
    def sources(self) -> list[Source]:
        return list(self.source.values()) if isinstance(self.source, Mapping) else [self.source]

    @property
    def label(self) -> str:
        """The image's name in messages."""
        first = self.sources[0]
        return str(first) if isinstance(first, Path) else self.name

    def images(self) -> Image.Image | dict[str, Image.Image]:
        """The decoded image or views. Raises UserError if a file is no valid image."""
        if isinstance(self.source, Mapping):
            return {view: _image(source) for view, source in self.source.items()}
        return _image(self.source)


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of one job: a new mesh, an `error`, or (with `resume`) the existing file."""

    job: Job
    file: Path | None = None
    generated: Generated | None = None
    error: UserError | None = None


def jobs_of(paths: Sequence[Path]) -> list[Job]:
    """One job per image, folders expanded. Raises UserError for no image, or two of one name."""
    if not paths:
        raise UserError(
            f"no image: name images or folders, or views of one object with --{', --'.join(VIEWS)}"
        )
    images = find_images(list(paths))
    stems = [path.stem for path in images]
    if repeated := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise UserError(
            f"two images are called {repeated[0]!r}, so one mesh would overwrite the other; "
            "rename one of them"
        )
    return [Job(path.stem, path) for path in images]


def job_of_views(views: Mapping[str, Path]) -> Job:
    """One job of several views, named after the first. Raises UserError for a folder as a view, or
    for the same file twice."""
    for view, path in views.items():
        if path.is_dir():
            raise UserError(f"--{view} {path}: a folder; expected one image")
    files = [path.resolve() for path in views.values()]
    if len(set(files)) < len(files):
        raise UserError(f"{files[0]}: the same image for two views; they must differ")
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

    out: the folder for the meshes, named NAME.FORMAT; None: nothing is written. resume: keep meshes
    that exist already, see `is_made`. Cancellation raises Cancelled within one step; outcomes that
    were yielded before stay valid.

    Raises UserError at once for views that the model does not accept, a folder that cannot be
    written or a format that cannot be resumed; later for a full disk, which ends the batch.
    """
    options = merged(GenerateOptions, options, changes)
    for job in jobs:
        if isinstance(job.source, Mapping):
            pipeline.check_views(job.source)
    if out is not None and jobs:
        destination(out / f"{jobs[0].name}.{options.format}")  # fail now, not after the first mesh
    if resume and options.format == "stl":
        raise UserError(
            "--resume: an STL file cannot hold the settings that would be compared; choose "
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
            generated = pipeline.generate(job.images(), options, name=job.label, control=control)
        except UserError as error:
            yield Outcome(job, error=error)
            continue
        if file is not None:
            save(generated.mesh, file)
            generated = replace(generated, file=file)
        yield Outcome(job, file, generated)
    control.report("meshes", len(jobs), len(jobs))


def is_made(file: Path, job: Job, metadata: Mapping[str, Any]) -> bool:
    """Whether a mesh file is complete, no older than the job's images, and has the metadata that
    the job would write: vitapack's version, model and its digest, seed, sampler, steps, guidance,
    and the resolution if one is given. Device and compute mode are not compared."""
    with suppress(UserError, OSError):
        times = [path.stat().st_mtime_ns for path in job.sources if isinstance(path, Path)]
        newer = all(file.stat().st_mtime_ns >= time for time in times)
        return newer and load(file).metadata == dict(metadata)
    return False


def _image(source: Source) -> Image.Image:
    return load_image(source) if isinstance(source, Path) else source
