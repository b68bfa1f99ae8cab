"""Checks and times the GPU kernels on this machine's GPU: numerics, kernels, the whole network.

    python -m benchmarks.gpu                    # benchmarks/results/gpu-<name>.*
    python -m benchmarks.gpu --cpu --out x.json # rehearsal without a GPU, in Triton's interpreter

1. Every operator against float64 (`checks.py`), including odd shapes, outliers and NaN.
2. GEMMs of the network's linears: ours, expand + cuBLAS, torch._int_mm and cuBLAS fp16 in the same
   run, interleaved, medians, inputs in GPU memory, launches hidden; as fractions of cuBLAS's rate
   at 8192^3 on this GPU and, if the clock can be read, of the chip's peak.
3. Row kernels in GB/s, against the plain PyTorch operations that they replace.
4. Hunyuan3D-2mini with random weights: fp16 against int8 and int4, weight-only and with int8
   activations, eager (launches included) and as a CUDA graph; error to float32 and peak memory.

If something cannot run, for lack of memory for example, the report names it and the other parts
continue; JSON and Markdown are written after every part. Exit code 1 if a check fails or something
could not run. Timings are meaningless if a check fails. Clocks are not locked: run it on an idle
machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitapack.kernels.linear import support
from vitapack.kernels.linear.layouts import W8, W16, WeightLayout, layout_for
from vitapack.runtime.files import atomic_path
from vitapack.runtime.format.container import one_line

RESULTS = Path(__file__).resolve().parents[1] / "results"
# Multiply-adds per cycle and SM, fp16 with 32-bit accumulators and int8, by compute capability.
# GeForce cards of sm_86 and sm_89 have half the fp16 rate.
RATE = {80: (1024, 2048), 86: (512, 1024), 89: (512, 1024), 90: (2048, 4096)}
LINEARS = [  # (N, K) of Hunyuan3D-2mini
    (3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096), (7168, 1024), (1024, 5120),
]  # fmt: skip
Timed = dict[str, Callable[[], Any]]
SMI = {"driver": "driver_version", "clock_mhz": "clocks.max.sm", "power_limit_w": "power.limit"}
SINGLE = 3  # consecutive calls of one kernel


class Broken(list[dict[str, str]]):
    """The measurements that failed, with their errors; printed at once and kept for the report."""

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Turns an exception inside into one line of the report."""
        try:
            yield
        except Exception as error:
            why = one_line(f"{type(error).__name__}: {error}")
            self.append({"what": what, "why": why})
            progress(f"NOT RUN {what}: {why}")


def device_facts(device: Any) -> dict[str, Any]:
    import torch
    import triton

    facts: dict[str, Any] = {
        "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "device": "Triton interpreter, CPU",
    }  # fmt: skip
    if device.type != "cuda":
        return facts
    properties = torch.cuda.get_device_properties(device)
    facts |= {
        "device": properties.name, "arch": 10 * properties.major + properties.minor,
        "sms": properties.multi_processor_count, "memory_gib": properties.total_memory / 2**30,
        "cuda": torch.version.cuda,
    }  # fmt: skip
    # By UUID: nvidia-smi and CUDA number a machine's GPUs in different orders.
    gpu = f"GPU-{properties.uuid}"
    for name, field in SMI.items():
        facts[name] = smi(gpu, field)
    clock = re.match(r"\d+", facts["clock_mhz"] or "")
    rate = RATE.get(facts["arch"])
    if clock and rate:
        half = 0.5 if "GeForce" in properties.name and facts["arch"] in (86, 89) else 1.0
        scale = 2e-6 * facts["sms"] * int(clock.group())
        facts["peak_tflops"] = {"fp16": scale * rate[0] * half, "int8": scale * rate[1]}
    return facts


