"""`vitapack tune`: measures the GEMMs of a packed file on this GPU and caches the fastest.

The cache is valid for one GPU model and Triton version; later runs of every packed model with the
same sizes use it. Without it the shipped tables are used.
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
    """Distinct (N, K, layout) of the packed file's linears that Triton kernels run, without
    modulation."""
    header = read_header(path)
    shapes = []
    for name, linear in header.network.linears().items():
        layout = header.layout(name)
        if "triton" in layout.kernels and linear.role != "modulation":
            shapes.append((linear.out, linear.inputs, layout))
    return list(dict.fromkeys(shapes))


def rows_of(tokens: list[int]) -> list[int]:
    """Row counts of the GEMMs of a guided step in two passes: each stream alone, both joined, and
    the same with a single condition token (`guidance.velocity_of`)."""
    return sorted({1, tokens[0] + 1, *tokens, sum(tokens)})


def tune_packed(
    path: str | os.PathLike[str],
    tokens: list[int],
    *,
    device: str = "cuda:0",
    again: bool = False,
    control: Control | None = None,
) -> dict[str, Any]:
    """Tunes a packed file's linears for `tokens` latents and condition tokens, see `rows_of`.

    `again` measures cached sizes too. Returns {"gpu", "cache", "choices"}. Raises UserError without
    a supported GPU, or if no linear is packed.
    """
    import torch

    control = control or Control()
    linears = shapes_of(path)
    if not linears:
        raise UserError(f"{path}: no linear is packed, so there is nothing to tune")
    try:
        gpu = torch.device(device)
    except RuntimeError:
        raise UserError(f"no device {device!r}: expected cuda or cuda:N") from None
    try:
        from vitapack.kernels.linear import gemm_table
        from vitapack.kernels.linear.autotune import Shape, tune
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install vitapack[gpu]") from error
    if not gemm_table.INTERPRETED:
        if not (gpu.type == "cuda" and torch.cuda.is_available()):
            raise UserError(f"no CUDA GPU for {device!r}: tuning measures on the GPU itself")
        ready, why = support.gpu_support(torch.device(chosen_device(device)))
        if not ready:
            raise UserError(f"nothing to tune: {why}")
    shapes = [Shape(*shape) for shape in linears]

    def report(done: int, total: int, phase: str) -> None:
        control.step(phase, done, total)

    try:
        with torch.inference_mode():
            choices = tune(gpu, shapes, rows_of(tokens), again=again, report=report)
    except ValueError as error:
        raise UserError(str(error)) from error
    arch, name = gemm_table.properties(gpu.index)
    return {"gpu": name, "cache": str(gemm_table.cache_path(arch, name)), "choices": choices}


def describe(result: dict[str, Any]) -> str:
    """One line per GEMM: the fastest configuration and its gain over the shipped table's."""
    lines = [f"{result['gpu']}: {len(result['choices'])} measured, kept in {result['cache']}"]
    for key, row in result["choices"].items():
        default = row["default_us"]
        gain = f", {default / row['us']:.2f}x of the default" if default else ""
        lines.append(f"{key}: {row['how']} {row['us']:.0f} us{gain}")
    return "\n".join(lines)
