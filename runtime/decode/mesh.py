"""Extracts, cleans, reports and stores meshes: marching cubes, and file formats with metadata.

    mesh = clean(surface_from_grid(logits, bounds=1.01))
    save(mesh, "chair.glb", {"seed": 0, "steps": 20, "packed_sha256": digest})
    read_metadata("chair.glb")["seed"]

The same mesh and metadata give the same bytes. Axes are not changed: y up and front +z in all
families, as GLB requires.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitapack.runtime.choices import MESH_FORMATS
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.files import atomic_path
from vitapack.runtime.format.container import one_line

FORMATS = tuple(f".{name}" for name in MESH_FORMATS)
# Accepted by `load`: every single-file format that trimesh reads, plus .gltf with its .bin.
READABLE = (*FORMATS, ".gltf", ".off")
_TAG = "vitapack "
_STL_HEADER = 80
# In cells. Half of it is still eight float32 steps at the corner of a grid of resolution 512.
_MARGIN = 1e-3


@dataclass(frozen=True, eq=False)
class Mesh:
    """A triangle mesh. Raises: ValueError: for other shapes, invalid indices, NaN or infinity."""

    vertices: np.ndarray  # (V, 3) float32
    faces: np.ndarray  # (F, 3) int32, counter-clockwise seen from outside
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        vertices = np.ascontiguousarray(self.vertices, dtype=np.float32)
        faces = np.ascontiguousarray(self.faces, dtype=np.int32)
        for name, array in (("vertices", vertices), ("faces", faces)):
            if array.ndim != 2 or array.shape[1] != 3:
                raise ValueError(f"{name} have shape {array.shape}; expected (n, 3)")
        if not np.isfinite(vertices).all():
            bad = int(np.argmin(np.isfinite(vertices).all(axis=1)))
            raise ValueError(f"vertex {bad} is not finite: {vertices[bad].tolist()}")
        if len(faces) and (faces.min() < 0 or faces.max() >= len(vertices)):
            raise ValueError(
                f"faces point at vertex {faces.min()}..{faces.max()} of {len(vertices)} vertices"
            )
        object.__setattr__(self, "vertices", vertices)
        object.__setattr__(self, "faces", faces)


@dataclass(frozen=True)
class MeshReport:
    """Topology and size of a mesh; volume is signed (negative: the winding is inside out)."""

    vertices: int
    faces: int
    watertight: bool  # every edge belongs to exactly two faces
    components: int  # connected by shared vertices
    euler_number: int  # 2 for a sphere, 0 for a torus, summed over components
    volume: float  # units cubed; meaningful only if `watertight`
    area: float  # units squared


def grid_bounds(bounds: float | Sequence[float] | np.ndarray) -> np.ndarray:
    """Lower and upper corner, (2, 3) float64, from b (the cube +-b), six numbers or two corners."""
    corners = np.asarray(bounds, dtype=np.float64)
    if corners.ndim == 0:
        corners = np.array([[-1.0], [1.0]]) * corners * np.ones(3)
    corners = corners.reshape(-1, 3)
    if corners.shape != (2, 3) or not np.all(corners[1] > corners[0]):
        raise ValueError(f"bounds {bounds!r}: expected b > 0, or (x0, y0, z0, x1, y1, z1)")
    return corners


def surface_from_grid(
    grid: Any,
    bounds: float | Sequence[float] | np.ndarray,
    level: float = 0.0,
    *,
    reference_scale: bool = False,
) -> Mesh:
    """The level set of a grid, closed where it leaves the bounds, counter-clockwise from outside.

    grid: (R+1, R+1, R+1) or any three sides >= 2, 'ij' order (axes x, y, z), nodes on both ends of
    `bounds`; a numpy array or a CPU tensor. value > level is inside. Nodes within 0.2 % of a cell
    of the surface are moved that far from it, and caps lie 0.1 % of a cell outside the bounds.

    Node i lies at lower + i * extent / R. The reference pipelines (Hunyuan3D, Step1X-3D) divide by
    R + 1 instead, which shrinks every shape towards the lower corner by R / (R + 1), 0.26 % at 384;
    `reference_scale` reproduces that, for comparisons with their meshes.

    Raises: UserError: if nothing or everything is inside, or a value is NaN or infinite.
    """
    from skimage.measure import marching_cubes

    values = np.asarray(grid, dtype=np.float32)
    if values.ndim != 3 or min(values.shape) < 2:
        raise ValueError(f"grid has shape {values.shape}; expected three sides of at least 2 nodes")
    low, high = grid_bounds(bounds)
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        raise UserError(
            f"{bad} of {values.size} values of the shape grid are NaN or infinite; the weights may "
            "be damaged, or overflow in this precision"
        )
    inside = int((values > level).sum())
    if inside == 0 or inside == values.size:
        state = "empty" if inside == 0 else "full"
        raise UserError(
            f"the shape grid is {state} (values {values.min():.3g} to {values.max():.3g}, surface "
            f"at {level:g}): no mesh; try another seed, more steps, or a clearer image"
        )
    values = _off_level(values, level)
    rim = np.concatenate([values.take((0, -1), axis=axis).ravel() for axis in range(3)])
    closed = bool((rim <= level).all())
    if not closed:
        # Pads one layer of "outside", low enough that each cap lies at least half a cell outside;
        # clipping then flattens the caps, a margin outside the bounds.
        outside = 2 * level - float(rim[rim > level].min())
        values = np.pad(values, 1, constant_values=np.nextafter(np.float32(outside), -np.inf))
    # skimage's "ascent" is the winding that faces falling values: outward, with inside above.
    vertices, faces, _, _ = marching_cubes(values, level, gradient_direction="ascent")
    if not closed:
        vertices = np.clip(vertices - 1, -_MARGIN, np.array(values.shape) - 3 + _MARGIN)
    cells = np.array(np.shape(grid)) - 1
    step = (high - low) / (cells + 1 if reference_scale else cells)
    return Mesh((low + vertices * step).astype(np.float32), faces)


def _off_level(values: np.ndarray, level: float) -> np.ndarray:
    """Moves node values away from the level, so that no vertex lies closer to a node than about
    `_MARGIN` of a cell.

    Vertices of several edges would otherwise coincide at a node, and merging them would make the
    closed surface non-manifold there. Nodes on the level count as outside.
    """
    distance = values - level
    np.abs(distance, out=distance)  # two grids at once, of 228 MB each at R = 384
    near = np.argwhere(distance <= 2 * _MARGIN * distance.max())
    del distance
    around = np.zeros(len(near), np.float32)
    for axis in range(3):
        for side in (-1, 1):
            at = near.copy()
            at[:, axis] = np.clip(at[:, axis] + side, 0, values.shape[axis] - 1)
            np.maximum(around, np.abs(values[tuple(at.T)] - level), out=around)
    nodes = tuple(near.T)
    off = values[nodes] - level
    least = np.maximum(2 * _MARGIN * around, np.abs(off))
    values = values.copy()
    values[nodes] = level + np.where(off > 0, least, -least)
    return values


def clean(mesh: Mesh, *, floater_area: float = 0.005, max_faces: int | None = None) -> Mesh:
    """Merges vertices, removes degenerate faces and floaters, reduces to at most `max_faces`.

    A floater is a component with less than `floater_area` of the whole surface; the largest
    component is always kept. Decimation is trimesh's quadric one and needs fast-simplification.
    Raises: UserError: if a mesh has more than `max_faces` and that package is missing.
    """
    mesh = _merged(mesh)
    if not len(mesh.faces):
        return mesh
    if floater_area > 0:
        count, label = _components(mesh)
        area = np.bincount(label, weights=_face_areas(mesh), minlength=count)
        keep = area >= floater_area * area.sum()
        keep[area.argmax()] = True
        mesh = _compact(mesh, mesh.faces[keep[label]])
    if max_faces is not None and len(mesh.faces) > max_faces:
        try:
            small = _trimesh(mesh).simplify_quadric_decimation(face_count=max_faces)
        except ImportError as error:
            raise UserError(
                f"reducing the mesh from {len(mesh.faces)} to {max_faces} faces needs a package: "
                "pip install fast-simplification"
            ) from error
        mesh = _merged(replace(mesh, vertices=small.vertices, faces=small.faces))
    return mesh


def surface_bytes(resolution: int) -> int:
    """Peak memory of `surface_from_grid` and `clean`: marching cubes on two or three grids, or the
    cleaning of a mesh of 6 R^2 faces."""
    nodes = (resolution + 3) ** 3
    return max(9 * nodes, 4 * nodes + 2200 * resolution**2)


def report(mesh: Mesh) -> MeshReport:
    """Topology and size of a mesh; an empty one reports zeros and is not watertight."""
    if not len(mesh.faces):
        return MeshReport(len(mesh.vertices), 0, False, 0, 0, 0.0, 0.0)
    body = _trimesh(mesh)
    # trimesh computes the volume together with the centre of mass, and warns if there is none.
    a, b, c = mesh.vertices.astype(np.float64)[mesh.faces].transpose(1, 0, 2)
    return MeshReport(
        vertices=len(mesh.vertices),
        faces=len(mesh.faces),
        watertight=bool(body.is_watertight),
        components=_components(mesh)[0],
        euler_number=int(body.euler_number),
        volume=float(np.einsum("fk,fk->", a, np.cross(b, c)) / 6),
        area=float(_face_areas(mesh).sum()),
    )


def save(mesh: Mesh, path: str | Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Writes GLB, OBJ, PLY (binary) or STL (binary) by suffix, atomically, with metadata inside.

    metadata: JSON values (seed, steps, packed_sha256, ...), by default the mesh's own. Stored in
    asset.extras of a GLB and in a comment line of OBJ and PLY. STL has 80 bytes for it: whole items
    in the given order while they fit, with `*sha256` values cut to 12 digits and "...".

    Raises: UserError: for an empty mesh, an unknown suffix, or a path that cannot be written.
    """
    path = Path(path)
    body = encode(mesh, path, metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(body)
    return path


def encode(mesh: Mesh, path: str | Path, metadata: Mapping[str, Any] | None = None) -> bytes:
    """The bytes that `save` writes to this path.

    Raises: UserError: for an empty mesh or an unknown suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"{path}: unknown mesh format {suffix!r}; use {', '.join(FORMATS)}")
    if not len(mesh.faces):
        raise UserError(f"{path}: not written, since the mesh has no faces")
    values = dict(mesh.metadata if metadata is None else metadata)
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)  # one line of ASCII
    return {".glb": _glb, ".obj": _obj, ".ply": _ply, ".stl": _stl}[suffix](mesh, values, text)


def load(path: str | Path) -> Mesh:
    """Reads a mesh file (scenes are flattened, polygons cut into triangles) with its metadata.

    STL repeats each vertex per face; equal ones are merged. Other formats keep their vertices.
    Raises: FormatError naming the file: if it is missing, damaged, a point cloud, without area, or
    holds NaN or infinite vertices.
    """
    import trimesh

    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise FormatError(f"{path}: no such mesh file")
    if suffix not in READABLE:
        raise FormatError(f"{path}: unknown mesh format {suffix!r}; use {', '.join(READABLE)}")
    if not path.stat().st_size:
        raise FormatError(f"{path}: the file is empty (0 bytes); expected a mesh")
    options: dict[str, Any] = {}
    if suffix == ".obj":
        options = {"maintain_order": True, "skip_materials": True}
    try:
        found = trimesh.load_scene(str(path), process=False, **options).to_mesh()
        vertices, faces = np.asarray(found.vertices), np.asarray(found.faces)
    # Parsers raise anything on hostile bytes; all of it means a damaged file.
    except Exception as error:
        raise FormatError(
            f"{path}: cannot be read as {suffix[1:].upper()} ({type(error).__name__}: "
            f"{one_line(error)}); write it again"
        ) from error
    if not len(faces):
        raise FormatError(f"{path}: holds no triangles; expected a surface mesh")
    try:
        mesh = Mesh(vertices, faces, read_metadata(path))
    except ValueError as error:
        raise FormatError(f"{path}: {one_line(error)}") from error
    if not _face_areas(mesh).any():
        raise FormatError(f"{path}: its {len(faces)} triangles have no area; expected a surface")
    return _merged(mesh) if suffix == ".stl" else mesh


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `save` wrote, {} if there is none; geometry is not parsed.

    Raises: FormatError: if the file is missing, not of its suffix's format, or the entry is cut.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        with path.open("rb") as file:
            head = file.read(20)
            if suffix == ".glb":
                if len(head) < 20 or head[:4] != b"glTF" or head[16:20] != b"JSON":
                    raise FormatError(f"{path}: not a GLB file (no glTF header)")
                length = struct.unpack("<I", head[12:16])[0]
                chunk = file.read(min(length, path.stat().st_size))
                entry = json.loads(chunk).get("asset", {}).get("extras", {})
                return entry if isinstance(entry, dict) else {}
            head += file.read((1 << 16) - len(head))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise FormatError(f"{path}: its GLB header is damaged ({one_line(error)})") from error
    if suffix == ".stl":
        lines = [head[:_STL_HEADER].rstrip(b"\0 ")]
    elif suffix in (".ply", ".obj"):
        lead = b"comment " if suffix == ".ply" else b"# "
        lines = [line[len(lead) :] for line in head.split(b"\n") if line.startswith(lead)]
    else:
        lines = []
    for line in lines:
        if line.startswith(_TAG.encode()):
            try:
                entry = json.loads(line[len(_TAG) :])
            except ValueError as error:
                raise FormatError(
                    f"{path}: its vitapack entry is damaged ({one_line(error)})"
                ) from error
            return entry if isinstance(entry, dict) else {}
    return {}


def _glb(mesh: Mesh, values: dict[str, Any], text: str) -> bytes:
    from trimesh.exchange.gltf import export_glb

    def add_extras(tree: dict[str, Any]) -> None:
        tree["asset"]["generator"] = "vitapack"  # trimesh's has a version, so bytes would change
        tree["asset"]["extras"] = values

    scene = _trimesh(mesh).scene()
    return export_glb(scene, include_normals=False, tree_postprocessor=add_extras)


def _obj(mesh: Mesh, values: dict[str, Any], text: str) -> bytes:
    # Nine digits give every float32 back exactly; trimesh's writer rounds to fixed decimals.
    points = "v %.9g %.9g %.9g\n" * len(mesh.vertices) % tuple(mesh.vertices.ravel().tolist())
    faces = "f %d %d %d\n" * len(mesh.faces) % tuple((mesh.faces + 1).ravel().tolist())
    return f"# {_TAG}{text}\n{points}{faces}".encode("ascii")


def _ply(mesh: Mesh, values: dict[str, Any], text: str) -> bytes:
    rows = np.empty(len(mesh.faces), dtype=[("n", "u1"), ("index", "<i4", 3)])
    rows["n"], rows["index"] = 3, mesh.faces
    header = (
        f"ply\nformat binary_little_endian 1.0\ncomment {_TAG}{text}\n"
        f"element vertex {len(mesh.vertices)}\n"
        "property float x\nproperty float y\nproperty float z\n"
        f"element face {len(mesh.faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    return header.encode("ascii") + mesh.vertices.astype("<f4").tobytes() + rows.tobytes()


def _stl(mesh: Mesh, values: dict[str, Any], text: str) -> bytes:
    from trimesh.exchange.stl import export_stl

    kept: dict[str, Any] = {}
    header = f"{_TAG}{{}}"
    for key, value in values.items():
        if key.endswith("sha256") and isinstance(value, str) and len(value) > 15:
            value = value[:12] + "..."
        longer = _TAG + json.dumps({**kept, key: value}, separators=(",", ":"), allow_nan=False)
        if len(longer) <= _STL_HEADER:
            kept[key], header = value, longer
    return header.encode("ascii").ljust(_STL_HEADER) + export_stl(_trimesh(mesh))[_STL_HEADER:]


def _trimesh(mesh: Mesh) -> Any:
    import trimesh

    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


def _merged(mesh: Mesh) -> Mesh:
    """Merges equal vertices; drops faces that lose a corner by it, and unused vertices.

    Only faces with a repeated corner are dropped: without thin ones, a closed surface would open.
    """
    body = _trimesh(mesh)
    body.merge_vertices(merge_norm=True, merge_tex=True)
    merged = replace(mesh, vertices=body.vertices, faces=body.faces)
    a, b, c = merged.faces.T
    return _compact(merged, merged.faces[(a != b) & (b != c) & (c != a)])


def _compact(mesh: Mesh, faces: np.ndarray) -> Mesh:
    used, index = np.unique(faces, return_inverse=True)
    return replace(mesh, vertices=mesh.vertices[used], faces=index.reshape(-1, 3))


def _components(mesh: Mesh) -> tuple[int, np.ndarray]:
    """Number of connected components and the label of each face; faces are connected if they share
    a vertex. Used vertices are numbered separately, so unused ones are not counted."""

    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    used, index = np.unique(mesh.faces, return_inverse=True)
    index = index.reshape(-1, 3)
    rows = np.concatenate([index[:, 0], index[:, 0]])
    columns = np.concatenate([index[:, 1], index[:, 2]])
    links = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(len(used),) * 2)
    count, label = connected_components(links, directed=False)
    return int(count), label[index[:, 0]]


def _face_areas(mesh: Mesh) -> np.ndarray:
    a, b, c = mesh.vertices.astype(np.float64)[mesh.faces].transpose(1, 0, 2)
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
