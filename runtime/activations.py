"""Bytes that each phase holds beside its weights, known before anything is loaded.

Each formula adds up the tensors that are alive together at the fullest moment of a network's
forward pass, in units of one token's channels; tests count them in the running networks. Attention
is a fused kernel everywhere, so no term grows with the square of the tokens.
"""

from __future__ import annotations

import torch

from vitapack.runtime.dinov2 import Dinov2Config
from vitapack.runtime.dit import DiTConfig
from vitapack.runtime.memory import resident
from vitapack.runtime.shape_decoder import ShapeDecoderConfig
from vitapack.runtime.trellis import FlowConfig, OccupancyConfig

# What a process on a CPU takes once it computes, beside tensors and what it had when its pipeline
# was made: code and buffers of oneDNN and MKL, scipy, scikit-image. 90 to 120 MB (torch 2.13).
LIBRARIES = 110 << 20
TRANSFORMERS = 220 << 20  # of which no more than its DINOv2 is used
CUBLAS = 32 << 20  # torch's workspace for it, a stream: 32 MiB on sm_90, 8 on others
ENGINE_ROWS = 192  # rows of a block that a thread of the CPU engine takes at a time (int8_blocks.h)


def base_bytes(device: str, cuda_graphs: bool = False) -> int:
    """What peaks stand on: on a CPU the process as it is now, with its libraries once they work; on
    a GPU cuBLAS' workspace, since torch's own allocations are counted there, and with `cuda_graphs`
    another one on the stream that they are recorded on."""
    if device == "cpu":
        return (resident() or 0) + LIBRARIES
    return CUBLAS * (1 + cuda_graphs)


def encoder_bytes(
    config: Dinov2Config, pixels: int, dtype: torch.dtype, *, expands: bool = False
) -> int:
    """One square picture through DINOv2: the MLP of a layer, with x held three times around it.

    A gated MLP's first two projections may be one or two tensors, after transformers' version.
    `expands`: a packed weight becomes floats for its product, as on GPUs.
    """
    tokens = 1 + config.registers + (pixels // config.patch) ** 2
    wide = (4 if config.swiglu else 2) * config.wide
    weight = config.hidden * config.wide if expands else 0
    return dtype.itemsize * (tokens * (3 * config.hidden + wide) + weight + 3 * pixels**2)


def step_bytes(
    config: DiTConfig | FlowConfig,
    latents: tuple[int, ...],
    cond_tokens: int,
    batch: int,
    dtype: torch.dtype,
    *,
    engine: bool = False,
    fused: str = "",
) -> int:
    """One call of the network on `batch` items; `engine`: by the CPU's fused int8 blocks; `fused`:
    by the GPU's operators on packed weights, "a16" or "a8"."""
    h, m, size = config.hidden, config.mlp_hidden, dtype.itemsize
    if isinstance(config, FlowConfig):
        tokens = (config.resolution // config.patch) ** 3 or latents[0]  # SLAT's blocks: any count
        channels = config.token_channels
        given = batch * (2 * tokens * channels + cond_tokens * config.cond_channels) * size
        if engine:
            # The float32 stream and attention's output; q, k and v in bytes, k and v of the
            # condition, with their scales and sums.
            plan = batch * tokens * (2 * 4 * h + 3 * h + 20 * config.heads)
            plan += batch * cond_tokens * (2 * h + 16 * config.heads)
            return given + plan + torch.get_num_threads() * ENGINE_ROWS * 5 * max(3 * h, m)
        # x of the caller and of the block, the MLP's input, its two wide tensors.
        weight = h * m * size if fused == "a16" else 0  # a packed one as floats
        return given + batch * tokens * (3 * h + 2 * m) * size + weight
    count = latents[0]
    tokens = count + cond_tokens
    given = batch * (2 * count * config.in_channels + cond_tokens * config.cond_channels) * size
    if engine:
        # Two float32 streams; q, k and v in bytes, with 28 bytes a head of scales and sums.
        streams = batch * tokens * (2 * 4 * h + 3 * h + 28 * config.heads)
        rows = torch.get_num_threads() * ENGINE_ROWS * 5 * (h + m)
        return given + streams + rows
    if fused:
        # What a linear reads, and the scratch that a packed weight is expanded to where tokens are
        # many: int8 in a8 (on sm_90, from int4). A single block holds z, linear1's output and then
        # either its input and scratch, or q, k and attention twice, or attention and the join. A
        # double block holds both streams and q, k and v twice, once with the room that v's view
        # keeps; later the joint attention and, of the longer stream, the MLP's two sides.
        code = 1 if fused == "a8" else size
        first = tokens * ((4 * h + m) * size + h * code)
        join = tokens * ((5 * h + m) * size + (h + m) * code)
        attention = tokens * (8 * h + m) * size
        mlp = tokens * 2 * h * size + max(count, cond_tokens) * (h + m) * (size + code)
        peaks = [0]
        if config.single_blocks:
            peaks += [batch * max(join, attention), batch * first + h * (3 * h + m) * code]
        if config.double_blocks:
            peaks += [batch * tokens * 9 * h * size, batch * mlp + h * m * code]
        return given + max(peaks)
    # Single block: x and its halves outside, linear1's 3h + m, q and k, attention, the wide part,
    # and both joined. Double block: both streams outside and inside, q, k and v twice, attention,
    # then the MLP of the longer stream.
    single = tokens * (8 * h + 3 * m) if config.single_blocks else 0
    double = tokens * 10 * h + max(count, cond_tokens) * (3 * h + 2 * m)
    return given + batch * max(single, double if config.double_blocks else 0) * size


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


def volume_bytes(config: ShapeDecoderConfig, chunk: int, dtype: torch.dtype) -> int:
    """The shape decoder: its transformer on all latents, or its cross-attention on one chunk."""
    width, geo = config.width, config.geo_width
    tokens = config.latents * (3 + 2 * 4) * width
    point = (3 + 2 * config.geo_mlp_expand) * geo + 3 + 6 * config.num_freqs
    asked = chunk * point + 2 * config.latents * geo
    return dtype.itemsize * max(tokens, asked)


def refine_bytes(resolution: int) -> int:
    """A grid's values, their interpolation and masks: 10 bytes a node; and what is made around the
    surface of an object that fills the cube: 2000 R^2, at most 100 MB since it is made in parts
    (measured from R = 96 to 384)."""
    return 10 * (resolution + 1) ** 3 + min(2000 * resolution**2, 100_000_000)


def surface_bytes(resolution: int) -> int:
    """Marching cubes on two or three grids, or the mesh of 6 R^2 faces as it is cleaned."""
    nodes = (resolution + 3) ** 3
    return max(9 * nodes, 4 * nodes + 2200 * resolution**2)


def occupancy_bytes(config: OccupancyConfig, dtype: torch.dtype) -> int:
    """TRELLIS' convolutions: four times the largest level, and its channels-last normalisation."""
    levels = enumerate(config.channels)
    largest = max(channels * (config.resolution * 2**level) ** 3 for level, channels in levels)
    return int(4.25 * largest) * dtype.itemsize
