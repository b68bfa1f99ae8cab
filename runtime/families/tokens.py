"""Condition tokens of the published models at their own picture sizes."""

from __future__ import annotations

# Of the published models at their own picture sizes: (518 / 14)^2 + 1, and what is special.
COND_TOKENS = 1370


SPECIAL_TOKENS = {
    "trellis-ss": 1374,
    "trellis-slat": 1374,
    "step1x-3d-label": 1373,
    "hunyuan3d-2mini-fast": 5330,  # pictures of 1022 px
    "hunyuan3d-2mini-turbo": 5330,
    "furniture": 50,
}
