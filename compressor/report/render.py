"""Renders meshes without a GPU or OpenGL: a z-buffer rasteriser in numpy, with clay shading.

    Image.fromarray(render(mesh)).save("chair.png")
    contact_sheet([("chair", [image, render(original), render(compressed)])]).save("sheet.png")

Deterministic. About 0.2 CPU seconds for 20,000 faces at 256 px with 2x2 samples per pixel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitapack.runtime.decode.mesh import Mesh

FIELD_OF_VIEW = 30.0  # degrees, vertical; the report's viewer uses the same camera
_CLAY = np.array([0.80, 0.74, 0.68])
_CREASE = np.cos(np.radians(40))  # cosine of the angle from which an edge is shaded flat
# Directions in view space (x right, y up, z to the viewer) with a colour each: a warm key light
# from above left and a cool fill from the right, so that no visible side is black.
_LIGHTS = (
    (np.array([-0.70, 0.75, 0.50]), np.array([0.78, 0.76, 0.72])),
    (np.array([0.85, 0.10, 0.45]), np.array([0.27, 0.29, 0.33])),
)
_AMBIENT = np.array([0.26, 0.27, 0.30])
_CHUNK = 1 << 21  # pixels in flight: about 150 MB


@dataclass(frozen=True)
class Frame:
    """The sphere that the camera frames. Renders in one frame have the same scale."""

    centre: tuple[float, float, float]
    radius: float


def frame_of(*meshes: Mesh) -> Frame:
    """The frame that contains all the meshes, centred on their common bounding box."""
    points = [mesh.vertices[np.unique(mesh.faces)] for mesh in meshes if len(mesh.faces)]
    if not points:
        return Frame((0.0, 0.0, 0.0), 1.0)
    low = np.min([p.min(axis=0) for p in points], axis=0).astype(np.float64)
    high = np.max([p.max(axis=0) for p in points], axis=0).astype(np.float64)
    centre = (low + high) / 2
    radius = max(float(np.linalg.norm(p - centre, axis=1).max()) for p in points)
    return Frame((float(centre[0]), float(centre[1]), float(centre[2])), max(radius, 1e-12))


def render(
    mesh: Mesh,
    size: int = 256,
    azimuth: float = 35.0,
    elevation: float = 25.0,
    *,
    frame: Frame | None = None,
    background: tuple[int, int, int] | None = (255, 255, 255),
    samples: int = 2,
) -> np.ndarray:
    """The mesh as uint8 (size, size, 3); with `background=None` (size, size, 4), alpha last.

    azimuth, elevation: degrees; 0, 0 looks at the front (+z), positive azimuth from the mesh's
    left side (+x), positive elevation from above. frame: by default the mesh's own.
    samples: a pixel is the mean of samples x samples. An empty mesh gives the background alone.

    Raises ValueError if size or samples is below 1.
    """
    if size < 1 or samples < 1:
        raise ValueError(f"size {size} and samples {samples}; expected at least 1")
    side = size * samples
    colour = np.zeros((side * side, 4))
    points, distance = _to_view(mesh, frame or frame_of(mesh), azimuth, elevation)
    depth = distance - points[:, 2]  # along the view direction, > 0 in front of the camera
    focal = side / 2 / np.tan(np.radians(FIELD_OF_VIEW / 2))
    inverse = 1 / np.maximum(depth, 0.02 * distance)
    screen = side / 2 + focal * points[:, :2] * inverse[:, None] * [1, -1]
    ahead = (depth > 0.02 * distance)[mesh.faces].all(axis=1)
    faces = mesh.faces[ahead]
    if len(faces):
        pixel, face, weight = _rasterise(screen, inverse, faces, side)
        lit = _shade(points, faces, face, weight, distance)
        shadow = _crevices(pixel, face, weight, inverse, faces, side, focal)
        colour[pixel, :3] = lit * shadow[:, None]
        colour[pixel, 3] = 1
    colour = colour.reshape(size, samples, size, samples, 4).mean(axis=(1, 3))
    alpha = colour[..., 3:]
    if background is not None:
        solid = colour[..., :3] + (1 - alpha) * np.array(background) / 255
        return np.rint(np.clip(solid, 0, 1) * 255).astype(np.uint8)
    straight = np.divide(
        colour[..., :3], alpha, out=np.zeros_like(colour[..., :3]), where=alpha > 0
    )
    return np.rint(np.clip(np.concatenate([straight, alpha], 2), 0, 1) * 255).astype(np.uint8)


def _to_view(
    mesh: Mesh, frame: Frame, azimuth: float, elevation: float
) -> tuple[np.ndarray, float]:
    """Vertices with x right, y up, z to the viewer, and the camera's distance."""
    a, e = np.radians([azimuth, elevation])
    right = np.array([np.cos(a), 0.0, -np.sin(a)])
    back = np.array([np.cos(e) * np.sin(a), np.sin(e), np.cos(e) * np.cos(a)])
    axes = np.stack([right, np.cross(back, right), back])
    points = (mesh.vertices.astype(np.float64) - frame.centre) @ axes.T
    return points, 1.03 * frame.radius / np.sin(np.radians(FIELD_OF_VIEW / 2))


