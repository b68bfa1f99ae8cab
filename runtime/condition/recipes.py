"""Frames an object as each family does: turns an image into the image encoder's input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitapack.runtime.condition.images import separate
from vitapack.runtime.errors import UserError

Prepare = Callable[[Image.Image, str], Tensor]  # image, its name -> (3, H, W) in 0..1


def hunyuan_framing(size: int, pixels: int, border: float) -> Prepare:
    """Hunyuan3D: the object's bounding box at 1 - `border` of a white square of the image's longer
    side, resized to `size` (bicubic) and then to the encoder's `pixels` (bilinear, antialiased)."""

    def prepare(image: Image.Image, name: str) -> Tensor:
        rgb, alpha = separate(image, name)
        side = max(alpha.shape)
        rows, columns = np.nonzero(alpha.any(1))[0], np.nonzero(alpha.any(0))[0]
        top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
        # As published, without the last row and column.
        box = np.dstack([rgb, alpha])[top:bottom, left:right]
        scale = int(side * (1 - border)) / max(box.shape[:2])
        height, width = (max(1, int(length * scale)) for length in box.shape[:2])
        method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
        # Per channel: pillow would weight colours by alpha; the published pipeline does not.
        channels = [Image.fromarray(np.ascontiguousarray(box[..., c])) for c in range(4)]
        small = np.dstack([np.asarray(c.resize((width, height), method)) for c in channels])
        square = np.full((side, side, 3), 255, np.uint8)
        cover = small[..., 3:] / np.float32(255)
        flat = small[..., :3] * cover + 255 * (1 - cover)
        y, x = (side - height) // 2, (side - width) // 2
        square[y : y + height, x : x + width] = flat.clip(0, 255)
        grid = torch.from_numpy(square).permute(2, 0, 1)[None].float()
        grid = F.interpolate(grid, size=(size, size), mode="bicubic").round().clamp(0, 255) / 255
        if size != pixels:
            grid = F.interpolate(grid, size=(pixels, pixels), mode="bilinear", antialias=True)
        return grid[0]

    return prepare


def step1x_framing(pixels: int, fill_ratio: float) -> Prepare:
    """Step1X-3D: the object's bounding box at `fill_ratio` of a white square, resized (bicubic)."""

    def prepare(image: Image.Image, name: str) -> Tensor:
        rgb, alpha = separate(image, name)
        rows, columns = np.nonzero(alpha.any(1))[0], np.nonzero(alpha.any(0))[0]
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        cover = alpha[box][..., None] / np.float32(255)
        flat = rgb[box] * cover + 255 * (1 - cover)
        height, width = flat.shape[:2]
        side = max(round(max(height, width) / fill_ratio), height, width)
        square = np.full((side, side, 3), 255, np.uint8)
        y, x = (side - height) // 2, (side - width) // 2
        square[y : y + height, x : x + width] = flat.round()
        return _unit(Image.fromarray(square).resize((pixels, pixels), Image.Resampling.BICUBIC))

    return prepare


def trellis_framing(pixels: int) -> Prepare:
    """TRELLIS: a square of 1.2 times the object's bounding box, on black."""

    def prepare(image: Image.Image, name: str) -> Tensor:
        rgb, alpha = separate(image, name)
        rows = np.nonzero((alpha > 0.8 * 255).any(1))[0]
        columns = np.nonzero((alpha > 0.8 * 255).any(0))[0]
        if not len(rows):
            raise UserError(f"{name}: the object is translucent everywhere; expected an opaque one")
        x, y = (columns[0] + columns[-1]) / 2, (rows[0] + rows[-1]) / 2
        half = int(max(np.ptp(rows), np.ptp(columns)) * 1.2) // 2
        square = Image.fromarray(np.dstack([rgb, alpha])).crop(
            (round(x - half), round(y - half), round(x + half), round(y + half))
        )
        small = np.asarray(square.resize((pixels, pixels), Image.Resampling.LANCZOS))
        black = small[..., :3] * (small[..., 3:] / np.float32(255))
        return _unit(Image.fromarray(black.astype(np.uint8)))

    return prepare


def _unit(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)
