"""The vitality analysis on a real, tiny pipeline: known blocks, interruptions, jobs, statistics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_pipeline import IDLE, STRONG, Ellipsoids, Vanishing, pictures, tiny_pipeline

from vitapack.compressor.vitality.ablation import chamfer
from vitapack.compressor.vitality.analyze import analyze
from vitapack.compressor.vitality.table import (
    Vitality,
    debias,
    describe,
    sigmas_above,
    spearman,
    split_halves,
)
from vitapack.runtime.errors import UserError
from vitapack.runtime.pipeline.pipeline import Pipeline
from vitapack.runtime.progress import Cancelled, Control, Progress

BLOCKS = 7
POINTS = 200


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def undisturbed(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "vitality.json"
    analyze(pipeline, pictures(4), out, points=POINTS, curve_images=2)
    return out


@pytest.fixture(scope="module")
def reference(undisturbed: Path) -> bytes:
    """The file of an analysis that nothing disturbed."""
    return undisturbed.read_bytes()


@pytest.fixture(scope="module")
def reference_journal(undisturbed: Path) -> bytes:
    return undisturbed.with_name("vitality.journal.jsonl").read_bytes()


def test_known_blocks(pipeline: Pipeline, tmp_path: Path) -> None:
    out = tmp_path / "vitality.json"
    seen: list[Progress] = []
    vitality = analyze(pipeline, pictures(5), out, points=400, control=Control(seen.append))
    assert Vitality.load(out) == vitality
    for block in vitality.blocks:
        idle = (block.kind, block.index) in IDLE
        assert block.sigmas < 4 or not idle
        assert (block.latent_mse == 0) == idle
        assert (block.iou == 1) == idle
        assert block.low <= block.mean <= block.high
        assert block.debiased <= block.mean
        assert block.missing == 0
        if idle:
            assert block.debiased < 0.3 * block.floor
    for kind, index in STRONG.items():
        strong = vitality.ranked(kind)[-1]
        assert strong.index == index
        assert not strong.non_vital
    assert vitality.stability["all"].mean > 0.7
    assert vitality.agreement["1 - iou"] > 0.8
    # The two idle blocks go first in every order, and cost nothing together.
    for name in ("merged", "balanced"):
        first = vitality.curves[name][:2]
        assert {(point.kind, point.index) for point in first} == set(IDLE)
        assert first[-1].iou == 1
        assert first[-1].sigmas <= 2
    assert vitality.curves["balanced"][-1].reach > vitality.curves["balanced"][0].reach
    # Every row can be found again, and the means are theirs.
    rows = [row for row in vitality.rows if row["removed"] == [["double", 0]]]
    assert len(rows) == 5
    assert vitality.of("double", 0).mean == pytest.approx(
        np.mean([row["distance"] for row in rows])
    )
    phases = [at.phase for at in seen]
    assert list(dict.fromkeys(phases)) == [
        "full model", "one block left out", "blocks removed in turn"
    ]  # fmt: skip
    for phase in set(phases):
        last = [at for at in seen if at.phase == phase][-1]
        assert last.done == last.total
    text = describe(vitality)
    assert "at the sampling floor" in text
    assert "Spearman" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "vitality.journal.jsonl", "vitality.json"
    ]  # fmt: skip


def test_bytes_are_the_checkpoints(pipeline: Pipeline, reference: bytes) -> None:
    data = json.loads(reference)
    whole = sum(2 * tensor.numel() for tensor in pipeline.dit.state_dict().values())
    assert data["rest_bytes"] + sum(block["bytes"] for block in data["blocks"]) == whole
    block = pipeline.dit.double_blocks["2"]
    sizes = {b["bytes"] for b in data["blocks"] if b["kind"] == "double"}
    assert sizes == {sum(2 * tensor.numel() for tensor in block.state_dict().values())}


class Stopped(BaseException):
    """As KeyboardInterrupt, but not pytest's."""


class Counting(Pipeline):
    runs = 0

    def latents(self, *args, **kwargs):
        Counting.runs += 1
        return super().latents(*args, **kwargs)


@pytest.mark.parametrize("stop", [2, 17, 40])
@pytest.mark.parametrize("how", [Stopped, Cancelled])
def test_resumed_is_identical(reference: bytes, tmp_path: Path, stop: int, how: type) -> None:
    """Interrupted or cancelled in each phase, with half a line left in the journal: the same bytes,
    and at most the generation in flight done twice."""
    pipeline = tiny_pipeline()
    pipeline.__class__ = Counting
    out = tmp_path / "vitality.json"
    journal = tmp_path / "vitality.journal.jsonl"

    def until(at: Progress) -> None:
        if Counting.runs >= stop:
            if how is Stopped:
                raise Stopped
            control.cancel()

    Counting.runs = 0
    control, few = Control(until), {"points": POINTS, "curve_images": 2}
    with pytest.raises(how):
        analyze(pipeline, pictures(4), out, control=control, resume=True, **few)
    assert not out.exists()
    with journal.open("ab") as file:
        file.write(b'{"task": "full 1')
    analyze(pipeline, pictures(4), out, points=POINTS, curve_images=2, resume=True)
    assert out.read_bytes() == reference
    once = len(journal.read_text().splitlines()) - 1
    pairs = sum('"task": "pair' in line for line in journal.read_text().splitlines())
    assert once - pairs <= Counting.runs <= once - pairs + 1


