"""Builds the furniture data set: human-made shapes and renders of them, from a Debian package.

    apt-get download sweethome3d-furniture && dpkg-deb -x sweethome3d-furniture_*.deb FOLDER
    python -m benchmarks.furniture.data FOLDER/usr/share/sweethome3d/furniture -o data.npz

This command downloads nothing. Every model keeps its attribution (id, name, creator, library,
licence). A shape is a signed distance on 64^3 cell centres of [-1, 1]^3 (x right, y up, z to the
front). An image is a clay render from a three-quarter view, as a user would photograph a chair.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

GRID = 64
FINE = 128  # labels are computed at twice the resolution, then averaged
EXTENT = 0.9  # the longest side spans [-0.9, 0.9]: a border of three cells stays empty
THICKEN = 1.5 / FINE * 2  # offset of the surface, so that a sheet is two cells of 64^3 thick
IMAGE = 112
MARGIN = 0.15  # of the frame, as Hunyuan3D recentres its images (border_ratio)

LICENCES = {
    "BlendSwap-CC-0": "CC0 1.0",
    "BlendSwap-CC-BY": "CC BY 3.0",
    "KatorLegaz": "CC BY 3.0 US",
    "Reallusion": "CC BY 3.0 US",
    "Scopia": "CC BY 3.0",
}


@dataclass(frozen=True)
class Entry:
    """One model of a catalogue, with the attribution that its licence requires."""

    id: str
    name: str
    category: str
    creator: str
    library: str
    licence: str
    model: str
    size: tuple[float, float, float]  # width, height, depth in cm
    rotation: tuple[float, ...]  # 3 x 3, row-major

    @property
    def split(self) -> str:
        """train, validation or test, by a hash of the id: adding models changes no split."""
        share = int(hashlib.sha256(self.id.encode()).hexdigest()[:8], 16) / 2**32
        return "test" if share < 0.08 else "validation" if share < 0.13 else "train"


def catalogue(archive: Path) -> list[Entry]:
    """The models that an .sh3f archive lists in PluginFurnitureCatalog.properties."""
    with zipfile.ZipFile(archive) as files:
        text = files.read("PluginFurnitureCatalog.properties").decode("latin-1")
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    fields: dict[int, dict[str, str]] = {}
    for key, number, value in re.findall(r"^(\w+)#(\d+)\s*=\s*(.*?)\s*$", text, re.M):
        fields.setdefault(int(number), {})[key] = value
    entries = []
    for item in fields.values():
        if "model" not in item:
            continue
        rotation = tuple(float(x) for x in item.get("modelRotation", "1 0 0 0 1 0 0 0 1").split())
        width, height, depth = (float(item[key]) for key in ("width", "height", "depth"))
        entries.append(
            Entry(
                id=item["id"],
                name=item.get("name", item["id"]),
                category=item.get("category", "?"),
                creator=item.get("creator", "?"),
                library=archive.stem,
                licence=LICENCES.get(archive.stem, "see the archive"),
                model=item["model"].lstrip("/"),
                size=(width, height, depth),
                rotation=rotation,
            )
        )
    return entries


def read_obj(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) float64 and triangles (F, 3) of an OBJ file's `v` and `f` lines."""
    vertices: list[list[float]] = []
    faces: list[tuple[int, int, int]] = []
    for line in text.splitlines():
        if line.startswith("v "):
            vertices.append([float(x) for x in line.split()[1:4]])
        elif line.startswith("f "):
            corners = [int(word.split("/")[0]) for word in line.split()[1:]]
            corners = [c - 1 if c > 0 else len(vertices) + c for c in corners]
            faces += [(corners[0], a, b) for a, b in itertools.pairwise(corners[1:])]
    return np.array(vertices, np.float64).reshape(-1, 3), np.array(faces, np.int64).reshape(-1, 3)


def normalise(vertices: np.ndarray, entry: Entry) -> np.ndarray:
    """Rotates the model upright, scales its box to the catalogue's size and into [-0.9, 0.9]^3."""
    points = vertices @ np.array(entry.rotation).reshape(3, 3).T
    low, high = points.min(0), points.max(0)
    size = np.array(entry.size) / max(entry.size)
    return (points - (low + high) / 2) / np.maximum(high - low, 1e-9) * size * (2 * EXTENT)


