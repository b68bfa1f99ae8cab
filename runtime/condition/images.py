"""Reads image files and separates the object from its background.

All published models start this way: separate the object (by alpha channel, or by a background
remover), crop its bounding box, centre it on a square. Border, background and size differ by family
and are arguments. An image without alpha needs a plain background or `rembg` (an extra); otherwise
it is an error, since the background would become part of the mesh.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vitapack.runtime.errors import UserError
from vitapack.runtime.format.container import one_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Accepted formats, for any suffix. Pillow reads more, and runs Ghostscript on EPS.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# Larger images are refused before they are decoded. The families put the object on a square of the
# longer side: 64 million pixels in one row would need a square of 10^16 bytes.
MAX_PIXELS = 64_000_000
MAX_SIDE = 10_000
_TOO_LARGE = f"at most {MAX_PIXELS} pixels and {MAX_SIDE} per side are accepted; scale it down"
ROWS = 256  # composited at a time: 64 million pixels at once took 4.9 GB
LEAST_SIDE = 16  # pixels; smaller objects have too little detail for a shape
PLAIN = 12  # grey levels by which a plain background may vary (JPEG noise on white: ~6)


def find_images(paths: list[Path]) -> list[Path]:
    """The image files among the arguments, folders expanded in name order.

    Hidden files in folders are skipped: macOS writes a `._chair.png` next to each `chair.png`.

    Raises UserError for a missing path or a folder without images.
    """
    images: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                p
                for p in path.iterdir()
                if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
            )
            if not inside:
                raise UserError(f"{path}: no {', '.join(SUFFIXES)} files in this folder")
            images += inside
        elif path.exists():
            images.append(path)
        else:
            raise UserError(f"{path}: no such file or folder; expected an image")
    return images


def load_image(path: Path) -> Image.Image:
    """Reads an image, turned upright; the first frame of an animation.

    Raises: UserError: if the file is not a complete image within the limits.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; expected an image")
    if not path.is_file():  # opening a pipe would block
        raise UserError(f"{path}: a folder, device or pipe; expected an image file")
    return _decoded(path, str(path))


def decode_image(data: bytes, name: str = "image") -> Image.Image:
    """Like `load_image`, for the bytes of a file; `name` stands for it in messages."""
    return _decoded(io.BytesIO(data), name)


def _decoded(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        if not (file.stat().st_size if isinstance(file, Path) else file.getbuffer().nbytes):
            raise UserError(f"{name}: the file is empty (0 bytes); expected a PNG, JPEG or WebP")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pillow's own limit, twice ours; odd metadata
            with Image.open(file, formats=FORMATS) as image:
                _expect_sane(image, name)
                image.load()
                return _turned(image)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{name}: too many pixels; {_TOO_LARGE}") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: not an image; expected a PNG, JPEG or WebP file") from None
    except Exception as error:  # decoders raise anything on hostile bytes
        raise UserError(
            f"{name}: damaged image ({one_line(error)}); save it again as PNG"
        ) from None


