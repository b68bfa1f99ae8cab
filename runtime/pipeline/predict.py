"""Bytes that each phase holds beside its weights, known before anything is loaded.

Each formula adds up the tensors that are alive together at the fullest moment of a network's
forward pass, in units of one token's channels; tests count them in the running networks. Attention
is a fused kernel everywhere, so no term grows with the square of the tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Collection

import torch

from vitapack.runtime.engines.predict import step_bytes
from vitapack.runtime.loading.memory import resident
from vitapack.runtime.networks.dit import DiTConfig
from vitapack.runtime.networks.flow import FlowConfig

# What a process on a CPU takes once it computes, beside tensors and what it had when its pipeline
# was made: code and buffers of oneDNN and MKL, scipy, scikit-image. 90 to 120 MB (torch 2.13).
LIBRARIES = 110 << 20
IMPORTED = {"transformers": 220 << 20}  # packages that components import, its DINOv2 alone
CUBLAS = 32 << 20  # torch's workspace for it, a stream: 32 MiB on sm_90, 8 on others


def base_bytes(device: str, cuda_graphs: bool = False) -> int:
    """What peaks stand on: on a CPU the process as it is now, with its libraries once they work; on
    a GPU cuBLAS' workspace, since torch's own allocations are counted there, and with `cuda_graphs`
    another one on the stream that they are recorded on."""
    if device == "cpu":
        return (resident() or 0) + LIBRARIES
    return CUBLAS * (1 + cuda_graphs)


def imported_bytes(packages: Collection[str]) -> int:
    """Bytes that importing these packages will add, for those that are not imported yet."""
    return sum(IMPORTED[package] for package in packages if package not in sys.modules)


def denoise_bytes(
    config: DiTConfig | FlowConfig,
    latents: tuple[int, ...],
    dtype: torch.dtype,
    engine: bool,
    fused: str,
    cond_tokens: int,
    batch: int,
) -> int:
    """A run's steps, guidance as one batch of two or in two passes; embedded, it has one."""
    batch = 1 if config.guidance_embed else batch
    found = step_bytes(config, latents, cond_tokens, batch, dtype, engine=engine, fused=fused)
    # A DiT keeps its memory for either pass; the flow transformer's is the same.
    if engine and batch == 1 and isinstance(config, DiTConfig) and not config.guidance_embed:
        found += step_bytes(config, latents, 1, 1, dtype, engine=True)
    return found
