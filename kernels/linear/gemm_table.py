"""The GEMM configuration for each shape and GPU: a shipped table, overridden by a cache per GPU.

`tables/gemm.json` is shipped. Its entries were chosen by hand from machine code (issue slots,
registers, shared memory) and published measurements; they are not timed. `vitapack tune` measures
on a GPU and writes the cache, which is looked up first. A generation never tunes.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vitapack.kernels.linear.triton_gemm import Tile

from vitapack.kernels.linear.layouts import LAYOUTS, WeightLayout

TABLE = Path(__file__).parent / "tables" / "gemm.json"
ARCHS = (80, 86, 89, 90)  # compute capabilities for which every kernel is compiled and checked


@dataclass(frozen=True)
class Choice:
    """How one GEMM runs, and the source of that choice."""

    how: str
    tile: Tile | None  # None unless fused
    source: str  # "shipped table" or "tuned on this GPU"


def op_name(layout: WeightLayout, compute: str, gate: bool = False) -> str:
    """Name of a GEMM in the table: "w4a8", or "w4a8+gate" with gate and residual in the epilogue.

    The latter has its own entries because it spills registers on the largest tiles."""
    return f"{layout.codes.replace('q', 'w')}{compute}{'+gate' if gate else ''}"


def ops() -> list[str]:
    """Names of all GEMMs that the Triton kernels serve."""
    served = [layout for layout in LAYOUTS.values() if "triton" in layout.kernels]
    names = (
        op_name(layout, compute, gate)
        for layout in served for compute in ("a16", "a8") for gate in (False, True)
    )  # fmt: skip
    return list(dict.fromkeys(names))


def hows(op: str) -> tuple[str, ...]:
    """The methods by which a GEMM can run.

    fused: one kernel. dense: expand to a float scratch, then cuBLAS. expand: expand to an int8
    scratch, then the int8 GEMM. apart: the GEMM without gate, then a kernel for gate and residual.
    """
    plain = op.removesuffix("+gate")
    other = "dense" if plain.endswith("a16") else "expand"
    methods = ("fused",) if plain == "w8a8" else ("fused", other)  # w8a8 is the int8 GEMM
    return methods if op == plain else (*methods, "apart")


def bucket(m: int) -> int:
    """Rows rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: powers of two with half steps."""
    power = 1 << max(0, (m - 1).bit_length())
    return power * 3 // 4 if power >= 4 and m <= power * 3 // 4 else power


def arch_of(device: torch.device) -> int:
    """Compute capability as in sm_86; queried once per device."""
    return properties(device.index)[0]


# Triton's own switch, read on its import: kernels then run in Python on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def properties(index: int | None) -> tuple[int, str]:
    """(compute capability, name) of a CUDA device, or of the interpreter if it is in use."""
    import torch

    if INTERPRETED:
        return 86, "Triton interpreter"
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor, torch.cuda.get_device_name(index)


def table_arch(arch: int) -> int | None:
    """The capability whose table is used: its own, sm_86's for another sm_8x, or None."""
    if arch in ARCHS:
        return arch
    return 86 if arch // 10 == 8 else None


@functools.cache
def shipped() -> dict[str, Any]:
    """The shipped table, {op: {arch: [{rows, how, bm, bn, bk, warps, stages}]}}."""
    return json.loads(TABLE.read_text())


def default_choice(op: str, arch: int, m: int) -> Choice | None:
    """The shipped table's choice; None for hardware that it does not cover."""
    known = table_arch(arch)
    if known is None:
        return None
    for row in shipped()[op][str(known)]:
        if row["rows"] is None or m <= row["rows"]:
            return _choice(row, "shipped table")
    raise AssertionError(f"{TABLE}: {op} for sm_{known} ends before {m} rows")


def choose(op: str, device: torch.device, m: int, n: int, k: int, group: int) -> Choice | None:
    """The choice tuned on this GPU if there is one, else the shipped one, else None."""
    arch, name = properties(device.index)
    return _choose(op, arch, name, bucket(m), n, k, group)


@functools.lru_cache(maxsize=4096)
def _choose(op: str, arch: int, name: str, m: int, n: int, k: int, group: int) -> Choice | None:
    entry = cached(arch, name).get(key_of(op, m, n, k, group))
    if entry is not None and table_arch(arch) is not None:
        return _choice(entry, "tuned on this GPU")
    return default_choice(op, arch, m)


def key_of(op: str, m: int, n: int, k: int, group: int) -> str:
    return f"{op} rows {bucket(m)} {n}x{k} group {group}"


def _choice(row: dict[str, Any], source: str) -> Choice:
    from vitapack.kernels.linear.triton_gemm import Tile

    fields = {name: row[name] for name in ("bm", "bn", "bk", "warps", "stages") if name in row}
    return Choice(row["how"], Tile(**fields) if row["how"] == "fused" else None, source)


def cache_path(arch: int, name: str) -> Path:
    """File of this GPU's tuned choices, in VITAPACK_CACHE or in vitapack in the user's cache."""
    import triton

    base = os.environ.get("VITAPACK_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitapack"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (Path(base) if base else home) / f"gemm-{slug}-sm{arch}-triton{triton.__version__}.json"


@functools.cache
def cached(arch: int, name: str) -> dict[str, Any]:
    """The entries of the cache. Raises ValueError for a damaged file instead of ignoring it."""
    path = cache_path(arch, name)
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())["choices"]
        for key, row in entries.items():
            op = key.split(" ", 1)[0]
            if row["how"] not in hows(op):
                raise ValueError(f"{key}: {row['how']!r}")
            _choice(row, "")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no tuning cache ({error}); delete it, or run `vitapack tune` again"
        ) from error
    return entries


def save(arch: int, name: str, entries: dict[str, Choice], measured: dict[str, Any]) -> Path:
    """Merges tuned choices into this GPU's cache atomically; later calls use them."""
    path = cache_path(arch, name)
    old = json.loads(path.read_text()) if path.exists() else {"choices": {}, "measured": {}}
    for key, choice in entries.items():
        tile = {} if choice.tile is None else asdict(choice.tile)
        tile.pop("swizzle", None)
        old["choices"][key] = {"how": choice.how, **tile}
    old["measured"].update(measured)
    old["gpu"] = name
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
        json.dump(old, part, indent=1, sort_keys=True)
    Path(part.name).replace(path)
    forget()
    return path


def forget() -> None:
    """Makes the next lookup read the cache file again."""
    cached.cache_clear()
    _choose.cache_clear()
