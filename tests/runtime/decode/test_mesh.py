"""Grid to mesh against analytic shapes, and every file format there and back."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitapack.runtime.decode.mesh import (
    FORMATS,
    Mesh,
    clean,
    encode,
    load,
    read_metadata,
    report,
    save,
    surface_from_grid,
)
from vitapack.runtime.errors import FormatError, UserError

ORIGIN = {
    "vitapack": "0.1.0",
    "seed": 7,
    "steps": 20,
    "packed_sha256": "0123456789abcdef" * 4,
    "note": 'quote " and \u00e9\nnew line',
}


def axes(nodes: int, bound: float) -> np.ndarray:
    line = np.linspace(-bound, bound, nodes)
    return np.stack(np.meshgrid(line, line, line, indexing="ij"))


def sphere_grid(radius=0.7, centre=(0.0, 0.0, 0.0), nodes=49, bound=1.01) -> np.ndarray:
    offset = axes(nodes, bound) - np.reshape(centre, (3, 1, 1, 1))
    return radius - np.linalg.norm(offset, axis=0)


@pytest.fixture(scope="module")
def sphere() -> Mesh:
    return surface_from_grid(sphere_grid(centre=(0.1, 0.0, -0.2)), 1.01)


def test_sphere_has_its_size_place_and_outward_winding(sphere):
    found = report(sphere)
    assert found.watertight
    assert (found.components, found.euler_number) == (1, 2)
    assert found.volume == pytest.approx(4 / 3 * np.pi * 0.7**3, rel=5e-3)
    assert found.area == pytest.approx(4 * np.pi * 0.7**2, rel=5e-3)
    distance = np.linalg.norm(sphere.vertices - [0.1, 0.0, -0.2], axis=1)
    assert abs(distance - 0.7).max() < 1e-3


def test_node_positions_fill_the_bounds_and_the_reference_scale_shrinks_them():
    plane = 0.27 - axes(33, 1.0)[0]  # inside: x < 0.27, so the surface lies there
    right = surface_from_grid(plane, 1.0)
    inner = right.vertices[np.abs(right.vertices[:, 1:]).max(axis=1) < 0.9]
    assert inner[:, 0].max() == pytest.approx(0.27, abs=1e-6)
    reference = surface_from_grid(plane, 1.0, reference_scale=True)
    inner = reference.vertices[np.abs(reference.vertices[:, 1:]).max(axis=1) < 0.85]
    assert inner[:, 0].max() == pytest.approx((0.27 + 1) * 32 / 33 - 1, abs=1e-6)


def test_six_bounds_and_unequal_sides():
    grid = sphere_grid(radius=0.5, nodes=33, bound=1.0)[:, :, 8:]  # z from -0.5 to 1
    mesh = surface_from_grid(grid, (-1, -1, -0.5, 1, 1, 1))
    assert abs(np.linalg.norm(mesh.vertices, axis=1) - 0.5).max() < 5e-3


def test_shape_that_leaves_the_bounds_is_closed_and_stays_in_them():
    found = surface_from_grid(sphere_grid(radius=1.2, nodes=33, bound=1.0), 1.0)
    assert report(found).watertight
    assert np.abs(found.vertices).max() <= 1 + 2 * 2 / 32 * 1e-3
    cube = surface_from_grid(0.5 - np.abs(axes(33, 1.0) - 0.8).max(axis=0), 1.0)
    assert report(cube).watertight
    assert report(cube).volume == pytest.approx(0.7**3, rel=0.03)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.5, -0.3]))
def test_any_noise_gives_a_closed_surface_with_distinct_vertices(seed, level):
    grid = np.random.default_rng(seed).normal(size=(9, 8, 10)).astype(np.float32)
    grid[np.random.default_rng(seed + 1).random(grid.shape) < 0.1] = level  # nodes on the level
    mesh = surface_from_grid(grid, 1.0, level)
    edges = np.sort(mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    assert (np.unique(edges, axis=0, return_counts=True)[1] % 2 == 0).all()
    assert len(np.unique(mesh.vertices, axis=0)) == len(mesh.vertices)
    assert report(mesh).volume > 0


def test_torch_grid_is_taken_as_it_is(sphere):
    torch = pytest.importorskip("torch")
    grid = torch.from_numpy(sphere_grid(centre=(0.1, 0.0, -0.2)).astype(np.float32))
    assert np.array_equal(surface_from_grid(grid, 1.01).vertices, sphere.vertices)


@pytest.mark.parametrize(
    ("value", "word"), [(-1.0, "empty"), (1.0, "full"), (0.0, "empty"), (np.nan, "NaN")]
)
def test_grid_without_a_surface_is_one_plain_line(value, word):
    with pytest.raises(UserError, match=word) as found:
        surface_from_grid(np.full((5, 5, 5), value), 1.0)
    assert "\n" not in str(found.value)


def test_one_nan_node_is_refused():
    grid = sphere_grid(nodes=17)
    grid[3, 4, 5] = np.nan
    with pytest.raises(UserError, match="1 of 4913"):
        surface_from_grid(grid, 1.0)


@pytest.mark.parametrize("bounds", [0.0, -1.0, (1, 1, 1, 0, 2, 2), (1, 2, 3)])
def test_bad_bounds(bounds):
    with pytest.raises(ValueError, match=r"bounds|reshape"):
        surface_from_grid(sphere_grid(nodes=9), bounds)


def test_clean_drops_floaters_and_keeps_the_largest():
    grid = np.maximum(sphere_grid(0.5), sphere_grid(0.08, (0.85, 0.85, 0.85)))
    grid = np.maximum(grid, sphere_grid(0.25, (-0.75, -0.75, -0.75)))
    mesh = surface_from_grid(grid, 1.01)
    assert report(mesh).components == 3
    assert report(clean(mesh, floater_area=0.0)).components == 3
    assert report(clean(mesh, floater_area=0.05)).components == 2  # areas: 78 %, 20 %, 2 %
    alone = report(clean(mesh, floater_area=0.9))
    assert alone.components == 1
    assert alone.volume == pytest.approx(4 / 3 * np.pi * 0.5**3, rel=0.02)


def test_clean_welds_a_triangle_soup_and_drops_collapsed_faces(sphere):
    soup = sphere.vertices[sphere.faces].reshape(-1, 3)
    faces = np.arange(len(soup)).reshape(-1, 3)
    flat = np.array([[0, 0, 1], [5, 5, 5]])
    loose = np.vstack([soup, [[9.0, 9.0, 9.0]]])
    mesh = clean(Mesh(loose, np.vstack([faces, flat])))
    assert len(mesh.vertices) == len(sphere.vertices)
    assert len(mesh.faces) == len(sphere.faces)
    assert report(mesh).watertight


def test_decimation_reaches_its_count_or_names_the_package(sphere):
    try:
        import fast_simplification  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install fast-simplification"):
            clean(sphere, max_faces=500)
    else:
        small = clean(sphere, max_faces=500)
        assert 400 <= len(small.faces) <= 500
        assert report(small).volume == pytest.approx(report(sphere).volume, rel=0.03)
    assert len(clean(sphere, max_faces=10**6).faces) == len(sphere.faces)


def test_report_of_an_open_and_of_an_empty_mesh(sphere):
    half = Mesh(sphere.vertices, sphere.faces[: len(sphere.faces) // 2])
    assert not report(half).watertight
    empty = report(Mesh(np.zeros((0, 3)), np.zeros((0, 3))))
    assert (empty.faces, empty.watertight, empty.area) == (0, False, 0.0)


@pytest.mark.parametrize(
    ("vertices", "faces", "word"),
    [
        (np.zeros((4, 2)), np.zeros((1, 3)), "shape"),
        (np.zeros((3, 3)), [[0, 1, 3]], "point at"),
        (np.zeros((3, 3)), [[0, 1, -1]], "point at"),
        ([[0, 0, 0], [1, np.nan, 0], [0, 1, 0]], [[0, 1, 2]], "vertex 1 is not finite"),
        ([[0, 0, 0], [1, 0, 0], [0, np.inf, 0]], [[0, 1, 2]], "vertex 2 is not finite"),
    ],
)
def test_mesh_refuses_what_is_none(vertices, faces, word):
    with pytest.raises(ValueError, match=word):
        Mesh(np.asarray(vertices), np.asarray(faces))


@pytest.mark.parametrize("suffix", FORMATS)
def test_round_trip_keeps_geometry_and_metadata(sphere, tmp_path, suffix):
    path = save(sphere, tmp_path / f"chair{suffix}", ORIGIN)
    found = load(path)
    assert np.array_equal(found.vertices[found.faces], sphere.vertices[sphere.faces])
    assert len(found.vertices) == len(sphere.vertices)
    assert report(found) == report(sphere)
    if suffix == ".stl":
        assert found.metadata == {"vitapack": "0.1.0", "seed": 7, "steps": 20}
        assert path.read_bytes()[:80].startswith(b"vitapack {")
    else:
        assert found.metadata == ORIGIN
    assert read_metadata(path) == found.metadata


@pytest.mark.parametrize("suffix", FORMATS)
def test_same_input_same_bytes_and_nothing_else_left(sphere, tmp_path, suffix):
    first = save(sphere, tmp_path / f"a{suffix}", ORIGIN).read_bytes()
    second = save(sphere, tmp_path / f"b{suffix}", ORIGIN).read_bytes()
    assert first == second == encode(sphere, f"b{suffix}", ORIGIN)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a{suffix}", f"b{suffix}"]


def test_stl_header_shortens_digests(sphere, tmp_path):
    path = save(sphere, tmp_path / "a.stl", {"packed_sha256": "0123456789abcdef" * 4, "seed": 7})
    assert read_metadata(path) == {"packed_sha256": "0123456789ab...", "seed": 7}


def test_glb_is_valid_where_readers_look(sphere, tmp_path):
    body = save(sphere, tmp_path / "a.glb", ORIGIN).read_bytes()
    magic, version, length, chunk = struct.unpack("<4sIII", body[:16])
    assert (magic, version, length) == (b"glTF", 2, len(body))
    tree = json.loads(body[20 : 20 + chunk])
    assert tree["asset"]["extras"] == ORIGIN
    assert tree["asset"]["version"] == "2.0"


def test_metadata_of_the_mesh_itself_is_the_default(sphere, tmp_path):
    mesh = Mesh(sphere.vertices, sphere.faces, {"seed": 3})
    assert read_metadata(save(mesh, tmp_path / "a.ply")) == {"seed": 3}
    assert read_metadata(save(mesh, tmp_path / "b.ply", {})) == {}


def test_save_refuses_and_leaves_the_old_file(sphere, tmp_path):
    path = save(sphere, tmp_path / "a.ply", {"seed": 1})
    with pytest.raises(UserError, match="no faces"):
        save(Mesh(np.zeros((3, 3)), np.zeros((0, 3))), path)
    with pytest.raises(ValueError):
        save(sphere, path, {"loss": float("nan")})
    assert read_metadata(path) == {"seed": 1}
    with pytest.raises(UserError, match=r"unknown mesh format '\.fbx'"):
        save(sphere, tmp_path / "a.fbx")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write"):
        save(sphere, tmp_path / "file" / "a.ply")


@pytest.mark.parametrize("suffix", [*FORMATS, ".off", ".gltf"])
@pytest.mark.parametrize("body", [b"", b"no mesh at all", b"\0" * 200, b"glTF" + b"\xff" * 60])
def test_hostile_files_are_one_plain_line(tmp_path, suffix, body):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(body)
    with pytest.raises(FormatError) as found:
        load(path)
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("suffix", FORMATS)
def test_truncated_files_never_load_as_something_else(sphere, tmp_path, suffix):
    path = save(sphere, tmp_path / f"x{suffix}", ORIGIN)
    body = path.read_bytes()
    if suffix == ".obj":  # text has no length to check; cut inside the vertices, no face is left
        body = body[: body.index(b"\nf ")]
    for part in (0.3, 0.9):
        path.write_bytes(body[: int(len(body) * part)])
        with pytest.raises(FormatError, match=path.name):
            load(path)


def test_missing_unknown_and_faceless_files(tmp_path):
    with pytest.raises(FormatError, match="no such mesh file"):
        load(tmp_path / "none.obj")
    (tmp_path / "x.txt").write_text("v 0 0 0")
    with pytest.raises(FormatError, match="unknown mesh format"):
        load(tmp_path / "x.txt")
    (tmp_path / "cloud.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\n")
    with pytest.raises(FormatError, match="no triangles"):
        load(tmp_path / "cloud.obj")


def test_nan_vertices_in_a_file_are_named(tmp_path):
    (tmp_path / "x.obj").write_text("v 0 0 0\nv 1 nan 0\nv 0 1 0\nf 1 2 3\n")
    with pytest.raises(FormatError, match=r"x\.obj: vertex 1 is not finite"):
        load(tmp_path / "x.obj")


def test_a_file_of_no_area_is_named(tmp_path):
    (tmp_path / "x.obj").write_text("v 0 0 0\nv 0 1 0\nv 0 2 0\nf 1 2 3\n")
    with pytest.raises(FormatError, match=r"x\.obj: its 1 triangles have no area"):
        load(tmp_path / "x.obj")


def test_foreign_files_have_quads_and_no_metadata(tmp_path):
    (tmp_path / "quad.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 4\n")
    mesh = load(tmp_path / "quad.obj")
    assert len(mesh.faces) == 2
    assert np.ptp(mesh.vertices[mesh.faces], axis=1)[:, :2].min() == 1.0  # half the square each
    assert read_metadata(tmp_path / "quad.obj") == {}


def test_damaged_metadata_is_named(sphere, tmp_path):
    path = save(sphere, tmp_path / "x.ply", ORIGIN)
    path.write_bytes(path.read_bytes().replace(b'{"vitapack"', b'{{vitapack"', 1))
    with pytest.raises(FormatError, match="entry is damaged"):
        read_metadata(path)
