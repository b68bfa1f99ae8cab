"""Metrics against shapes whose answers are known, and folders as users have them."""

import json

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from vitapack.compressor.evaluate.alignment import align
from vitapack.compressor.evaluate.metrics import (
    METRICS,
    Metric,
    compare,
    describe,
    evaluate_folders,
    grid_iou,
    grid_iou_tolerant,
    summarise,
)
from vitapack.compressor.evaluate.voxels import lattice_around, surface_voxels, voxelise
from vitapack.compressor.options import EvaluateSettings
from vitapack.runtime.decode.mesh import Mesh, save, surface_from_grid
from vitapack.runtime.errors import UserError
from vitapack.runtime.progress import Cancelled, Control, Progress

FAST = EvaluateSettings(points=2000, emd_points=0)
STILL = EvaluateSettings(points=2000, emd_points=0, align="none")


def axes(nodes: int) -> np.ndarray:
    line = np.linspace(-1.0, 1.0, nodes)
    return np.stack(np.meshgrid(line, line, line, indexing="ij"))


def sphere(radius=0.5, nodes=49) -> Mesh:
    return surface_from_grid(radius - np.linalg.norm(axes(nodes), axis=0), 1.0)


def chair(nodes=61) -> Mesh:
    """No two of its 24 turned copies look alike: an armrest on one side only."""
    places = axes(nodes)

    def box(centre, half):
        apart = np.abs(places - np.reshape(centre, (3, 1, 1, 1))) - np.reshape(half, (3, 1, 1, 1))
        return -apart.max(axis=0)

    parts = [box((0, -0.1, 0), (0.5, 0.08, 0.5)), box((0, 0.4, -0.43), (0.5, 0.5, 0.07))]
    parts += [box((x, -0.5, z), (0.09, 0.4, 0.09)) for x in (-0.4, 0.4) for z in (-0.4, 0.4)]
    parts += [box((0.42, 0.15, 0.0), (0.08, 0.08, 0.45))]
    return surface_from_grid(np.max(parts, axis=0), 1.0)


def square(half: float, z: float) -> Mesh:
    corners = [[-half, -half, z], [half, -half, z], [half, half, z], [-half, half, z]]
    return Mesh(np.array(corners), np.array([[0, 1, 2], [0, 2, 3]]))


def moved(mesh: Mesh, shift=(0, 0, 0), turn=None, scale=1.0) -> Mesh:
    turn = np.eye(3) if turn is None else turn
    return Mesh(scale * mesh.vertices @ turn.T + np.asarray(shift), mesh.faces)


def joined(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0, *[len(mesh.vertices) for mesh in meshes]])
    return Mesh(
        np.vstack([mesh.vertices for mesh in meshes]),
        np.vstack([mesh.faces + start for mesh, start in zip(meshes, starts, strict=False)]),
    )


def sphere_overlap(radius: float, offset: float) -> float:
    if offset >= 2 * radius:
        return 0.0
    lens = np.pi * (4 * radius + offset) * (2 * radius - offset) ** 2 / 12
    return lens / (8 / 3 * np.pi * radius**3 - lens)


@pytest.mark.parametrize("offset", [0.0, 0.1, 0.35, 0.7, 1.2])
def test_volume_overlap_of_two_spheres(offset):
    resolution = 96
    row = compare(
        sphere(),
        moved(sphere(), (offset, 0, 0)),
        EvaluateSettings(resolution=resolution, points=500, emd_points=0, align="none"),
    )
    # The stated bias: solids are half a voxel thicker all round.
    thick = 0.5 * (1 + 1 / resolution)
    assert row["v_iou"] == pytest.approx(sphere_overlap(thick, offset), abs=0.012)
    assert (row["s_iou"] == 1.0) == (offset == 0.0)


def test_surface_voxels_of_a_plane_and_of_one_far_away():
    lattice = lattice_around(square(1.0, 0.0), resolution=33)
    assert surface_voxels(square(1.0, 0.0), lattice).sum() == 33 * 33
    assert surface_voxels(moved(square(1.0, 0.0), (50, 0, 0)), lattice).sum() == 0
    everywhere = surface_voxels(square(1e4, 0.0), lattice)  # larger than the lattice
    assert everywhere[:, :, everywhere.any(axis=(0, 1))].mean() > 0.5


@pytest.mark.parametrize("seed", range(4))
def test_no_turned_box_leaks(seed):
    """The flood must not slip through the surface at any angle, nor at any resolution."""
    turn = Rotation.random(rng=seed).as_matrix()
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-0.3, 0.3) for z in (-0.7, 0.7)])
    import trimesh

    box = trimesh.convex.convex_hull(corners @ turn.T)
    mesh = Mesh(box.vertices, box.faces)
    for resolution in (16, 41, 64):
        lattice = lattice_around(mesh, resolution=resolution)
        volume = voxelise(mesh, lattice)[1].sum() * lattice.pitch**3
        thick = np.prod(np.array([2, 0.6, 1.4]) + lattice.pitch)
        assert volume == pytest.approx(thick, rel=0.12)