def surface_cells(vertices: np.ndarray, faces: np.ndarray, seed: int) -> np.ndarray:
    """Boolean (FINE,)*3: the cells that the surface passes through, by stratified sampling."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    # About 6 samples per covered cell face leave holes in less than 1 % of sheets, which filling at
    # half the resolution below closes.
    count = int(np.clip(6 * area.sum() / (2 / FINE) ** 2, 20_000, 3_000_000))
    rng = np.random.default_rng(seed)
    which = np.searchsorted(np.cumsum(area), (np.arange(count) + 0.5) / count * area.sum())
    which = np.minimum(which, len(faces) - 1)
    u, v = rng.random((2, count, 1))
    flip = u + v > 1
    u, v = np.where(flip, 1 - u, u), np.where(flip, 1 - v, v)
    points = a[which] + u * (b - a)[which] + v * (c - a)[which]
    cells = np.zeros((FINE,) * 3, bool)
    index = np.clip(((points + 1) / 2 * FINE).astype(int), 0, FINE - 1)
    cells[tuple(index.T)] = True
    return cells


def solid(surface: np.ndarray) -> np.ndarray:
    """Fills all cells that the outside cannot reach; leaky shells are first closed by two cells."""
    filled = ndimage.binary_fill_holes(surface)
    closed = ndimage.binary_dilation(surface, iterations=2)
    sealed = ndimage.binary_fill_holes(closed)
    leaky = ndimage.binary_erosion(sealed & ~closed, iterations=1)
    if leaky.sum() > 2 * max(1, (filled & ~surface).sum()):
        # Grow the sealed inside back to the surface that it was eroded from.
        filled = filled | ndimage.binary_erosion(sealed, iterations=2)
    return filled | surface


def signed_distance(vertices: np.ndarray, faces: np.ndarray, seed: int = 0) -> np.ndarray:
    """Distance to the thickened surface on 64^3 cell centres, negative inside, float32, in units
    of [-1, 1]."""
    inside = solid(surface_cells(vertices, faces, seed))
    cell = 2 / FINE
    distance = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    distance = (distance - 0.5 * np.sign(distance)) * cell - THICKEN
    half = FINE // GRID
    return distance.reshape(GRID, half, GRID, half, GRID, half).mean((1, 3, 5)).astype(np.float32)


def camera_rays(azimuth: float, elevation: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Origins and directions (size^2, 3) of a pinhole at distance 4 with a field of view of 36
    degrees; angles in degrees, azimuth 0 looks at the front (+z)."""
    a, e = np.radians([azimuth, elevation])
    back = np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)])
    right = np.array([np.cos(a), 0, -np.sin(a)])
    up = np.cross(back, right)
    span = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(span, -span)
    half = np.tan(np.radians(18))
    rays = -back + half * (x[..., None] * right + y[..., None] * up)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    return np.repeat(back[None] * 4.0, size * size, 0), rays.reshape(-1, 3)


