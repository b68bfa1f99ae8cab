"""`vitapack tune`: the GEMMs of a packed file, measured on the GPU at hand.

The cache that it writes belongs to one GPU model and Triton version; every later run of any packed
model with the same sizes finds it. Without it the shipped tables serve.
"""

from __future__ import annotations

import os
from typing import Any

from vitapack.kernels.linear import support
from vitapack.kernels.linear.layouts import WeightLayout
from vitapack.runtime.engines.device import chosen_device
from vitapack.runtime.errors import UserError
from vitapack.runtime.format.header import read_header
from vitapack.runtime.progress import Control


def shapes_of(path: str | os.PathLike[str]) -> list[tuple[int, int, WeightLayout]]:
    """(N, K, layout) of a packed file's linears that Triton kernels read, each once; modulation
    left out."""
    header = read_header(path)
    shapes = []
    for name, linear in header.network.linears().items():
        layout = header.layout(name)
        if "triton" in layout.kernels and linear.role != "modulation":
            shapes.append((linear.out, linear.inputs, layout))
    return list(dict.fromkeys(shapes))


def rows_of(tokens: list[int]) -> list[int]:
    """Rows of the GEMMs of a guided step in two passes: each stream by itself and all together, and
    the same with a single condition token (`denoise.velocity_of`)."""
    return sorted({1, tokens[0] + 1, *tokens, sum(tokens)})


def tune_packed(
    path: str | os.PathLike[str],
    tokens: list[int],
    *,
    device: str = "cuda:0",
    again: bool = False,
    control: Control | None = None,
) -> dict[str, Any]:
    """Tunes a file's linears for latents and condition of these lengths, see `rows_of`.

    Returns {"gpu", "cache", "choices"}. Raises UserError without a GPU that has kernels.
    """
    import torch

    control = control or Control()
    found = shapes_of(path)
    if not found:
        raise UserError(f"{path}: no linear is packed, so there is nothing to tune")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise UserError(f"no device {device!r}: expected cuda or cuda:N") from None
    try:
        from vitapack.kernels.linear import gemm_table
        from vitapack.kernels.linear.autotune import Shape, tune
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install vitapack[gpu]") from error
    if not gemm_table.INTERPRETED:
        if not (where.type == "cuda" and torch.cuda.is_available()):
            raise UserError(f"no CUDA GPU for {device!r}: tuning measures on the GPU itself")
        ready, why = support.gpu_support(torch.device(chosen_device(device)))
        if not ready:
            raise UserError(f"nothing to tune: {why}")
    shapes = [Shape(*shape) for shape in found]

    def report(done: int, total: int, phase: str) -> None:
        control.step(phase, done, total)

    try:
        with torch.inference_mode():
            choices = tune(where, shapes, rows_of(tokens), again=again, report=report)
    except ValueError as error:
        raise UserError(str(error)) from error
    arch, name = gemm_table.properties(where.index)
    return {"gpu": name, "cache": str(gemm_table.cache_path(arch, name)), "choices": choices}


def describe(result: dict[str, Any]) -> str:
    """One line a GEMM: what is fastest and what the shipped table would have taken."""
    lines = [f"{result['gpu']}: {len(result['choices'])} measured, kept in {result['cache']}"]
    for key, row in result["choices"].items():
        default = row["default_us"]
        gain = f", {default / row['us']:.2f}x of the default" if default else ""
        lines.append(f"{key}: {row['how']} {row['us']:.0f} us{gain}")
    return "\n".join(lines)
