"""Many images at once: bad ones, interrupted batches, and what consumers are given."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pipeline import pictures, tiny_pipeline

from vitapack.runtime.decode.mesh import read_metadata, report, save
from vitapack.runtime.errors import UserError
from vitapack.runtime.options import GenerateOptions
from vitapack.runtime.pipeline.batch import Job, job_of_views, jobs_of, run_batch
from vitapack.runtime.pipeline.pipeline import Pipeline
from vitapack.runtime.progress import Cancelled, Control, Progress


class Counting(Pipeline):
    made: list[str]

    def generate(self, image, options=None, *, name="image", control=None, **changes):
        self.made.append(Path(name).stem)
        return super().generate(image, options, name=name, control=control, **changes)


@pytest.fixture
def pipeline() -> Counting:
    found = tiny_pipeline()
    found.__class__ = Counting
    found.made = []
    return found


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images, the second one black: the tiny conditioner sees no object in it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (_, first), (_, third) = pictures(2)
    for name, image in (("a", first), ("b", Image.new("RGB", (4, 2))), ("c", third)):
        image.save(folder / f"{name}.png")
    return folder


def test_one_bad_image_costs_only_its_own_mesh(pipeline, photos, tmp_path):
    (photos / "d.png").write_bytes(b"no image")
    out = tmp_path / "out"
    outcomes = list(run_batch(pipeline, jobs_of([photos]), out=out, seed=3))
    assert [outcome.job.name for outcome in outcomes] == ["a", "b", "c", "d"]
    assert [outcome.generated is not None for outcome in outcomes] == [True, False, True, False]
    assert str(outcomes[1].error) == f"{photos / 'b.png'}: no object in this picture"
    assert "d.png: not an image" in str(outcomes[3].error)
    assert sorted(path.name for path in out.iterdir()) == ["a.glb", "c.glb"]
    alone = pipeline(Image.open(photos / "c.png"), seed=3)
    save(alone, tmp_path / "alone.glb")
    assert (out / "c.glb").read_bytes() == (tmp_path / "alone.glb").read_bytes()


def test_an_outcome_has_all_that_a_consumer_needs(pipeline, photos, tmp_path):
    options = GenerateOptions(seed=3, format="ply")
    (outcome,) = run_batch(pipeline, jobs_of([photos / "a.png"]), options, out=tmp_path)
    made = outcome.generated
    assert outcome.file == made.file == tmp_path / "a.ply"
    assert (made.seed, made.settings) == (3, pipeline.sampler)
    assert list(made.seconds) == list(made.bytes) == ["condition", "denoise", "decode"]
    row = made.to_json()
    assert row == {
        "file": str(tmp_path / "a.ply"),
        **read_metadata(tmp_path / "a.ply"),
        "mesh": asdict(report(made.mesh)),
        "seconds": pipeline.seconds,
        "bytes": pipeline.bytes,
        "queries": None,
    }
    assert json.loads(json.dumps(row)) == row
    assert made.describe().startswith(f"{tmp_path / 'a.ply'}  ")
    assert f"{made.report.faces} faces, watertight" in made.describe()


def test_without_a_folder_nothing_is_written_and_images_need_no_file(pipeline, tmp_path):
    (name, image), (_, other) = pictures(2)
    jobs = [Job(name, image), Job("views", {"front": other})]
    first, second = run_batch(pipeline, jobs, seed=1)
    assert first.file is first.generated.file is None
    assert "file" not in first.generated.to_json()
    assert np.array_equal(first.generated.mesh.vertices, pipeline(image, seed=1).vertices)
    assert np.array_equal(second.generated.mesh.vertices, pipeline(other, seed=1).vertices)
    black = Job("night", Image.new("RGB", (4, 2)))
    (outcome,) = run_batch(pipeline, [black])
    assert str(outcome.error) == "night: no object in this picture"


def test_outcomes_come_one_by_one(pipeline, photos, tmp_path):
    outcomes = run_batch(pipeline, jobs_of([photos]), out=tmp_path / "out")
    assert pipeline.made == []
    next(outcomes)
    assert pipeline.made == ["a"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.glb"]
    outcomes.close()
    assert pipeline.made == ["a"]


def test_mistakes_are_found_before_the_work(pipeline, photos, tmp_path):
    jobs = jobs_of([photos])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        run_batch(pipeline, jobs, out=tmp_path / "file")
    with pytest.raises(UserError, match="an STL file cannot hold the settings"):
        run_batch(pipeline, jobs, out=tmp_path / "out", format="stl", resume=True)
    with pytest.raises(UserError, match="no mesh format 'fbx'"):
        run_batch(pipeline, jobs, out=tmp_path / "out", format="fbx")
    with pytest.raises(UserError, match="view 'left': tiny takes one image"):
        run_batch(pipeline, [job_of_views({"left": photos / "a.png"})])
    assert pipeline.made == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("phase", "done", "finished"),
    [("meshes", 0, 0), ("denoise", 2, 0), ("meshes", 2, 1), ("meshes", 3, 2)],
)
def test_cancelled_between_and_inside_images_then_resumed(
    pipeline, photos, tmp_path, phase, done, finished
):
    jobs, out = jobs_of([photos]), tmp_path / "out"
    control = Control(lambda at: (at.phase, at.done) == (phase, done) and control.cancel())
    outcomes = []
    if (phase, done) == ("meshes", 3):  # after the last one there is nothing to cancel
        outcomes = list(run_batch(pipeline, jobs, out=out, control=control))
    else:
        with pytest.raises(Cancelled):
            outcomes.extend(run_batch(pipeline, jobs, out=out, control=control))
    there = {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else {}
    assert len(there) == finished
    assert all(name in ("a.glb", "c.glb") for name in there)
    times = {name: (out / name).stat().st_mtime_ns for name in there}
    pipeline.made.clear()
    again = list(run_batch(pipeline, jobs, out=out, resume=True))
    kept = [outcome.job.name for outcome in again if outcome.file and outcome.generated is None]
    assert kept == [Path(name).stem for name in sorted(there)]
    assert pipeline.made == [name for name in "abc" if name not in kept]
    assert times == {name: (out / name).stat().st_mtime_ns for name in there}
    whole = tmp_path / "whole"
    list(run_batch(pipeline, jobs, out=whole))
    for name in ("a.glb", "c.glb"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("suffix", ["glb", "obj", "ply"])
def test_what_counts_as_made(pipeline, photos, tmp_path, suffix):
    jobs, out = jobs_of([photos / "a.png"]), tmp_path / "out"
    file = out / f"a.{suffix}"

    def made(**options) -> bool:
        """Whether a resumed batch made the mesh again."""
        (outcome,) = run_batch(pipeline, jobs, out=out, format=suffix, resume=True, **options)
        assert outcome.error is None
        return outcome.generated is not None

    assert made()
    assert not made()
    for change in ({"seed": 1}, {"steps": 2}, {"guidance": 1.5}, {"resolution": 24}):
        assert made(**change)
        assert not made(**change)
        assert made()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])  # as a copy that was cut short
    assert made()
    assert file.read_bytes() == whole
    save(pipeline(Image.open(photos / "a.png")), file, {"by": "somebody else"})
    assert made()
    later = file.stat().st_mtime + 10
    os.utime(photos / "a.png", (later, later))
    assert made()  # the image has changed since
    os.utime(photos / "a.png", (1, 1))
    assert not made()
    pipeline.source_sha256 = "1" * 64
    assert made()


def test_progress_counts_the_meshes(pipeline, photos, tmp_path):
    seen = []
    list(run_batch(pipeline, jobs_of([photos]), control=Control(seen.append)))
    meshes = [at for at in seen if at.phase == "meshes"]
    assert meshes == [Progress("meshes", done, 3) for done in range(4)]
    assert {at.phase for at in seen} >= {"meshes", "denoise"}


def test_jobs(photos, tmp_path):
    assert [job.name for job in jobs_of([photos])] == ["a", "b", "c"]
    job = job_of_views({"back": photos / "b.png", "front": photos / "a.png"})
    assert (job.name, job.label) == ("b", str(photos / "b.png"))
    assert len(job.images()) == 2
    for mistake, words in (
        (lambda: jobs_of([]), "no image: name images or folders"),
        (lambda: jobs_of([photos, photos / "a.png"]), "two images are called 'a'"),
        (lambda: jobs_of([tmp_path / "none"]), "no such file"),
        (lambda: job_of_views({"front": photos}), "expected one image"),
        (lambda: job_of_views(dict.fromkeys(("front", "left"), photos / "a.png")), "same image"),
    ):
        with pytest.raises(UserError, match=words):
            mistake()