def smi(gpu: str, field: str) -> str | None:
    """One field of nvidia-smi, or None if it cannot be read."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--id={gpu}", f"--query-gpu={field}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines else None


def measure(
    calls: Timed, device: Any, repeats: int, broken: Broken, what: str, *, launches: bool = False
) -> dict[str, dict[str, float]]:
    """Median and p90 microseconds of each call, interleaved; calls that fail are left out.

    On a GPU the time of the kernels alone (`kernel_us`), or with `launches` the time from an idle
    GPU, launches included.
    """
    import torch

    from vitapack.kernels.linear.autotune import kernel_us

    def once(call: Callable[[], Any]) -> list[float]:
        if device.type != "cuda":
            start = time.perf_counter()
            call()
            return [1e6 * (time.perf_counter() - start)]
        if not launches:
            return kernel_us(call, SINGLE)
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        return [1e3 * first.elapsed_time(last)]

    samples: dict[str, list[float]] = {}
    for name, call in calls.items():
        with broken.noting(f"{what}, {name}"):
            once(call)  # warms up
            samples[name] = []
    for _ in range(repeats):
        for name, times in samples.items():
            times += once(calls[name])
    return {
        name: {
            "us": statistics.median(times),
            "p90_us": sorted(times)[min(len(times) - 1, int(0.9 * len(times)))],
            "n": len(times),
        }
        for name, times in samples.items()
    }


def ratio(times: dict[str, dict[str, float]], of: str, to: str) -> float | None:
    """The time of `of` divided by that of `to`, or None if one was not measured."""
    return times[of]["us"] / times[to]["us"] if of in times and to in times else None


def measured_peaks(device: Any, size: int, repeats: int, broken: Broken) -> dict[str, float]:
    """TFLOP/s of cuBLAS in fp16 and TOP/s of torch._int_mm in int8, at size^3."""
    import torch

    a = torch.randn(size, size, device=device).half()
    ia = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)
    calls: Timed = {"fp16": lambda: a @ a.t(), "int8": lambda: torch._int_mm(ia, ia.t())}
    times = measure(calls, device, repeats, broken, f"{size}^3")
    return {name: 2e-6 * size**3 / row["us"] for name, row in times.items()}


def gemm_times(
    device: Any, m: int, n: int, k: int, repeats: int, layouts: list[WeightLayout], broken: Broken
) -> dict[str, Any]:
    """Times of one linear in all its forms."""
    import torch
    import torch.nn.functional as F

    from benchmarks.gpu import checks as gpu_checks
    from benchmarks.gpu.checks import ops
    from vitapack.kernels.linear import gpu_ops
    from vitapack.kernels.linear.epilogue import Epilogue

    x = torch.randn(m, k, device=device).half()
    xq, sx = ops.join(None, x, False, True)
    sx = sx.flatten()
    bias = torch.randn(n, device=device).half()
    dense = (torch.randn(n, k, device=device) * 0.02).half()
    calls: Timed = {"cuBLAS fp16": functools.partial(F.linear, x, dense, bias)}
    if m > 16 and not (n % 8 or k % 8):
        w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        calls["torch._int_mm, no epilogue"] = functools.partial(torch._int_mm, xq, w.t())
    calls["quantize x"] = functools.partial(ops.join, None, x, False, True)
    for layout in layouts:
        weight = gpu_checks.random_weight(n, k, layout, device)
        label = gpu_checks.short(layout).replace("int", "w")
        tail = (weight, Epilogue(bias), torch.float16)
        calls[f"{label}a16"] = functools.partial(gpu_ops.gemm, x, None, *tail)
        calls[f"{label}a8"] = functools.partial(gpu_ops.gemm, xq, sx, *tail)
        calls[f"{label} expand + cuBLAS"] = functools.partial(_expand_and_multiply, x, weight, bias)
    times = measure(calls, device, repeats, broken, f"GEMM {m}x{n}x{k}")
    rows: dict[str, dict[str, Any]] = {}
    for name, row in times.items():
        speedup = ratio(times, "cuBLAS fp16", name)
        rows[name] = row | {"tflops": 2e-6 * m * n * k / row["us"], "speedup": speedup}
    return {"m": m, "n": n, "k": k, "times": rows}


def _expand_and_multiply(x: Any, weight: Any, bias: Any) -> Any:
    import torch
    import torch.nn.functional as F

    from vitapack.kernels.linear import gpu_ops

    return F.linear(x, gpu_ops.expand(weight, torch.float16), bias)


def row_times(
    device: Any, shape: tuple[int, int, int], repeats: int, broken: Broken
) -> list[dict[str, Any]]:
    """Fused row kernels and the operations that they replace, at (batch, tokens, width)."""
    import torch
    import torch.nn.functional as F

    from benchmarks.gpu.checks import ops

    batch, tokens, width = shape
    x = torch.randn(batch, tokens, width, device=device).half()
    shift, scale, gate = torch.randn(batch, 1, 3 * width, device=device).half().chunk(3, dim=-1)
    wide = torch.randn(batch, tokens, 7 * width, device=device).half()
    qkv, mlp = wide.split([3 * width, 4 * width], dim=-1)
    heads = max(1, width // 64)
    norm = torch.randn(width // heads, device=device).half()

    def adaln() -> Any:
        return (1 + scale) * F.layer_norm(x, (width,), eps=1e-6) + shift

    def rms() -> Any:
        q, k, _ = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return [
            (y.float() * torch.rsqrt(y.float().square().mean(-1, keepdim=True) + 1e-6)).half()
            * norm
            for y in (q, k)
        ]

    size = 2 * batch * tokens * width  # bytes of one fp16 stream
    cases: list[tuple[str, float, Callable[[], Any], Callable[[], Any]]] = [
        ("adaLN", 2 * size, lambda: ops.modulate(x, shift, scale, False), adaln),
        ("adaLN + quantize", 1.5 * size, lambda: ops.modulate(x, shift, scale, True), adaln),
        ("join GELU", 10 * size, lambda: ops.join(x, mlp, True, False),
         lambda: torch.cat([x, F.gelu(mlp, approximate="tanh")], -1)),
        ("join GELU + quantize", 7.5 * size, lambda: ops.join(x, mlp, True, True),
         lambda: torch.cat([x, F.gelu(mlp, approximate="tanh")], -1)),
        ("gate + residual", 3 * size, lambda: ops.gate_residual(x, gate, x),
         lambda: x + gate * x),
        ("q/k norm", 4 * size, lambda: ops.qk_norm(qkv, norm, norm, heads), rms),
    ]  # fmt: skip
    results = []
    for name, moved, ours, plain in cases:
        times = measure({"ours": ours, "plain": plain}, device, repeats, broken, name)
        if "ours" in times:
            results.append({
                "name": name, "times": times, "gb_s": moved / times["ours"]["us"] / 1e3,
                "speedup": ratio(times, "plain", "ours"),
            })  # fmt: skip
        progress(name)
    return results


def random_network(config: Any, layout: WeightLayout, device: Any) -> Any:
    """A network in its GPU form with all block linears packed in a layout and modulation tables.

    W16: the plain network with nn.Linear. Seeds depend on names alone, so networks of different
    layouts represent the same random weights up to rounding.
    """
    import torch
    from torch import nn

    from vitapack.compressor.packing.quantizers import QUANTIZERS
    from vitapack.runtime.engines.gpu_dit import GpuDiT
    from vitapack.runtime.networks.dit import DiT
    from vitapack.runtime.networks.linear import PackedLinear
    from vitapack.runtime.networks.modulation import Modulation, ModulationTable

    with torch.device("meta"):
        dit = (GpuDiT if layout.packed else DiT)(config).eval().requires_grad_(False)
    quantizer = QUANTIZERS["rtn"]()

    def random(name: str, *shape: int, spread: float) -> Any:
        rng = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        return torch.randn(*shape, generator=rng, device=device) * spread

    for name, module in list(dit.named_modules()):
        outer, _, last = name.rpartition(".")
        parent = dit.get_submodule(outer)
        final = name == "final_layer.adaLN_modulation.1"
        if final or isinstance(module, Modulation):
            count = 2 if final else 3 * module.sublayers
            table = random(name, 1, count * config.hidden, spread=0.2).half()
            table_module = ModulationTable(table, count)
            if final:
                parent[1] = table_module
            else:
                setattr(parent, last, table_module)
        elif isinstance(module, nn.Linear) and last != "lin" and not outer.startswith("time_in"):
            spread = module.in_features**-0.5
            weight = random(name, module.out_features, module.in_features, spread=spread).cpu()
            bias = None
            if module.bias is not None:
                bias = random(f"bias {name}", module.out_features, spread=0.1).half()
            if layout.packed and "_blocks." in name:
                packed = quantizer.quantize(name, weight, layout).to(device)
                layer: nn.Module = PackedLinear(packed, bias)
            else:
                layer = nn.Linear(
                    module.in_features, module.out_features, bias is not None, device="meta"
                )
                layer.weight = nn.Parameter(weight.half().to(device), requires_grad=False)
                if bias is not None:
                    layer.bias = nn.Parameter(bias, requires_grad=False)
            setattr(parent, last, layer)
    for name, parameter in dit.named_parameters():
        if parameter.is_meta and name.endswith("_norm.scale"):
            parent = dit.get_submodule(name.rpartition(".")[0])
            parent.scale = nn.Parameter(torch.ones(parameter.shape, device=device).half(), False)
    dit.time_in = nn.Identity()  # the steps below are rows of the tables
    assert not any(t.is_meta for t in dit.state_dict().values())
    return dit


def plain_step(dit: Any, x: Any, when: Any, cond: Any) -> Any:
    """`DiT.evaluate`, in plain PyTorch."""
    import torch

    x, y = dit.latent_in(x), dit.cond_in(cond)
    for block in dit.double_blocks.values():
        x, y = block(x, y, when)
    z = torch.cat([y, x], dim=1)
    for block in dit.single_blocks.values():
        z = block(z, when)
    return dit.final_layer(z[:, y.shape[1] :], when)


def network_times(
    device: Any, config: Any, latents: int, condition: int, repeats: int, broken: Broken
) -> list[dict[str, Any]]:
    """Times of a step of batch 2 for all bits and activation modes, with fp16 in the same run."""
    import torch

    from vitapack.runtime.engines.cuda_graph import Recording
    from vitapack.runtime.networks.linear import PackedLinear
    from vitapack.runtime.networks.modulation import StepModulation

    cuda = device.type == "cuda"
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, latents, config.in_channels, generator=rng).to(device).half()
    cond = torch.randn(2, condition, config.cond_channels, generator=rng).to(device).half()
    when = StepModulation(rows=torch.zeros(1, dtype=torch.long, device=device))
    forms = [("fp16", W16, "a16")] + [
        (f"int{layout.bits} {compute}", layout, compute)
        for layout in (W8, layout_for(4, 64)) for compute in ("a16", "a8")
    ]  # fmt: skip
    exact = recording = None
    steps: Timed = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, layout, compute in forms:
        what = f"network of {latents} + {condition} tokens, {name}"
        with broken.noting(what):
            dit = random_network(config, layout, device)
            for module in dit.modules():
                if isinstance(module, PackedLinear):
                    module.compute = compute
            weights = sum(t.nbytes for t in dit.state_dict().values())
            call = dit.velocity if layout.packed else functools.partial(plain_step, dit)
            step = functools.partial(call, x, when, cond)
            out = step().float()
            row: dict[str, Any] = {"name": name, "weights_bytes": weights}
            if not layout.packed:
                with broken.noting(f"{what}, in float32"):
                    exact = in_float32(dit, x, when, cond)
            if exact is not None:
                row["error"] = ((out - exact).norm() / exact.norm()).item()
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                step()
                row["activation_bytes"] = torch.cuda.max_memory_allocated(device) - before
            rows[name], steps[name] = row, step
        if cuda and name in steps:
            with broken.noting(f"{what}, as a CUDA graph"):
                recording = Recording(
                    lambda x, cond, call=call: call(x, when, cond), (x, cond), recording
                )
                steps[f"{name}, graph"] = functools.partial(recording, x, cond)
        progress(what)
    times = measure(steps, device, repeats, broken, f"step of {latents} latents", launches=True)
    for name, row in rows.items():
        for graph in ("", ", graph"):
            if f"{name}{graph}" in times:
                key = "graph_" if graph else ""
                row[f"{key}times"] = times[f"{name}{graph}"]
                row[f"{key}speedup"] = ratio(times, f"fp16{graph}", f"{name}{graph}")
    return [row for row in rows.values() if "times" in row]


def in_float32(dit: Any, x: Any, when: Any, cond: Any) -> Any:
    """A step with the same weights in float32; the network is fp16 again afterwards, exactly."""
    try:
        return plain_step(dit.float(), x.float(), when, cond.float())
    finally:
        dit.half()


def mini(hidden: int = 1024, double: int = 8, single: int = 16, channels: int = 64,
         cond: int = 1536) -> Any:  # fmt: skip
    """Hunyuan3D-2mini's hyper-parameters, or those of a smaller network of the same kind."""
    from vitapack.runtime.format.architecture import DiTConfig
    from vitapack.runtime.networks.dit import hunyuan_time

    return DiTConfig(
        in_channels=channels, cond_channels=cond, hidden=hidden, heads=hidden // 64,
        double_blocks=tuple(range(double)), single_blocks=tuple(range(single)), mlp_ratio=4.0,
        qkv_bias=True, guidance_embed=False, time=hunyuan_time(hidden),
    )  # fmt: skip


