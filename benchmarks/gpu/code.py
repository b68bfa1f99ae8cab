"""Compiles every shipped kernel and counts its machine code, on any machine, without a GPU.

    python -m benchmarks.gpu.code               # all, 20 min: JSON, Markdown, recorded ceilings
    python -m benchmarks.gpu.code --only w8a8   # cases whose name starts with w8a8; writes no file

Each (kernel, configuration, architecture) of `kernels/linear/tables/gemm.json` is compiled ahead of
time, and the instructions of its main loop (the backward branch with most MMAs) are counted with
cuobjdump. Rules: no spills, no I2F, the right MMA, 128-bit copies, shared memory within the chip's
limit. The counts give a bound: a sub-core issues one instruction per cycle, so an SM at its MMA
peak must issue the loop of all warps in the cycles of its MMAs. Bank conflicts, latency, occupancy
and clocks are not visible: these kernels are compiled, not timed.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu.checks import SERVED, short
from vitapack.kernels.linear import gemm_table, triton_gemm, triton_rows
from vitapack.kernels.linear.layouts import WeightLayout
from vitapack.kernels.linear.triton_gemm import Tile

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "gpu-code.json"
CEILINGS = ROOT.parent / "tests" / "data" / "gpu_ceilings.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Most bytes of shared memory per block (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
# Multiply-adds per cycle and SM with 32-bit accumulators: (fp16, int8). From NVIDIA's peak rates of
# A100, A6000, RTX 6000 Ada and H100. GeForce cards of sm_86 and sm_89 have half the fp16 rate, so
# their fp16 loops have twice the time.
RATE = {80: (1024, 2048), 86: (512, 1024), 89: (512, 1024), 90: (2048, 4096)}
K, HIDDEN, MLP, HEADS, DIM = 1024, 1024, 4096, 16, 64  # Hunyuan3D-2mini


@dataclass(frozen=True)
class Case:
    """One binary: a kernel with its constants, for one architecture."""

    name: str
    arch: int
    kernel: Any
    types: dict[str, str]  # of the arguments that are not constants
    constants: dict[str, Any]
    warps: int
    stages: int = 3

    @property
    def key(self) -> str:
        return f"{self.name} sm_{self.arch}"

    @property
    def gemm(self) -> bool:
        return self.kernel is triton_gemm.gemm_kernel


@dataclass(frozen=True)
class Code:
    """Counts of a case's machine code; loop counts are 0 without a loop with MMAs."""

    registers: int
    stack: int  # bytes of local memory per thread
    shared: int  # bytes per block
    loop: int  # instructions
    mmas: int
    kind: str
    per_mma: float  # loop instructions per MMA; a WGMMA computes a whole tile
    macs: int  # multiply-adds per loop iteration and warp
    i2f: int  # in the main loop (grid arithmetic outside it divides in floats)
    local: int  # LDL and STL anywhere
    narrow: int  # asynchronous copies of less than 128 bits in the loop
    wide_loads: int  # 128-bit loads or asynchronous copies anywhere
    utilisation: float  # bound by issue slots on the MMA units' utilisation; 1 without MMAs
    seconds: float  # compile time


def gemm_case(
    layout: WeightLayout, compute: str, arch: int, tile: Tile, epilogue: str = "bias"
) -> Case:
    """A GEMM as `triton_gemm.gemm` launches it at K = 1024, fp16 outside."""
    a8, used = compute == "a8", (True, epilogue == "gelu", epilogue == "gate")
    constants = triton_gemm.flags(layout, K, a8, used, tile, plain=False)
    types = {
        "x": "*i8" if a8 else "*fp16", "sx": "*fp32", "w": f"*{layout.dtype.lower()}",
        "group": "*u8", "scale": "*fp32", "bias": "*fp16", "gate": "*fp16",
        "residual": "*fp16", "out": "*fp16",
    }  # fmt: skip
    op = gemm_table.op_name(layout, compute)
    group = f"-g{layout.group}" if layout.group else ""
    label = f"{op}{group} {tile.bm}x{tile.bn}x{constants['BK']}"
    name = f"{label} {tile.warps} warps {tile.stages} stages {epilogue}"
    return Case(name, arch, triton_gemm.gemm_kernel, types, constants, tile.warps, tile.stages)