def test_solids_of_holed_overlapping_and_inside_out_meshes():
    whole = sphere()
    lattice = lattice_around(whole, resolution=64)
    surface, solid = voxelise(whole, lattice)
    # A hole of two voxels: without sealing the flood would empty the sphere.
    centres = whole.vertices[whole.faces].mean(axis=1)
    holed = Mesh(whole.vertices, whole.faces[np.linalg.norm(centres - [0.5, 0, 0], axis=1) > 0.025])
    assert len(holed.faces) < len(whole.faces)
    assert grid_iou(voxelise(holed, lattice)[1], solid) > 0.99
    inside_out = Mesh(whole.vertices, whole.faces[:, ::-1])
    assert grid_iou(voxelise(inside_out, lattice)[1], solid) > 0.999
    doubled = joined(whole, moved(whole, scale=0.5), moved(inside_out, (0.1, 0, 0), scale=0.6))
    assert grid_iou(voxelise(doubled, lattice)[1], solid) > 0.999
    # A hole of a quarter of the sphere: what is left is the shell.
    bowl = Mesh(whole.vertices, whole.faces[centres[:, 0] < 0.3])
    assert voxelise(bowl, lattice)[1].sum() < 0.5 * solid.sum()
    assert surface.sum() < solid.sum()


def test_chamfer_and_f_score_of_parallel_squares():
    # In the reference's frame (square 2 wide) the candidate lies 0.03 or 0.08 away.
    near = compare(square(1, 0), square(1, 0), STILL)
    settings = EvaluateSettings(points=8000, emd_points=0, align="none")
    close = compare(square(1, 0), moved(square(1, 0), (0, 0, 0.04)), settings)
    apart = compare(square(1, 0), moved(square(1, 0), (0, 0, 0.2)), settings)
    assert near["chamfer"] < 0.03  # sampling: 2,000 points on area 4
    assert apart["chamfer"] == pytest.approx(0.2, rel=0.01)
    assert apart["chamfer_squared"] == pytest.approx(2 * 0.2**2, rel=0.02)
    assert close["f_score"] > 0.99
    assert apart["f_score"] == 0.0


def test_f_score_halves_when_half_is_missing():
    row = compare(joined(sphere(), moved(sphere(), (1.5, 0, 0))), sphere(), STILL)
    assert row["precision"] > 0.99
    assert row["recall"] == pytest.approx(0.5, abs=0.05)
    assert row["f_score"] == pytest.approx(2 / 3, abs=0.05)


def test_emd_of_a_moved_sheet_and_its_floor():
    settings = EvaluateSettings(points=500, emd_points=400, align="none")
    row = compare(square(1, 0), moved(square(1, 0), (0, 0, 0.5)), settings)
    assert row["emd"] == pytest.approx(0.5, rel=0.05)
    assert 0 < row["emd_floor"] < 0.15
    assert "emd" not in compare(square(1, 0), square(1, 0), STILL)


def test_units_are_those_of_the_reference():
    small = compare(sphere(), moved(sphere(), (0.1, 0, 0)), STILL)
    large = compare(
        moved(sphere(), (7, 8, 9), scale=100), moved(sphere(), (17, 8, 9), scale=100), STILL
    )
    for name in ("v_iou", "s_iou", "chamfer", "f_score"):
        assert large[name] == pytest.approx(small[name], abs=0.01)


def test_equal_meshes_are_left_in_place():
    row = compare(chair(), chair(), FAST)
    assert row["v_iou"] == row["s_iou"] == row["v_iou_tolerant"] == 1.0
    assert row["alignment"] == {"degrees": 0.0, "shift": 0.0, "scale": 1.0}
    assert row["watertight"]


@pytest.mark.parametrize("seed", range(3))
def test_a_turned_copy_is_found(seed):
    turn = Rotation.random(rng=seed).as_matrix()
    copy = moved(chair(), (0.3, -0.2, 0.5), turn)
    assert compare(chair(), copy, STILL)["s_iou"] < 0.3
    row = compare(chair(), copy, FAST)
    assert row["s_iou"] > 0.97
    assert row["v_iou"] > 0.98
    back = align(copy, chair()).rotation @ turn
    assert np.degrees(np.arccos(np.clip((np.trace(back) - 1) / 2, -1, 1))) < 0.5


