"""What is compiled, and with which flags: the C++ module and the CUDA library.

setup.py (pip) and csrc/build.py (developers) both read it, so they build the same code.
"""

import os
import shutil
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension

ROOT = Path(__file__).resolve().parents[1]
UNIX = sys.platform != "win32"
# Virtual architectures are listed too for the newest one, so that later GPUs can still compile it.
CUDA_ARCHITECTURES = ("80", "86", "89", "90")


def sources(ending: str) -> list[str]:
    """Files of csrc with an ending, relative to the checkout."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(f"*.{ending}"))


def extension() -> Pybind11Extension:
    """The module `vitapack._C`."""
    return Pybind11Extension(
        "vitapack._C",
        sources("cpp"),
        cxx_std=17,
        extra_compile_args=["-O3", "-pthread"] if UNIX else ["/O2"],
        extra_link_args=["-pthread"] if UNIX else [],
        depends=sources("h"),
    )


def nvcc() -> str | None:
    """The path of nvcc, None if the CUDA library is left out.

    VITAPACK_CUDA=0 leaves it out, =1 requires it; by default it is built if nvcc is found.
    """
    wanted, found = os.environ.get("VITAPACK_CUDA", "auto"), shutil.which("nvcc")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"VITAPACK_CUDA={wanted!r}: expected 0, 1 or auto")
    if wanted == "1" and not found:
        raise SystemExit("VITAPACK_CUDA=1, but no nvcc is on PATH; install the CUDA toolkit")
    if wanted == "1" and not UNIX:
        raise SystemExit("VITAPACK_CUDA=1: the CUDA library is not built on Windows yet")
    return found if wanted != "0" and UNIX else None


def nvcc_flags() -> list[str]:
    """Of compiling and of linking `libvitapack_cuda.so`, which has a C ABI."""
    newest = CUDA_ARCHITECTURES[-1]
    targets = [(arch, f"sm_{arch}") for arch in CUDA_ARCHITECTURES] + [
        (newest, f"compute_{newest}")
    ]
    flags = ["-O3", "-std=c++17", "-cudart", "static", "--threads", "2"]
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    for arch, code in targets:
        flags += ["-gencode", f"arch=compute_{arch},code={code}"]
    return flags


def nvcc_failed(reason: str) -> None:
    """Says so, and ends the build if the library was required: only EMD on CUDA tensors needs it.

    nvcc fails if it is too old for an architecture, or the host compiler is too new for it.
    """
    if os.environ.get("VITAPACK_CUDA") == "1":
        raise SystemExit(f"VITAPACK_CUDA=1, but nvcc failed: {reason}")
    print("vitapack: nvcc failed, see above; built without the CUDA library", flush=True)