def row_cases(arch: int) -> list[Case]:
    """The row kernels and the expansion at the sizes of Hunyuan3D-2mini."""
    half = dict.fromkeys(
        ("x", "shift", "scale", "left", "right", "gate", "y", "qkv", "q_scale", "k_scale", "q",
         "k"), "*fp16",
    ) | {"sx": "*fp32"}  # fmt: skip
    cases = []

    def add(name: str, kernel: Any, warps: int, types: dict[str, str], **constants: Any) -> None:
        cases.append(Case(name, arch, kernel, half | types, constants, warps))

    for quantize in (False, True):
        out = {"out": "*i8" if quantize else "*fp16"}
        suffix = " + quantize" if quantize else ""
        block, warps = triton_rows.row_shape(HIDDEN)
        add(f"adaLN{suffix}", triton_rows.modulate_kernel, warps, out,
            QUANTIZE=quantize, BLOCK=block)  # fmt: skip
        for label, width, left in (("GELU", MLP, False), ("join GELU", HIDDEN + MLP, True)):
            block, warps = triton_rows.row_shape(width)
            add(f"{label}{suffix}", triton_rows.join_kernel, warps, out,
                LEFT=left, GELU=True, QUANTIZE=quantize, BLOCK=block)  # fmt: skip
    block, warps = triton_rows.row_shape(HIDDEN)
    add("quantize", triton_rows.join_kernel, warps, {"out": "*i8"},
        LEFT=False, GELU=False, QUANTIZE=True, BLOCK=block)  # fmt: skip
    add("gate + residual", triton_rows.gate_residual_kernel, warps, {"out": "*fp16"}, BLOCK=block)
    add("q/k norm", triton_rows.qk_norm_kernel, triton_rows.row_shape(HEADS * DIM)[1], {},
        HEADS=HEADS, DIM=DIM)  # fmt: skip
    types = {"group": "*u8", "scale": "*fp32"}
    for layout in SERVED:
        bn, bk = triton_gemm.expand_tile(layout)
        for out in ("fp16", "i8") if layout.group else ("fp16",):
            add(f"expand {short(layout)} to {out}", triton_gemm.expand_kernel, 4,
                types | {"w": f"*{layout.dtype.lower()}", "out": f"*{out}"}, BITS=layout.bits,
                GROUP=layout.group, SCALED=out == "fp16", BN=bn, BK=bk, PLAIN=False)  # fmt: skip
    return cases


def shipped_cases() -> list[Case]:
    """Every binary that the shipped table can select, each once."""
    cases = []
    for arch in gemm_table.ARCHS:
        for layout, compute, gate in itertools.product(SERVED, ("a16", "a8"), (False, True)):
            op = gemm_table.op_name(layout, compute, gate)
            tiles = [
                Tile(**{name: row[name] for name in ("bm", "bn", "bk", "warps", "stages")})
                for row in gemm_table.shipped()[op][str(arch)]
                if row["how"] == "fused"
            ]
            epilogue = "gate" if gate else "bias"
            cases += [gemm_case(layout, compute, arch, tile, epilogue) for tile in tiles]
            if op.endswith("a16") and layout.group in (0, 64):  # the other one, largest tile
                largest = max(tiles, key=lambda tile: tile.bm * tile.bn)
                cases.append(gemm_case(layout, compute, arch, largest, "gelu"))
        cases += row_cases(arch)
    return cases