def test_a_turned_scaled_retriangulated_copy_is_found_with_scale_only():
    turn = Rotation.from_euler("y", 100, degrees=True).as_matrix()
    copy = moved(chair(77), (3, 0, 1), turn, scale=2.5)
    settings = EvaluateSettings(points=2000, emd_points=0, align="similarity")
    row = compare(chair(), copy, settings)
    assert row["s_iou"] > 0.9
    assert row["alignment"]["scale"] * 2.5 == pytest.approx(1.0, rel=0.1)
    assert compare(chair(), copy, FAST)["s_iou"] < 0.5


def test_alignment_finds_no_mirror_images():
    mirrored = Mesh(chair().vertices * [-1, 1, 1], chair().faces[:, ::-1])
    found = align(mirrored, chair())
    assert np.linalg.det(found.rotation) == pytest.approx(1.0)
    assert compare(chair(), mirrored, FAST)["v_iou"] < 0.95


def test_alignment_never_lowers_the_surface_overlap():
    other = moved(sphere(), (0.0, 0.02, 0.0))
    assert compare(chair(), other, FAST)["s_iou"] >= compare(chair(), other, STILL)["s_iou"]


def test_compare_is_deterministic():
    assert compare(chair(), sphere(), FAST) == compare(chair(), sphere(), FAST)


def test_nothing_to_compare_is_a_plain_line():
    point = Mesh(np.zeros((3, 3)), np.array([[0, 1, 2]]))
    empty = Mesh(np.zeros((0, 3)), np.zeros((0, 3)))
    for bad in (point, empty):
        with pytest.raises(UserError, match="candidate mesh has no faces"):
            compare(sphere(), bad, FAST)
        with pytest.raises(UserError, match="reference mesh has no faces"):
            compare(bad, sphere(), FAST)


def test_a_candidate_far_away_or_huge_scores_nothing():
    assert compare(sphere(), moved(sphere(), (1e5, 0, 0)), STILL)["v_iou"] == 0.0
    assert compare(sphere(), moved(sphere(), scale=1e3), STILL)["v_iou"] == 0.0
    huge = compare(sphere(), moved(square(1, 0.1), scale=1e4), STILL)
    assert huge["v_iou"] == 0.0


@pytest.mark.parametrize(
    "wrong", [{"align": "affine"}, {"resolution": 2}, {"points": 1}, {"tau": 0.0}, {"tau": -1.0}]
)
def test_bad_settings(wrong):
    with pytest.raises(UserError):
        EvaluateSettings(**wrong)


# Grids


def test_grid_iou_counts_by_hand():
    a, b = np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4), bool)
    a[0, 0, :4], b[0, 0, 2:] = True, True
    b[3, 3, 3] = True
    assert grid_iou(a, b) == pytest.approx(2 / 5)
    # Voxels 1, 2, 3 of a's four touch b; both of b's row do, its corner does not: m = 2.5.
    assert grid_iou_tolerant(a, b) == pytest.approx(2.5 / (2.5 + 1 + 1))
    assert grid_iou(a, a) == grid_iou_tolerant(a, a) == 1.0
    assert grid_iou(a & False, b & False) == 1.0
    assert grid_iou(a, b & False) == grid_iou_tolerant(a, b & False) == 0.0


def test_one_voxel_shift_is_tolerated_and_two_are_not():
    a = np.zeros((16, 16, 16), bool)
    a[4:8, 4:8, 4:5] = True  # a sheet
    assert grid_iou(a, np.roll(a, 1, axis=2)) == 0.0
    assert grid_iou_tolerant(a, np.roll(a, (1, 1, 1), (0, 1, 2))) == 1.0
    assert grid_iou_tolerant(a, np.roll(a, 2, axis=2)) == 0.0


def test_batches_levels_and_tensors_agree_with_single_grids():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(2, 3, 6, 5, 7)).astype(np.float32)
    b = a + rng.normal(scale=0.5, size=a.shape).astype(np.float32)
    for measure in (grid_iou, grid_iou_tolerant):
        whole = measure(a, b, level=0.2)
        assert whole.shape == (2, 3)
        assert whole[1, 2] == measure(a[1, 2] > 0.2, b[1, 2] > 0.2)
        tensors = measure(torch.from_numpy(a), torch.from_numpy(b), level=0.2)
        assert isinstance(tensors, np.ndarray)
        assert np.array_equal(whole, tensors)
        assert isinstance(measure(torch.from_numpy(a[0, 0]), torch.from_numpy(b[0, 0])), float)
        assert measure((a > 0).astype(np.uint8), (b > 0).astype(np.uint8))[0, 0] == measure(
            a[0, 0], b[0, 0]
        )


def test_grids_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="expected equal"):
        grid_iou(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="X, Y, Z"):
        grid_iou_tolerant(np.zeros((2, 2)), np.zeros((2, 2)))