def recentre(image: np.ndarray, alpha: np.ndarray, size: int = IMAGE) -> np.ndarray:
    """Centres the object's box in a white square with a border of 15 %, uint8."""
    rows, columns = np.where(alpha.any(1))[0], np.where(alpha.any(0))[0]
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    crop = Image.fromarray(image).crop(box)
    scale = round(size * (1 - MARGIN)) / max(crop.size)
    crop = crop.resize([max(1, round(side * scale)) for side in crop.size], Image.Resampling.BOX)
    canvas = Image.new("L", (size, size), 255)
    canvas.paste(crop, ((size - crop.width) // 2, (size - crop.height) // 2))
    return np.asarray(canvas)


def render_views(
    vertices: np.ndarray, faces: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Clay renders (count, 112, 112) uint8 on white, and their (azimuth, elevation) in degrees.

    Azimuth 20 to 70 to either side, elevation 15 to 35; light and tone of the clay are random.
    """
    from embreex import rtcore_scene
    from embreex.mesh_construction import TriangleMesh

    scene = rtcore_scene.EmbreeScene()
    TriangleMesh(scene, vertices[faces].astype(np.float32))
    normals = np.cross(
        vertices[faces[:, 1]] - vertices[faces[:, 0]], vertices[faces[:, 2]] - vertices[faces[:, 0]]
    )
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    images, angles = [], []
    size = 2 * IMAGE
    for number in range(count):
        side = 1 if number % 2 else -1
        azimuth, elevation = side * rng.uniform(20, 70), rng.uniform(15, 35)
        origins, rays = camera_rays(azimuth, elevation, size)
        hit = scene.run(origins.astype(np.float32), rays.astype(np.float32))
        seen = hit >= 0
        facing = normals[hit[seen]]
        # Many models have inconsistent winding: light both sides.
        facing = facing * -np.sign((facing * rays[seen]).sum(1, keepdims=True))
        lamp = np.array([rng.uniform(-1, 1), rng.uniform(0.6, 1.4), rng.uniform(0.4, 1.2)])
        lamp /= np.linalg.norm(lamp)
        sky = 0.5 + 0.5 * facing[:, 1]
        tone = rng.uniform(0.75, 1.0)
        shade = tone * (0.25 + 0.25 * sky + 0.45 * np.maximum(facing @ lamp, 0))
        image = np.full(size * size, 255, np.uint8)
        image[seen] = np.clip(shade * 255, 0, 255)
        square = seen.reshape(size, size)
        if not square.any():
            raise ValueError("no ray hit the model")
        images.append(recentre(image.reshape(size, size), square))
        angles.append((azimuth, elevation))
    return np.array(images), np.array(angles, np.float32)


def build_one(job: tuple[Path, Entry, int]) -> tuple[Entry, dict[str, np.ndarray] | str]:
    """All arrays of one model, or the reason for leaving it out."""
    archive, entry, views = job
    with zipfile.ZipFile(archive) as files:
        vertices, faces = read_obj(files.read(entry.model).decode("latin-1"))
    if not len(faces) or min(entry.size) / max(entry.size) < 0.01:
        return entry, "no faces or flatter than 1 %"
    vertices = normalise(vertices, entry)
    distance = signed_distance(vertices, faces)
    inside = distance < 0
    # The share that survives an erosion by two cells: IoU is too strict for thin shapes, so a
    # training can be restricted to bodies.
    body = ndimage.binary_erosion(inside, iterations=2).sum() / max(1, inside.sum())
    if inside.sum() < 600:
        return entry, f"only {int(inside.sum())} cells"
    seed = int(hashlib.sha256(entry.id.encode()).hexdigest()[8:16], 16)
    images, angles = render_views(vertices, faces, views, np.random.default_rng(seed))
    return entry, {
        "distance": np.clip(distance * GRID / 2 * 32, -127, 127).astype(np.int8),  # 1/32 cell
        "images": images,
        "angles": angles,
        "body": np.float32(body),
    }


def build(folder: Path, views: int, limit: int | None, jobs: int) -> Iterator[tuple[Entry, dict]]:
    """Yields every usable model in the order of the catalogues; prints the others with reasons."""
    todo = []
    for archive in sorted(folder.glob("*.sh3f")):
        todo += [(archive, entry, views) for entry in catalogue(archive)]
    if not todo:
        raise SystemExit(f"{folder}: no .sh3f archives; expected the Debian package's folder")
    with Pool(jobs) as pool:
        for number, (entry, arrays) in enumerate(pool.imap(build_one, todo[:limit], 4)):
            if isinstance(arrays, str):
                print(f"left out {entry.id}: {arrays}", flush=True)
                continue
            if number % 50 == 0:
                print(f"{number} of {len(todo)}", flush=True)
            yield entry, arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder with the .sh3f archives")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--views", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    built = list(build(options.folder, options.views, options.limit, options.jobs))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        entries=json.dumps([asdict(entry) | {"split": entry.split} for entry, _ in built]),
        **{key: np.stack([arrays[key] for _, arrays in built]) for key in built[0][1]},
    )
    temporary = options.out.with_suffix(".part")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(options.out)
    print(f"{len(built)} models, {options.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