@settings(max_examples=4, deadline=None)
@given(st.floats(0, 1))
def test_resumed_from_any_cut(
    pipeline: Pipeline,
    reference: bytes,
    reference_journal: bytes,
    tmp_path_factory: pytest.TempPathFactory,
    share: float,
) -> None:
    """Whatever part of the journal is left, and with the cached outputs lost."""
    folder = tmp_path_factory.mktemp("cut")
    out, journal = folder / "vitality.json", folder / "vitality.journal.jsonl"
    journal.write_bytes(reference_journal[: int(share * len(reference_journal))])
    analyze(pipeline, pictures(4), out, points=POINTS, curve_images=2, resume=True)
    assert out.read_bytes() == reference


def test_more_images_reuse_the_journal(pipeline: Pipeline, tmp_path: Path) -> None:
    out = tmp_path / "vitality.json"
    analyze(pipeline, pictures(2), out, points=64, curve=False)
    before = (tmp_path / "vitality.journal.jsonl").read_text()
    more = analyze(pipeline, pictures(3), out, points=64, curve=False, resume=True)
    after = (tmp_path / "vitality.journal.jsonl").read_text()
    assert after.startswith(before)
    assert sum('"task": "without' in line for line in after.splitlines()) == 3 * BLOCKS
    fresh = analyze(pipeline, pictures(3), tmp_path / "fresh.json", points=64, curve=False)
    assert more == fresh


def test_jobs_give_the_same_file(pipeline: Pipeline, reference: bytes, tmp_path: Path) -> None:
    out = tmp_path / "vitality.json"
    analyze(pipeline, pictures(4), out, points=POINTS, curve_images=2, jobs=2)
    assert out.read_bytes() == reference