def _rasterise(
    screen: np.ndarray, inverse: np.ndarray, faces: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Covered pixels (P,), the nearest face in each (P,) and its corners' weights there (P, 3).

    Works by scanlines, not bounding boxes: a face covers one span of each row, so that large faces
    cost no more than their area. Compares 1 / depth, which is linear on the screen; ties go to the
    highest face index, so that the result is deterministic.
    """
    corner = screen[faces]  # (F, 3, 2)
    edge = np.roll(corner, -1, axis=1) - corner
    double_area = edge[:, 0, 0] * edge[:, 1, 1] - edge[:, 0, 1] * edge[:, 1, 0]
    # Edge k as a x + b y + c: 0 on the edge from corner k to k + 1, 1 at the corner opposite.
    scale = 1 / np.where(np.abs(double_area) < 1e-12, np.inf, double_area)[:, None]
    a, b = -edge[:, :, 1] * scale, edge[:, :, 0] * scale
    c = -(a * corner[:, :, 0] + b * corner[:, :, 1])
    top = np.clip(np.ceil(corner[:, :, 1].min(axis=1) - 0.5), 0, side).astype(np.int64)
    end = np.clip(np.floor(corner[:, :, 1].max(axis=1) - 0.5) + 1, 0, side).astype(np.int64)
    rows = np.where(np.abs(double_area) < 1e-12, 0, np.maximum(end - top, 0))

    face, y = _ragged(rows, top)
    height = b[face] * (y + 0.5)[:, None] + c[face]  # (R, 3)
    slope = a[face]
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = -height / slope
    left = np.where(slope > 0, bound, -np.inf).max(axis=1)
    right = np.where(slope < 0, bound, np.inf).min(axis=1)
    missed = ((slope == 0) & (height < 0)).any(axis=1)
    first = np.clip(np.ceil(left - 0.5), 0, side).astype(np.int64)
    width = np.clip(np.floor(right - 0.5) + 1, 0, side).astype(np.int64) - first
    width = np.where(missed, 0, np.maximum(width, 0))

    # Weight of corner k is the edge opposite, k + 1. Nearness gets the upper 32 bits of the key.
    order = [1, 2, 0]
    at_corner = inverse[faces]
    gain = np.stack([(at_corner * w[:, order]).sum(axis=1) for w in (a, b, c)], axis=1)
    low, high = at_corner.min(), at_corner.max()
    steps = (2**32 - 2) / max(high - low, 1e-300)
    best = np.zeros(side * side, dtype=np.uint64)
    splits = np.searchsorted(np.cumsum(width), np.arange(_CHUNK, int(width.sum()), _CHUNK))
    bounds = [0, *np.unique(splits).tolist(), len(width)]
    for start, stop in itertools.pairwise(bounds):
        row, x = _ragged(width[start:stop], first[start:stop])
        f, line = face[start:stop][row], y[start:stop][row]
        near = gain[f, 0] * (x + 0.5) + gain[f, 1] * (line + 0.5) + gain[f, 2]
        key = (np.clip((near - low) * steps, 0, 2**32 - 2) + 1).astype(np.uint64) << np.uint64(32)
        np.maximum.at(best, line * side + x, key | f.astype(np.uint64))

    pixel = np.flatnonzero(best)
    seen = (best[pixel] & np.uint64(2**32 - 1)).astype(np.int64)
    px, py = pixel % side + 0.5, pixel // side + 0.5
    weight = a[seen] * px[:, None] + b[seen] * py[:, None] + c[seen]
    return pixel, seen, np.clip(weight[:, order], 0, 1)


def _ragged(counts: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each index i repeated `counts[i]` times, and with it start[i], start[i] + 1, ..."""
    item = np.repeat(np.arange(len(counts)), counts)
    offset = np.arange(len(item)) - np.repeat(np.cumsum(counts) - counts, counts)
    return item, start[item] + offset


def _shade(
    points: np.ndarray, faces: np.ndarray, face: np.ndarray, weight: np.ndarray, distance: float
) -> np.ndarray:
    """Colours (P, 3) in 0..1: two lights, smooth shading except at creases.

    Normals are turned to the viewer, so that open and inside-out meshes are lit on both sides.
    """
    corner = points[faces]  # (F, 3, 3)
    ahead = _unit(np.roll(corner, -1, axis=1) - corner)
    flat = _unit(np.cross(ahead[:, 0], -ahead[:, 2]))
    # Weighted by angle: weighted by area, a long face would distort its neighbours' shading.
    angle = np.arccos(np.clip(-(ahead * np.roll(ahead, 1, axis=1)).sum(axis=2), -1, 1))
    at_vertex = np.stack(
        [
            np.bincount(faces.ravel(), (angle * flat[:, k : k + 1]).ravel(), minlength=len(points))
            for k in range(3)
        ],
        axis=1,
    )
    smooth = _unit(at_vertex)[faces]  # (F, 3, 3)
    crease = np.einsum("fkx,fx->fk", smooth, flat) < _CREASE
    smooth[crease] = np.broadcast_to(flat[:, None], smooth.shape)[crease]
    normal = _unit(np.einsum("pk,pkx->px", weight, smooth[face]))
    place = np.einsum("pk,pkx->px", weight, points[faces[face]])
    view = _unit(np.array([0.0, 0.0, distance]) - place)
    normal = normal * np.where((flat[face] * view).sum(axis=1) < 0, -1, 1)[:, None]
    facing = (normal * view).sum(axis=1, keepdims=True)
    light = _AMBIENT + 0.10 * normal[:, 1:2]
    for direction, strength in _LIGHTS:
        light = (
            light
            + np.clip(normal @ (direction / np.linalg.norm(direction)), 0, None)[:, None] * strength
        )
    rim = 0.10 * (1 - np.abs(facing)) ** 3
    return np.clip(light * _CLAY + rim, 0, 1)


def _crevices(
    pixel: np.ndarray,
    face: np.ndarray,
    weight: np.ndarray,
    inverse: np.ndarray,
    faces: np.ndarray,
    side: int,
    focal: float,
) -> np.ndarray:
    """Factors (P,) in 0.55..1 that darken pixels behind their surroundings (under a table top).

    From the difference between the depth and the blurred depth, over covered pixels only.
    """
    from scipy.ndimage import gaussian_filter

    depth = 1 / (weight * inverse[faces[face]]).sum(axis=1).clip(1e-300)
    image, mask = np.zeros(side * side), np.zeros(side * side)
    image[pixel], mask[pixel] = depth, 1
    factor = np.ones(len(pixel))
    for sigma in (side / 100, side / 32):
        blurred = gaussian_filter(image.reshape(side, side), sigma, truncate=2.5).ravel()[pixel]
        cover = gaussian_filter(mask.reshape(side, side), sigma, truncate=2.5).ravel()[pixel]
        behind = depth - blurred / np.maximum(cover, 1e-6)
        # In units of the blur's own width at that depth.
        factor -= 0.35 * np.clip(behind * focal / depth / sigma / 4, 0, 0.65)
    return factor


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-300)


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Any]]],
    columns: Sequence[str] | None = None,
    *,
    size: int | None = None,
    across: int = 1,
) -> Any:
    """A PIL image with rows of images, each row under its title, `across` rows side by side.

    rows: (title, images); an image is a PIL image or a uint8 array (H, W), (H, W, 3 or 4), or None
    for a gap. columns: headings over the images. size: side of an image in pixels, by default the
    first one's height; others are scaled to fit and centred on white.

    Raises ValueError if an array is not uint8.
    """
    from PIL import Image, ImageDraw, ImageFont

    images_by_row = [
        [None if image is None else _as_image(image) for image in images] for _, images in rows
    ]
    every = [image for row in images_by_row for image in row if image is not None]
    size = size or (every[0].height if every else 128)
    wide = max([len(row) for row in images_by_row] + [len(columns or ()), 1])
    gap, line = 6, max(12, size // 12)
    font = ImageFont.load_default(size=line)
    cell = size + line + 2 * gap
    across = max(1, min(across, len(rows) or 1))
    deep = -(-len(rows) // across)
    head = line + 2 * gap if columns else 0
    band = wide * (size + gap) + 2 * gap
    sheet = Image.new("RGB", (across * band, head + max(deep, 1) * cell + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for block in range(across):
        for k, text in enumerate(columns or ()):
            draw.text((block * band + gap + k * (size + gap), gap), text, "#444", font=font)
    for number, ((title, _), images) in enumerate(zip(rows, images_by_row, strict=True)):
        x0 = (number % across) * band + gap
        y0 = head + (number // across) * cell
        draw.text((x0, y0 + gap // 2), str(title), "black", font=font)
        for k, image in enumerate(images):
            if image is None:
                continue
            scale = size / max(image.size)
            fitted = image.resize(
                [max(1, round(s * scale)) for s in image.size], Image.Resampling.LANCZOS
            )
            at = (
                x0 + k * (size + gap) + (size - fitted.width) // 2,
                y0 + line + gap + (size - fitted.height) // 2,
            )
            sheet.paste(fitted, at, fitted)
    return sheet


def _as_image(image: Any) -> Any:
    from PIL import Image

    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8:
            raise ValueError(f"image of dtype {array.dtype}; expected uint8")
        image = Image.fromarray(array)
    return image.convert("RGBA")
