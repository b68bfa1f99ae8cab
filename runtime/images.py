"""From a picture file to an object on a known background.

The published models all begin so: separate the object (its alpha channel, or a background remover),
crop its box, put it in the middle of a square. What differs by family (border, background, size)
are arguments. Pictures without alpha need `rembg` (an extra) or a plain background; anything else
is an explicit error rather than a mesh of somebody's living room.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from vitapack.runtime.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 64_000_000  # larger pictures are refused before they are decoded
LEAST_SIDE = 16  # an object of fewer pixels has no shape to see
PLAIN = 12  # grey levels that a plain background may vary by (JPEG noise of a white ground: ~6)


def find_images(paths: list[Path]) -> list[Path]:
    """The picture files that the arguments name, folders expanded in name order."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"{path}: no {', '.join(SUFFIXES)} files in this folder")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder; expected a picture")
    return found


def load_image(path: Path) -> Image.Image:
    """The decoded picture. Raises UserError for anything that is not a whole, sane picture."""
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty (0 bytes); expected a PNG, JPEG or WebP")
        image = Image.open(path)
        if image.width * image.height > MAX_PIXELS:
            raise UserError(
                f"{path}: {image.width} x {image.height} pixels; at most {MAX_PIXELS} are "
                "accepted, scale it down first"
            )
        image.load()
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a picture") from None
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise UserError(f"{path}: not a picture; expected a PNG, JPEG or WebP file") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: damaged picture ({error}); save it again as PNG") from None
    return image


def separate(image: Image.Image, name: str = "image") -> tuple[np.ndarray, np.ndarray]:
    """RGB (H, W, 3) and alpha (H, W), both uint8, of the object in a picture.

    The alpha channel if it has one that is used; else a plain background is keyed out; else rembg,
    if it is installed. Raises UserError if there is no object, or no way to tell it from the
    background.
    """
    rgba = np.asarray(image.convert("RGBA"))
    rgb, alpha = rgba[..., :3], rgba[..., 3]
    if alpha.min() == 255:
        alpha = _remove_background(image, rgb, name)
    rows, columns = np.where((alpha > 127).any(1))[0], np.where((alpha > 127).any(0))[0]
    if not len(rows):
        raise UserError(f"{name}: no object in the picture (everything is background)")
    if max(np.ptp(rows), np.ptp(columns)) + 1 < LEAST_SIDE:
        raise UserError(
            f"{name}: the object is only {np.ptp(columns) + 1} x {np.ptp(rows) + 1} pixels; "
            f"expected at least {LEAST_SIDE}"
        )
    return rgb, alpha


def _remove_background(image: Image.Image, rgb: np.ndarray, name: str) -> np.ndarray:
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]]).astype(int)
    ground = np.median(border, axis=0)
    if (np.abs(border - ground).max(axis=1) <= PLAIN).mean() >= 0.98:
        return np.where(np.abs(rgb - ground).max(axis=2) > PLAIN, 255, 0).astype(np.uint8)
    try:
        from rembg import remove
    except ImportError:
        raise UserError(
            f"{name}: the picture has no alpha channel and no plain background; cut the object "
            "out (PNG with transparency) or pip install 'vitapack[background]'"
        ) from None
    return np.asarray(remove(image.convert("RGB"), only_mask=True))


def recentre(
    rgb: np.ndarray, alpha: np.ndarray, size: int, border: float, background: int
) -> np.ndarray:
    """(size, size, 3) uint8: the object's box, its longer side scaled to size * (1 - border), in
    the middle of a square of one grey."""
    rows, columns = np.where((alpha > 0).any(1))[0], np.where((alpha > 0).any(0))[0]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    cover = alpha[top:bottom, left:right, None] / 255.0
    flat = rgb[top:bottom, left:right] * cover + background * (1 - cover)
    crop = Image.fromarray(np.clip(flat + 0.5, 0, 255).astype(np.uint8))
    scale = round(size * (1 - border)) / max(crop.size)
    shape = (max(1, round(crop.width * scale)), max(1, round(crop.height * scale)))
    # Area averaging when shrinking, as the published pipelines do; bicubic when growing.
    method = Image.Resampling.BOX if scale <= 1 else Image.Resampling.BICUBIC
    crop = crop.resize(shape, method)
    canvas = Image.new("RGB", (size, size), (background,) * 3)
    canvas.paste(crop, ((size - crop.width) // 2, (size - crop.height) // 2))
    return np.asarray(canvas)