def test_worker_processes_are_cancelled(
    pipeline: Pipeline, reference: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "vitality.json"
    few = {"points": POINTS, "curve_images": 2, "jobs": 2, "resume": True}
    control = Control(lambda at: at.phase == "one block left out" and control.cancel())
    with pytest.raises(Cancelled):
        analyze(pipeline, pictures(4), out, control=control, **few)
    assert not out.exists()
    analyze(pipeline, pictures(4), out, **few)
    assert out.read_bytes() == reference


def test_journal_of_other_settings(pipeline: Pipeline, tmp_path: Path) -> None:
    out = tmp_path / "vitality.json"
    first = analyze(pipeline, pictures(1), out, points=64, curve=False)
    with pytest.raises(UserError, match="another model or other settings"):
        analyze(pipeline, pictures(1), out, points=65, curve=False, resume=True)
    with pytest.raises(UserError, match="another model or other settings"):
        analyze(pipeline, pictures(1), out, points=64, steps=4, curve=False, resume=True)
    second = analyze(pipeline, pictures(1), out, points=65, curve=False)
    assert second.settings["points"] == 65
    assert first.settings["points"] == 64
    assert first.stability == {}


def test_no_surface_is_the_collapsed_shape(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(Vanishing())
    vitality = analyze(pipeline, pictures(2), tmp_path / "v.json", points=POINTS, curve_images=2)
    block = vitality.of("double", 0)
    rows = [row for row in vitality.rows if row["removed"] == [["double", 0]]]
    lost = [row for row in rows if not row["surface"]]
    assert block.missing == len(lost) > 0
    assert f"no surface in {len(lost)} of 2" in describe(vitality)
    assert vitality.ranked()[-1] == block
    for row in lost:
        assert row["iou"] == 0
        assert row["latent_mse"] > 0
        assert 0.2 < row["distance"] < 3**0.5  # mean distance to the centroid, half side 1


def test_broken_network(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.dit.double_blocks["0"].img_mlp[2].bias.fill_(float("inf"))
    words = r"no image gave a shape; picture0: .*NaN or infinite"
    with pytest.raises(UserError, match=words):
        analyze(pipeline, pictures(2), tmp_path / "v.json", points=64)


def test_skipped_images(pipeline: Pipeline, tmp_path: Path) -> None:
    black = Image.new("RGB", (4, 2))
    vitality = analyze(
        pipeline, [("black", black), *pictures(1)], tmp_path / "v.json", points=64, curve_images=1
    )
    assert {row["image"] for row in vitality.rows} == {"picture0"}
    assert "no object" in vitality.images[0]["skipped"]
    assert "skipped black" in describe(vitality)
    with pytest.raises(UserError, match="no image gave a shape; black: black: no object"):
        analyze(pipeline, [("black", black)], tmp_path / "w.json", points=64)


def test_chamfer_metric(pipeline: Pipeline, tmp_path: Path) -> None:
    vitality = analyze(
        pipeline, pictures(3), tmp_path / "v.json", points=POINTS, metric="chamfer", curve=False
    )
    for block in vitality.blocks:
        assert block.sigmas < 4 or (block.kind, block.index) not in IDLE
        assert block.mean == pytest.approx(block.chamfer)
    assert not vitality.of("double", STRONG["double"]).non_vital
    assert vitality.ranked()[-1].index == STRONG["double"]


def test_frame_takes_out_the_size(pipeline: Pipeline, tmp_path: Path) -> None:
    """The same shapes ten times larger: the same distances, up to float32 vertices."""

    class Large(Ellipsoids):
        bounds = 10.0

    few = {"points": 64, "curve": False}
    small = analyze(pipeline, pictures(2), tmp_path / "small.json", **few)
    large = analyze(tiny_pipeline(Large()), pictures(2), tmp_path / "large.json", **few)
    for a, b in zip(small.blocks, large.blocks, strict=True):
        assert a.mean == pytest.approx(b.mean, rel=0.02)  # certified to 1 %
        assert a.chamfer == pytest.approx(b.chamfer, rel=1e-3)


def test_steps_and_guidance_are_the_pipelines(pipeline: Pipeline, tmp_path: Path) -> None:
    few = {"points": 64, "curve": False}
    default = analyze(pipeline, pictures(1), tmp_path / "a.json", **few)
    same = analyze(pipeline, pictures(1), tmp_path / "b.json", steps=3, guidance=2.0, **few)
    other = analyze(pipeline, pictures(1), tmp_path / "c.json", guidance=1.0, **few)
    assert default.settings["sampler"]["steps"] == 3
    assert default == same
    assert default.blocks != other.blocks


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metric": "emd2"}, "no metric 'emd2'"),
        ({"points": 3}, "3 points"),
        ({"gap": 0.0}, "gap 0.0"),
        ({"jobs": 0}, "at least 1"),
        ({"steps": 0}, "steps"),
        ({"guidance": -1.0}, "guidance"),
        ({"images": []}, "no images"),
        ({"images": pictures(1) * 2}, "two images are called 'picture0'"),
        ({"images": [("a", pictures(1)[0][1]), ("b", pictures(1)[0][1])]}, "a and b are the same"),
    ],
)
def test_user_mistakes(pipeline: Pipeline, tmp_path: Path, change: dict, words: str) -> None:
    arguments = {"images": pictures(1), **change}
    with pytest.raises(UserError, match=words):
        analyze(pipeline, arguments.pop("images"), tmp_path / "v.json", **arguments)
    assert not (tmp_path / "v.json").exists()


def test_pruned_model_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.dit = pipeline.dit.without(("single", 1))
    with pytest.raises(UserError, match="already pruned"):
        analyze(pipeline, pictures(1), tmp_path / "v.json")


def test_unwritable_place(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        analyze(pipeline, pictures(1), tmp_path / "file" / "v.json")


def test_chamfer_is_the_papers_sum() -> None:
    x = np.array([[0.0, 0, 0], [1, 0, 0]])
    y = np.array([[0.0, 0, 0.5], [0, 0, 0.5]])
    assert chamfer(x, y) == pytest.approx((0.25 + 1.25) / 2 + 0.25)


def test_debias() -> None:
    assert debias(0.5, 0.3, "emd") == pytest.approx(0.4)
    assert debias(0.29, 0.3, "emd") == 0
    assert debias(0.5, 0.3, "chamfer") == pytest.approx(0.2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=20))
def test_spearman_is_scipys(pairs: list[tuple[int, int]]) -> None:
    from scipy.stats import spearmanr

    a, b = zip(*pairs, strict=True)
    ours = spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_sigmas_are_calibrated() -> None:
    """Where nothing changed, 2 sigmas are exceeded as often as by chance (2.3 %, and a little more
    since the variance is estimated); a change of half a sigma an image shows with 32 images."""
    rng = np.random.default_rng(4)
    exceeded, found = 0, 0
    for _ in range(400):
        base = rng.uniform(0.02, 0.08, 32)  # floors differ between images
        floors = base[:, None] + 0.001 * rng.standard_normal((32, 3))
        raw = base + 0.001 * rng.standard_normal(32)
        exceeded += sigmas_above(raw.mean(), floors.mean(), floors.tolist()) > 2
        found += sigmas_above(raw.mean() + 0.0005, floors.mean(), floors.tolist()) > 2
    assert 0.01 < exceeded / 400 < 0.05
    assert found / 400 > 0.5


def test_split_halves() -> None:
    """1 for an order that every image shares, about 0 for chance, None for too little."""
    rng = np.random.default_rng(3)
    order = np.arange(20.0) + rng.random((12, 20)) * 0.4
    assert split_halves(order).mean == pytest.approx(1)
    chance = split_halves(rng.random((12, 20)))
    assert abs(chance.mean) < 0.3
    assert chance.low < chance.mean < chance.high
    assert split_halves(order[:3]) is None
    assert split_halves(order[:, :2]) is None
    assert split_halves(np.ones((8, 5))) is None


def test_threads_are_left_alone(pipeline: Pipeline, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    analyze(pipeline, pictures(1), tmp_path / "v.json", points=64, curve=False)
    assert torch.get_num_threads() == before
