"""Predicts the working memory of one call of a network, excluding weights."""

from __future__ import annotations

import torch

from vitapack.runtime.networks.dit import DiTConfig
from vitapack.runtime.networks.flow import FlowConfig

ENGINE_ROWS = 192  # rows of a block that a thread of the CPU engine takes at a time (int8_blocks.h)


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