def upright(image: Any, name: str = "image") -> Image.Image:
    """Turns an image upright by its EXIF orientation and scales 16 bits per channel to 8.

    image: a pillow image, a path, or an array uint8 (H, W) or (H, W, 3 or 4). Raises: UserError:
    for anything else.
    """
    if isinstance(image, (str, os.PathLike)):
        return upright(load_image(Path(image)), name)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or image.shape[2:] in ((3,), (4,))):
            raise UserError(
                f"{name}: an array of {image.dtype} {list(image.shape)}; expected uint8 "
                "[height, width, 3 or 4]"
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise UserError(
            f"{name}: a {type(image).__name__}; expected a pillow image, a path or an array"
        )
    _expect_sane(image, name)
    try:
        image = _turned(image)
    except Exception as error:  # an image that the caller only opened is decoded here
        raise UserError(f"{name}: damaged image ({one_line(error)})") from None
    if image.mode.startswith(("I", "F")):
        # Pillow would clip 16 bits to 255 instead of scaling them: all white.
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UserError(f"{name}: 32 bits per pixel; expected 8 or 16; save it as PNG")
        image = Image.fromarray((values / 257 + 0.5).astype(np.uint8))
    return image


def _turned(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; copies only if needed, since an image may take 256 MB."""
    normal = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return image if normal else ImageOps.exif_transpose(image)


def _expect_sane(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise UserError(f"{name}: {image.width} x {image.height} pixels; {_TOO_LARGE}")


def separate(image: Any, name: str = "image") -> tuple[np.ndarray, np.ndarray]:
    """RGB (H, W, 3) and alpha (H, W), both uint8, of the object in an image (see `upright`).

    Uses the image's alpha channel if any pixel is transparent; else keys out a plain background;
    else uses rembg, if it is installed. Raises: UserError: if there is no object, or no way to tell
    it from the background.
    """
    image = upright(image, name)
    try:
        rgba = np.asarray(image.convert("RGBA"))
    except ValueError as error:
        raise UserError(f"{name}: {error}; save it as PNG in RGB") from None
    rgb, alpha = rgba[..., :3], rgba[..., 3]
    if alpha.min() == 255:
        alpha = _remove_background(image, rgb, name)
    rows, columns = np.where((alpha > 127).any(1))[0], np.where((alpha > 127).any(0))[0]
    if not len(rows):
        raise UserError(f"{name}: no object in the image (everything is background)")
    if max(np.ptp(rows), np.ptp(columns)) + 1 < LEAST_SIDE:
        raise UserError(
            f"{name}: the object is only {np.ptp(columns) + 1} x {np.ptp(rows) + 1} pixels; "
            f"expected at least {LEAST_SIDE}"
        )
    return rgb, alpha


def _remove_background(image: Image.Image, rgb: np.ndarray, name: str) -> np.ndarray:
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]]).astype(int)
    background = np.median(border, axis=0)
    if (np.abs(border - background).max(axis=1) <= PLAIN).mean() >= 0.98:
        alpha = np.zeros(rgb.shape[:2], np.uint8)
        for channel, level in enumerate(background):  # all at once take 2 GB for the largest image
            alpha[np.abs(rgb[..., channel] - np.float32(level)) > PLAIN] = 255
        return alpha
    try:
        from rembg import remove
    except ImportError:
        raise UserError(
            f"{name}: the image has no alpha channel and no plain background; cut the object out "
            "(PNG with transparency) or pip install 'vitapack[background]'"
        ) from None
    return np.asarray(remove(image.convert("RGB"), only_mask=True))


def recentre(
    rgb: np.ndarray, alpha: np.ndarray, size: int, border: float, background: int
) -> np.ndarray:
    """Centres the object's bounding box on a square of one grey level: (size, size, 3) uint8, the
    box's longer side scaled to size * (1 - border)."""
    rows, columns = np.where((alpha > 0).any(1))[0], np.where((alpha > 0).any(0))[0]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    flat = rgb[top:bottom, left:right].copy()
    for start in range(0, len(flat), ROWS):
        chunk = slice(start, start + ROWS)
        cover = alpha[top:bottom, left:right, None][chunk] / 255.0
        flat[chunk] = np.clip(flat[chunk] * cover + background * (1 - cover) + 0.5, 0, 255)
    crop = Image.fromarray(flat)
    scale = round(size * (1 - border)) / max(crop.size)
    shape = (max(1, round(crop.width * scale)), max(1, round(crop.height * scale)))
    # Area averaging to shrink, as in the published pipelines; bicubic to enlarge.
    method = Image.Resampling.BOX if scale <= 1 else Image.Resampling.BICUBIC
    crop = crop.resize(shape, method)
    canvas = Image.new("RGB", (size, size), (background,) * 3)
    canvas.paste(crop, ((size - crop.width) // 2, (size - crop.height) // 2))
    return np.asarray(canvas)
