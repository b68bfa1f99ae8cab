"""Which configuration of a GEMM runs where: tables as data, and a cache per GPU on top of them.

`tables/gemm.json` is shipped: hand-picked from machine code (issue slots, registers, shared memory)
and published measurements, since nothing here has been timed. `vitapack tune` measures on a GPU and
writes a cache of its own, looked up first. Nothing is ever tuned in a request.
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
ARCHS = (80, 86, 89, 90)  # the compute capabilities that every kernel is compiled and checked for


@dataclass(frozen=True)
class Choice:
    """How one GEMM runs, and where that is written."""

    how: str
    tile: Tile | None  # None unless fused
    source: str  # "shipped table" or "tuned on this GPU"


def op_name(layout: WeightLayout, compute: str, gate: bool = False) -> str:
    """The table's name of a GEMM: "w4a8", or "w4a8+gate" with gate and residual in the epilogue,
    which spills on the largest tiles."""
    return f"{layout.codes.replace('q', 'w')}{compute}{'+gate' if gate else ''}"


def ops() -> list[str]:
    """All GEMMs that the Triton kernels do."""
    served = [layout for layout in LAYOUTS.values() if "triton" in layout.kernels]
    names = (
        op_name(layout, compute, gate)
        for layout in served for compute in ("a16", "a8") for gate in (False, True)
    )  # fmt: skip
    return list(dict.fromkeys(names))


def hows(op: str) -> tuple[str, ...]:
    """The ways in which a GEMM can run.

    fused: one kernel. dense: expand to a float scratch, then cuBLAS. expand: to an int8 scratch,
    then the int8 GEMM. apart: the product as without a gate, then a kernel for gate and residual.
    """
    plain = op.removesuffix("+gate")
    other = "dense" if plain.endswith("a16") else "expand"
    ways = ("fused",) if plain == "w8a8" else ("fused", other)  # w8a8 is the int8 GEMM
    return ways if op == plain else (*ways, "apart")


def bucket(m: int) -> int:
    """Rows rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: powers of two with half steps."""
    power = 1 << max(0, (m - 1).bit_length())
    return power * 3 // 4 if power >= 4 and m <= power * 3 // 4 else power


def arch_of(device: torch.device) -> int:
    """Compute capability as in sm_86; asked once per device."""
    return properties(device.index)[0]


# Triton's own switch, read when it is imported: kernels run on CPU tensors, in Python.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def properties(index: int | None) -> tuple[int, str]:
    """(compute capability, name) of a CUDA device; of the interpreter's, if it runs the kernels."""
    import torch

    if INTERPRETED:
        return 86, "Triton interpreter"
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor, torch.cuda.get_device_name(index)


def table_arch(arch: int) -> int | None:
    """The table that serves a capability: its own, or for another sm_8x that of sm_86."""
    if arch in ARCHS:
        return arch
    return 86 if arch // 10 == 8 else None


@functools.cache
def shipped() -> dict[str, Any]:
    """The shipped table, {op: {arch: [{rows, how, bm, bn, bk, warps, stages}]}}."""
    return json.loads(TABLE.read_text())


def default_choice(op: str, arch: int, m: int) -> Choice | None:
    """What the shipped table says, or None for hardware that it does not know."""
    known = table_arch(arch)
    if known is None:
        return None
    for row in shipped()[op][str(known)]:
        if row["rows"] is None or m <= row["rows"]:
            return _choice(row, "shipped table")
    raise AssertionError(f"{TABLE}: {op} for sm_{known} ends before {m} rows")


def choose(op: str, device: torch.device, m: int, n: int, k: int, group: int) -> Choice | None:
    """The tuned choice of this GPU if there is one, else the shipped one, else None."""
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
    """Where this GPU's tuned choices lie: VITAPACK_CACHE, or vitapack in the user's cache."""
    import triton

    base = os.environ.get("VITAPACK_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitapack"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (Path(base) if base else home) / f"gemm-{slug}-sm{arch}-triton{triton.__version__}.json"


@functools.cache
def cached(arch: int, name: str) -> dict[str, Any]:
    """The cache's entries; a damaged file is an error, not a slow default."""
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
    """Merges tuned choices into this GPU's cache, atomically, and uses them from now on."""
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
    """Reads the cache anew when it is next asked."""
    cached.cache_clear()
    _choose.cache_clear()