def run(
    device: Any, rehearsal: bool, repeats: int, write: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Runs all parts. The rehearsal runs all code that needs no GPU, at the smallest sizes."""
    import torch

    from benchmarks.gpu import checks as gpu_checks

    torch.manual_seed(0)
    half_only = (torch.float16,)
    shapes = [(1, 64, 64), (5, 33, 70)] if rehearsal else [
        (1, 64, 64), (1, 1024, 1024), (37, 50, 200), (130, 257, 129), (16, 1, 7), (33, 17, 64),
        (300, 1024, 1024), (2048, 1024, 4096), (3764, 3072, 1024), (4100, 1024, 5120),
    ]  # fmt: skip
    dtypes = half_only if rehearsal else (torch.float16, torch.bfloat16, torch.float32)
    row_shapes = [(2, 4, 64)] if rehearsal else [(2, 7, 40), (2, 1882, 1024), (1, 3, 2048)]
    linears = [(16, 64)] if rehearsal else LINEARS
    layouts = [W8, *(layout_for(4, group) for group in ((64,) if rehearsal else (64, 128)))]
    config = mini(64, 1, 1, 8, 16) if rehearsal else mini()
    condition = 3 if rehearsal else 1370

    broken = Broken()
    checks: list[gpu_checks.Check] = []
    result: dict[str, Any] = {
        "facts": device_facts(device), "checks": [], "failed": 0, "broken": broken,
        "measured_peaks": {}, "gemms": [], "rows": [], "networks": [],
    }  # fmt: skip
    for shape in shapes:
        with broken.noting(f"checks of GEMMs {shape}"):
            for check in gpu_checks.gemm_checks(device, [shape], dtypes):
                checks.append(check)
    with broken.noting("checks of the expansion"):
        for check in gpu_checks.expand_checks(device, 70, 200):
            checks.append(check)
    for shape in row_shapes:
        with broken.noting(f"checks of row kernels {shape}"):
            for check in gpu_checks.row_checks(device, [shape]):
                checks.append(check)
    failed = [check for check in checks if not check.passed]
    progress(f"{len(checks)} checks, {len(failed)} failed")
    for check in failed:
        progress(f"FAILED {check.name}: {check.error:.3g}, allowed {check.allowed:.3g}")
    result["checks"] = [asdict(check) | {"passed": check.passed} for check in checks]
    result["failed"] = len(failed)
    write(result)

    with broken.noting("peaks"):
        size = 64 if rehearsal else 8192
        result["measured_peaks"] = measured_peaks(device, size, repeats, broken)
    for m in [20] if rehearsal else [2, 128, 3764, 8884]:
        for n, k in linears:
            with broken.noting(f"GEMM {m}x{n}x{k}"):
                result["gemms"].append(gemm_times(device, m, n, k, repeats, layouts, broken))
                progress(f"GEMM {m}x{n}x{k}")
        write(result)
    with broken.noting("row kernels"):
        shape = (2, 3, 64) if rehearsal else (2, 4442, 1024)
        result["rows"] = row_times(device, shape, repeats, broken)
    write(result)
    for latents in [4] if rehearsal else [512, 3072]:
        with broken.noting(f"network of {latents} latents"):
            forms = network_times(device, config, latents, condition, repeats, broken)
            network = {"latents": latents, "condition": condition, "forms": forms}
            result["networks"].append(network)
        write(result)
    return result


def markdown(result: dict[str, Any]) -> str:
    """The report of one GPU."""
    from benchmarks.markdown import table

    facts, peaks = result["facts"], result["measured_peaks"]
    theory = facts.get("peak_tflops")
    out = [
        f"# {facts['device']}", "",
        "Written by `python -m benchmarks.gpu`. "
        + ", ".join(f"{key} {facts[key]}" for key in ("torch", "triton", "driver", "clock_mhz")
                    if facts.get(key)) + ".", "",
        f"Checks: {len(result['checks'])}, failed: {result['failed']}"
        + (". **The timings below are meaningless.**" if result["failed"] else ".") + "",
    ]  # fmt: skip
    out += [
        f"- FAILED {check['name']}: error {check['error']:.3g}, allowed {check['allowed']:.3g}"
        for check in result["checks"] if not check["passed"]
    ]  # fmt: skip
    out += [f"- NOT RUN {row['what']}: {row['why']}" for row in result["broken"]]
    best = {"fp16": "cuBLAS fp16 reaches {:.1f} TFLOP/s", "int8": "torch._int_mm {:.1f} TOP/s"}
    reached = [words.format(peaks[name]) for name, words in best.items() if name in peaks]
    out += ["", "At 8192^3: " + (", ".join(reached) or "not measured")
            + (f"; the chip's peaks are {theory['fp16']:.0f} and {theory['int8']:.0f}"
               if theory else "") + ".", "", "## GEMMs", "",
            "Medians. Fractions are of cuBLAS's rate above, in the same arithmetic.",
            ""]  # fmt: skip
    rows = []
    for gemm in result["gemms"]:
        for name, row in gemm["times"].items():
            best_rate = peaks.get("int8" if name.endswith("a8") or "int_mm" in name else "fp16")
            rate = share = ""
            if name != "quantize x":
                rate = f"{row['tflops']:.1f}"
                share = f"{row['tflops'] / best_rate:.0%}" if best_rate else ""
            rows.append(
                f"| {gemm['m']}x{gemm['n']}x{gemm['k']} | {name} | {row['us']:.1f} | "
                f"{row['p90_us']:.1f} | {rate} | {share} | {figure(row['speedup'])} |"
            )
    out += table("| M x N x K | kernel | us | p90 | T(FL)OP/s | of best | x cuBLAS fp16 |", rows)
    rows = [
        f"| {row['name']} | {row['times']['ours']['us']:.1f} | {row['gb_s']:.0f} | "
        f"{figure(row['speedup'])} |"
        for row in result["rows"]
    ]
    out += ["", "## Row kernels", "", *table("| kernel | us | GB/s | x plain PyTorch |", rows)]
    rows = []
    for network in result["networks"]:
        for row in network["forms"]:
            graph = row.get("graph_times")
            rows.append(
                f"| {network['latents']} + {network['condition']} | {row['name']} | "
                f"{row['times']['us'] / 1e3:.2f} | {figure(row['speedup'])} | "
                + (f"{graph['us'] / 1e3:.2f} | {figure(row['graph_speedup'])} | " if graph
                   else "| | ")
                + f"{row['weights_bytes'] / 1e6:.0f} | "
                f"{row.get('activation_bytes', 0) / 1e6:.0f} | {figure(row.get('error'), 4)} |"
            )  # fmt: skip
    head = (
        "| tokens | weights | ms | x fp16 | graph ms | x fp16 graph | MB of weights "
        "| MB of activations | error to fp32 |"
    )
    out += ["", "## Whole network, batch 2, random weights", "", *table(head, rows)]
    return "\n".join([*out, ""])


def figure(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="rehearsal in Triton's interpreter")
    parser.add_argument("--out", type=Path, help="the JSON; the Markdown has the same name")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if options.cpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    import torch

    if not options.cpu and not torch.cuda.is_available():
        progress("no CUDA GPU here; `--cpu` runs a rehearsal in Triton's interpreter")
        return 2
    if options.cpu and options.out is None:
        progress("a rehearsal's figures are meaningless: name a file with --out")
        return 2
    device = torch.device("cpu") if options.cpu else torch.device("cuda", 0)

    if not options.cpu:
        ready, why = support.gpu_support(device)
        if not ready:
            progress(why)
            return 2

    def write(result: dict[str, Any]) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", result["facts"]["device"].lower()).strip("-")
        out = options.out or RESULTS / f"gpu-{slug}.json"
        with atomic_path(out) as part:
            part.write_text(json.dumps(result, indent=1) + "\n")
        out.with_suffix(".md").write_text(markdown(result))

    with torch.inference_mode():
        result = run(device, options.cpu, options.repeats, write)
    print(markdown(result))
    return 1 if result["failed"] or result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
