"""The rasteriser against analytic silhouettes, depth order and itself."""

import numpy as np
import pytest
from PIL import Image

from vitapack.compressor.report.render import FIELD_OF_VIEW, Frame, contact_sheet, frame_of, render
from vitapack.runtime.decode.mesh import Mesh, surface_from_grid


def sphere(radius=0.7, nodes=41) -> Mesh:
    line = np.linspace(-1.01, 1.01, nodes)
    grid = np.stack(np.meshgrid(line, line, line, indexing="ij"))
    return surface_from_grid(radius - np.linalg.norm(grid, axis=0), 1.01)


def square(half: float, z: float) -> Mesh:
    corners = [[-half, -half, z], [half, -half, z], [half, half, z], [-half, half, z]]
    return Mesh(np.array(corners), np.array([[0, 1, 2], [0, 2, 3]]))


def joined(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0, *[len(mesh.vertices) for mesh in meshes]])
    return Mesh(
        np.vstack([mesh.vertices for mesh in meshes]),
        np.vstack([mesh.faces + start for mesh, start in zip(meshes, starts, strict=False)]),
    )


UNIT = Frame((0.0, 0.0, 0.0), 1.0)


def test_sphere_has_the_silhouette_of_a_sphere():
    image = render(sphere(), 128, frame=UNIT, background=None)
    assert image.shape == (128, 128, 4)
    assert image.dtype == np.uint8
    distance = 1.03 / np.sin(np.radians(FIELD_OF_VIEW / 2))
    focal = 64 / np.tan(np.radians(FIELD_OF_VIEW / 2))
    radius = focal * 0.7 / np.sqrt(distance**2 - 0.7**2)
    alpha = image[..., 3] / 255
    assert alpha.sum() == pytest.approx(np.pi * radius**2, rel=0.01)
    rows, columns = np.nonzero(alpha > 0.5)
    assert rows.mean() == pytest.approx(63.5, abs=0.3)
    assert columns.mean() == pytest.approx(63.5, abs=0.3)


@pytest.mark.parametrize(
    ("point", "angles", "place"),
    [
        ((0.5, 0, 0), (0, 0), "right"),
        ((0, 0.5, 0), (0, 0), "up"),
        ((0, 0, 0.5), (90, 0), "left"),  # seen from +x, the front points left
        ((0.5, 0, 0), (180, 0), "left"),
        ((0, 0, -0.5), (0, 90), "up"),  # seen from above, the back is up
    ],
)
def test_camera_looks_from_where_it_says(point, angles, place):
    small = sphere(0.1, 41)
    mesh = Mesh(small.vertices + np.array(point, np.float32), small.faces)
    rows, columns = np.nonzero(render(mesh, 64, *angles, frame=UNIT, background=None)[..., 3] > 127)
    right, up = columns.mean() - 31.5, 31.5 - rows.mean()
    want = {"right": (1, 0), "left": (-1, 0), "up": (0, 1)}[place]
    assert np.hypot(right, up) > 10
    assert np.array([right, up]) / np.hypot(right, up) == pytest.approx(want, abs=0.05)


def test_nearer_surfaces_hide_farther_ones_whatever_their_order():
    near, far = square(0.2, 0.5), square(0.6, -0.5)
    here = slice(31, 33), slice(31, 33)
    one, other = (
        render(mesh, 64, 0, 0, frame=UNIT)[here] for mesh in (joined(near, far), joined(far, near))
    )
    assert np.array_equal(one, other)
    turn = np.array([[1, 0, 0], [0, 0.8, 0.6], [0, -0.6, 0.8]])
    tilted = Mesh(square(0.2, 0).vertices @ turn + [0, 0, 0.5], near.faces)
    alone = render(tilted, 64, 0, 0, frame=UNIT)[32, 32].astype(int)
    over = render(joined(far, tilted), 64, 0, 0, frame=UNIT)[32, 32].astype(int)
    under = render(joined(far, tilted), 64, 180, 0, frame=UNIT)[32, 32].astype(int)
    assert np.abs(over - alone).max() <= 2
    assert np.abs(under - alone).max() > 10


def test_both_sides_are_lit_and_open_meshes_drawn():
    front = render(square(0.5, 0.0), 64, 0, 0)
    flipped = Mesh(square(0.5, 0.0).vertices, square(0.5, 0.0).faces[:, ::-1])
    assert np.abs(front.astype(int) - render(flipped, 64, 0, 0)).max() <= 1
    assert front[32, 32].min() > 60


def test_large_faces_leave_no_gap_between_them():
    alpha = render(square(0.6, 0.0), 96, 0, 0, frame=UNIT, background=None)[..., 3]
    rows, columns = np.nonzero(alpha == 255)
    assert (alpha[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] == 255).all()


def test_same_mesh_same_picture_and_sizes():
    mesh = sphere(nodes=21)
    assert np.array_equal(render(mesh, 50), render(mesh, 50))
    assert render(mesh, 33, samples=3).shape == (33, 33, 3)
    assert render(mesh, 1).shape == (1, 1, 3)


def test_empty_and_behind_the_camera_give_the_background():
    empty = Mesh(np.zeros((0, 3)), np.zeros((0, 3)))
    assert (render(empty, 16, background=(10, 20, 30)) == (10, 20, 30)).all()
    assert (render(empty, 16, background=None) == 0).all()
    behind = Mesh(square(0.5, 0).vertices + np.array([0, 0, 50], np.float32), square(0.5, 0).faces)
    assert (render(behind, 16, 0, 0, frame=UNIT) == 255).all()


def test_degenerate_faces_and_points_are_skipped():
    mesh = Mesh(np.zeros((3, 3)), np.array([[0, 1, 2], [0, 0, 1]]))
    assert render(mesh, 16).shape == (16, 16, 3)


def test_frame_holds_every_mesh_and_ignores_loose_vertices():
    left = Mesh(square(0.1, 0).vertices - np.array([2, 0, 0], np.float32), square(0.1, 0).faces)
    frame = frame_of(left, square(0.1, 0))
    assert frame.centre == pytest.approx((-1, 0, 0), abs=1e-6)
    assert frame.radius == pytest.approx(np.hypot(1.1, 0.1), abs=1e-6)
    loose = Mesh(np.vstack([left.vertices, [[9, 9, 9]]]), left.faces)
    assert frame_of(loose) == frame_of(left)


def test_contact_sheet_places_pictures_titles_and_gaps():
    red = np.zeros((40, 40, 3), np.uint8)
    red[..., 0] = 255
    wide = Image.new("RGBA", (80, 20), (0, 0, 255, 255))
    sheet = contact_sheet([("one", [red, None, wide]), ("two", [red])], ["a", "b", "c"], size=40)
    pixels = np.asarray(sheet)
    assert (pixels == (255, 0, 0)).all(axis=2).sum() == 2 * 40 * 40
    assert (pixels == (0, 0, 255)).all(axis=2).sum() == 40 * 10
    assert sheet.width >= 3 * 40
    side_by_side = contact_sheet([("one", [red]), ("two", [red])], across=2)
    assert side_by_side.width > side_by_side.height
    with pytest.raises(ValueError, match="uint8"):
        contact_sheet([("x", [np.zeros((4, 4))])])