def compile_case(case: Case) -> Code:
    """Compiles a case and counts its code; pointers and strides are multiples of 16, as torch's."""
    signature: dict[str, str] = {}
    attributes = {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = case.types.get(name, "i32")
        sizes = ("N", "K", "width", "width_left", "dim", "heads")
        if signature[name].startswith("*") or name in sizes or name.startswith("stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    start = time.perf_counter()
    compiled = triton.compile(
        ASTSource(case.kernel, signature, case.constants, attributes),
        target=GPUTarget("cuda", case.arch, 32),
        options={
            "num_warps": case.warps, "num_stages": case.stages, **triton_rows.OPTIONS,
        },
    )  # fmt: skip
    seconds = time.perf_counter() - start
    triton_gemm.check_words(compiled.asm["ptx"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, usage = (
            subprocess.run(
                [TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-sass", "-res-usage")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return count(case, sass, *map(int, found.groups()), compiled.metadata.shared, seconds)


def count(case: Case, sass: str, registers: int, stack: int, shared: int, seconds: float) -> Code:
    """The counts of one disassembly."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;", sass)
    code = [(int(address, 16), text) for address, text in lines]
    loop: list[str] = []
    for address, text in code:
        target = re.match(r"BRA(?:\.\S+)?\s.*?(0x[0-9a-f]+)", text)
        if target and int(target.group(1), 16) < address:
            body = [t for a, t in code if int(target.group(1), 16) <= a <= address]
            if sum("MMA." in t for t in body) > sum("MMA." in t for t in loop):
                loop = body
    everywhere = collections.Counter(text.split()[0].split(".")[0] for _, text in code)
    mmas = [text.split()[0] for text in loop if "MMA." in text.split()[0]]
    macs = sum(map(mac_count, mmas))
    kinds = sorted({name.split(".")[0] for name in mmas})
    copies = [t.split()[0] for t in loop if t.startswith("LDGSTS")]
    utilisation = 1.0
    if mmas:
        integer = kinds[0].startswith("I")
        # Each of four sub-cores issues one instruction per cycle; an iteration's MMAs take
        # macs / rate.
        mma_cycles = macs * case.warps / RATE[case.arch][integer]
        utilisation = min(1.0, mma_cycles / (len(loop) * case.warps / 4))
    return Code(
        registers, stack, shared, len(loop), len(mmas), "+".join(kinds) or "-",
        round(len(loop) / max(len(mmas), 1), 2), macs,
        sum(re.match("I2FP?[. ]", t) is not None for t in loop or [t for _, t in code]),
        everywhere["LDL"] + everywhere["STL"],
        sum(".128" not in name for name in copies),
        sum(bool(re.match(r"(LDG|LDGSTS)\b.*\.128\b", t.split()[0])) for _, t in code),
        round(utilisation, 3), round(seconds, 2),
    )  # fmt: skip


def mac_count(name: str) -> int:
    """Multiply-adds per MMA instruction and warp, from the shape in its name."""
    group = re.search(r"GMMA\.(\d+)x(\d+)x(\d+)", name)
    if group:  # issued by each of four warps for all of them
        m, n, k = map(int, group.groups())
        return m * n * k // 4
    shape = re.search(r"MMA\.(16816|16832|1688)\b", name)
    assert shape is not None, name
    return {"16816": 16 * 8 * 16, "16832": 16 * 8 * 32, "1688": 16 * 8 * 8}[shape.group(1)]


def faults(case: Case, code: Code, ceiling: float | None) -> list[str]:
    """The rules that a binary breaks, one line each; empty if it may be shipped."""
    found = []
    if code.stack or code.local:
        found.append(f"spills: {code.stack} bytes of stack, {code.local} local accesses")
    if code.shared > SHARED_LIMIT[case.arch]:
        found.append(f"{code.shared} bytes of shared memory: at most {SHARED_LIMIT[case.arch]}")
    if not code.wide_loads and case.name != "gate + residual":
        found.append("no 128-bit load at all")
    if code.i2f and case.kernel in (triton_gemm.gemm_kernel, triton_gemm.expand_kernel):
        found.append(f"{code.i2f} integer-to-float conversions of weights")
    if case.gemm:
        wgmma = case.arch == 90 and case.constants["BM"] >= 64
        kind = ("I" if case.constants["A8"] else "H") + ("GMMA" if wgmma else "MMA")
        if code.kind != kind:
            found.append(f"main loop of {code.kind}: expected {kind}")
        if code.narrow:
            found.append(f"{code.narrow} copies of less than 128 bits in the loop")
        if ceiling is not None and code.per_mma > ceiling:
            found.append(f"{code.per_mma} instructions per MMA: at most {ceiling}")
    return found


def ceilings() -> dict[str, float]:
    return json.loads(CEILINGS.read_text())


def markdown(rows: list[tuple[Case, Code]]) -> str:
    """The report."""
    out = [
        "# GPU kernels, compiled ahead of time", "",
        f"Triton {triton.__version__}, {len(rows)} binaries. Compiled, not timed: no GPU was used."
        " Written by `python -m benchmarks.gpu.code`.", "",
        "i/MMA: instructions of the main loop per MMA (one WGMMA of sm_90 equals many MMAs of the"
        " others). Bound: the highest utilisation of the MMA units that issue slots allow, at the"
        " rates of A100, A6000, RTX 6000 Ada and H100; latency, bank conflicts and memory can only"
        " lower it. Tiles with few rows are for GEMMs with few rows, which memory limits.", "",
    ]  # fmt: skip
    for arch in gemm_table.ARCHS:
        out += [
            f"## sm_{arch}", "",
            "| kernel | registers | shared KiB | loop | MMA | i/MMA | bound |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for case, code in rows:
            if case.arch == arch:
                mma = f"{code.mmas} {code.kind}" if code.mmas else ""
                loop = (
                    (code.loop, code.per_mma, f"{code.utilisation:.0%}") if code.mmas else ("",) * 3
                )
                out.append(
                    f"| {case.name} | {code.registers} | {code.shared / 1024:.0f} | {loop[0]} | "
                    f"{mma} | {loop[1]} | {loop[2]} |"
                )
        out.append("")
    return "\n".join(out)


def write(rows: list[tuple[Case, Code]]) -> None:
    """Writes the JSON, then the page and the ceilings derived from it."""
    records = {case.key: asdict(code) for case, code in rows}
    for record in records.values():
        del record["seconds"]  # depends on the machine
    RESULTS.write_text(
        json.dumps({"triton": triton.__version__, "cases": records}, indent=1) + "\n"
    )
    RESULTS.with_suffix(".md").write_text(markdown(rows))
    # 5 % above the recorded ones: a compiler may move an instruction, but must not undo the
    # properties that the kernels rely on.
    limits = {case.key: round(1.05 * code.per_mma, 2) for case, code in rows if case.gemm}
    CEILINGS.write_text(json.dumps(limits, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--resume", action="store_true", help="keep the results of an interrupted run"
    )
    parser.add_argument("--only", default="", help="cases whose name starts so; writes no file")
    options = parser.parse_args()
    known: dict[str, Any] = {}
    if options.resume and RESULTS.exists():
        known = json.loads(RESULTS.read_text())["cases"]
    rows, broken = [], 0
    cases = [case for case in shipped_cases() if case.name.startswith(options.only)]
    for number, case in enumerate(cases, 1):
        old = known.get(case.key)
        code = compile_case(case) if old is None else Code(**old, seconds=0.0)
        wrong = faults(case, code, None)
        broken += bool(wrong)
        rows.append((case, code))
        print(f"{number}/{len(cases)} {case.key}: {code.per_mma} i/MMA, {code.registers} registers"
              f"{'; ' + '; '.join(wrong) if wrong else ''}", file=sys.stderr)  # fmt: skip
        if not options.only and number % 20 == 0:
            write(rows)
    if not options.only:
        write(rows)
    print(markdown(rows))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