# Folders


def test_folders_of_mixed_formats(tmp_path):
    save(sphere(), tmp_path / "a" / "ball.glb")
    save(chair(), tmp_path / "a" / "chair.obj")
    save(chair(), tmp_path / "a" / "alone.ply")
    save(sphere(0.45), tmp_path / "b" / "ball.stl")
    save(chair(), tmp_path / "b" / "chair.ply")
    save(chair(), tmp_path / "b" / "extra.ply")
    (tmp_path / "b" / "notes.txt").write_text("not a mesh")
    calls = []
    result = evaluate_folders(
        tmp_path / "a", str(tmp_path / "b"), FAST, control=Control(calls.append)
    )
    assert calls == [Progress("pairs", done, 2) for done in range(3)]
    cancelled = Control()
    cancelled.cancel()
    with pytest.raises(Cancelled):
        evaluate_folders(tmp_path / "a", tmp_path / "b", FAST, control=cancelled)
    assert [row["name"] for row in result["pairs"]] == ["ball", "chair"]
    assert result["only_in_reference"] == ["alone"]
    assert result["only_in_candidate"] == ["extra"]
    ball, same = result["pairs"]
    assert ball["v_iou"] == pytest.approx(0.9**3, abs=0.03)
    assert same["s_iou"] == 1.0
    summary = result["summary"]["v_iou"]
    assert summary["mean"] == pytest.approx((ball["v_iou"] + 1) / 2)
    assert summary["low"] <= summary["mean"] <= summary["high"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    text = describe(result)
    narrow = {"mean": 0.00041034, "median": 0.00041034, "low": 0.0, "high": 1.0, "n": 2}
    line = describe(result | {"summary": {"chamfer_squared": narrow}}).splitlines()[2]
    assert line.split()[1:3] == ["0.0004103", "0.0004103"]  # two columns, not one number
    assert "V-IoU" in text
    assert "only among the references: alone" in text


def test_summary_interval_covers_the_mean_and_narrows():
    rng = np.random.default_rng(1)
    few, many = ([{"v_iou": float(v)} for v in rng.normal(0.5, 0.1, n)] for n in (10, 1000))
    wide, narrow = summarise(few)["v_iou"], summarise(many)["v_iou"]
    assert narrow["high"] - narrow["low"] == pytest.approx(4 * 0.1 / np.sqrt(1000), rel=0.15)
    assert wide["high"] - wide["low"] > 3 * (narrow["high"] - narrow["low"])
    assert summarise(few) == summarise(few)
    assert set(summarise(few)) == {"v_iou"} <= set(METRICS)


def test_folder_mistakes_are_plain_lines(tmp_path):
    good, empty, other, twice = (tmp_path / name for name in ("good", "empty", "other", "twice"))
    save(sphere(), good / "ball.ply")
    save(sphere(), other / "globe.ply")
    empty.mkdir()
    with pytest.raises(UserError, match="no such folder"):
        evaluate_folders(good, tmp_path / "none")
    with pytest.raises(UserError, match="empty: has no meshes"):
        evaluate_folders(good, empty)
    with pytest.raises(UserError, match=r"no mesh of the same name \(ball against globe\)"):
        evaluate_folders(good, other)
    save(sphere(), twice / "ball.ply")
    save(sphere(), twice / "ball.obj")
    with pytest.raises(UserError, match="two meshes called 'ball'"):
        evaluate_folders(good, twice)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("", "empty"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\n", "no triangles"),
        ("v 0 0 0\nv 1 nan 0\nv 0 1 0\nf 1 2 3\n", "not finite"),
        ("v 0 0 0\nv 0 0 0\nv 0 0 0\nf 1 2 3\n", "no area"),
    ],
)
def test_unreadable_meshes_are_named(tmp_path, body, word):
    save(sphere(), tmp_path / "a" / "ball.ply")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "ball.obj").write_text(body)
    with pytest.raises(UserError, match=word) as found:
        evaluate_folders(tmp_path / "a", tmp_path / "b", FAST)
    assert "ball.obj" in str(found.value)
    assert "\n" not in str(found.value)


def test_a_new_metric_is_a_row_of_the_table(monkeypatch, tmp_path):
    faces = Metric("faces", True, "Faces of the candidate.", lambda pair: pair.topology.faces)
    monkeypatch.setitem(METRICS, "faces", faces)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save(sphere(), tmp_path / folder / "ball.glb")
    found = evaluate_folders(tmp_path / "a", tmp_path / "b", FAST)
    assert found["summary"]["faces"]["mean"] == len(sphere().faces)
    assert found["definitions"]["faces"] == "Faces of the candidate."
