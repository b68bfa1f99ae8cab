"""`vitapack doctor`: reports the features of this installation and how to add missing ones."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from pathlib import Path

import vitapack

ROOT = Path(vitapack.__file__).parent
PACKAGES = {
    "torch": "needed: pip install torch",
    "triton": "GPU kernels: pip install 'vitapack[gpu]'",
    "transformers": "image encoders of the published models: pip install 'vitapack[dinov2]'",
    "rembg": "images without alpha: pip install 'vitapack[background]'",
    "pot": "reference of the EMD tests only",
}


def examine() -> dict[str, str]:
    """One line per subject; a missing one names the affected feature and how to install it."""
    report = {"vitapack": vitapack.__version__, "python": platform.python_version()}
    for package, advice in PACKAGES.items():
        try:
            report[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            report[package] = f"not installed ({advice})"
    report["processor"] = _processor()
    report["gpu"] = _gpu()
    report["C++ module"] = (
        "built"
        if list(ROOT.glob("_C*"))
        else "missing: pip install . (needs a C++17 compiler); EMD and the int8 engine need it"
    )
    library = ROOT / "libvitapack_cuda.so"
    nvcc = "nvcc is on PATH: pip install . builds it" if shutil.which("nvcc") else "no nvcc on PATH"
    report["CUDA library"] = "built" if library.exists() else f"missing ({nvcc})"
    from vitapack.runtime.families.furniture.family import FOLDER

    bundled = FOLDER / "model.fp16.safetensors"
    report["bundled model"] = (
        f"{bundled.stat().st_size / 1e6:.1f} MB" if bundled.exists() else f"missing: {bundled}"
    )
    return report


def _processor() -> str:
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = next(
            (line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), ""
        )
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
    has = [flag for flag in wanted if f" {flag}" in flags]
    return f"{platform.machine()}, {' '.join(has) or 'no vector extensions known'}"


def _gpu() -> str:
    try:
        import torch
    except ImportError:
        return "unknown without torch"
    if not torch.cuda.is_available():
        return "none visible to torch: everything runs on the CPU"
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, sm_{properties.major}{properties.minor}, "
        f"{properties.total_memory / 2**30:.1f} GiB"
    )
