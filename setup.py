"""Builds the wheel: the package mapping, the C++ module and, where nvcc is, the CUDA library.

The subpackages lie at the top level of the checkout and are installed under `vitapack` only: a
top-level module called `kernels` would break transformers' DINOv2 and overwrite another project.
VITAPACK_CUDA=0 leaves the CUDA library out, =1 demands it; the default builds it if nvcc is found
and works.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# Virtual architectures are listed too for the newest one, so that later GPUs can still compile it.
CUDA_ARCHITECTURES = ("80", "86", "89", "90")

ParallelCompile("VITAPACK_BUILD_JOBS", default=2).install()


class Build(build_ext):
    """Builds `vitapack._C`, then `libvitapack_cuda.so` beside it with nvcc alone (a C ABI)."""

    def run(self) -> None:
        super().run()
        sources = sorted(str(path) for path in (ROOT / "csrc").rglob("*.cu"))
        wanted = os.environ.get("VITAPACK_CUDA", "auto")
        if wanted not in ("0", "1", "auto"):
            raise SystemExit(f"VITAPACK_CUDA={wanted!r}: expected 0, 1 or auto")
        nvcc = shutil.which("nvcc")
        if wanted == "0" or not sources or (nvcc is None and wanted == "auto"):
            return
        if nvcc is None:
            raise SystemExit("VITAPACK_CUDA=1, but no nvcc is on PATH; install the CUDA toolkit")
        if sys.platform == "win32":
            if wanted == "1":
                raise SystemExit("VITAPACK_CUDA=1: the CUDA library is not built on Windows yet")
            return
        target = ROOT if self.inplace else Path(self.build_lib)
        library = target / "vitapack" / "libvitapack_cuda.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-O3", "-std=c++17", "--shared", "-cudart", "static", "--threads", "2"]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-o", str(library)]
        for arch in CUDA_ARCHITECTURES:
            command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        newest = CUDA_ARCHITECTURES[-1]
        command += ["-gencode", f"arch=compute_{newest},code=compute_{newest}"]
        try:
            subprocess.run([*command, *sources], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            # Too old for an architecture, or a host compiler too new for it: it says so above. Only
            # EMD on CUDA tensors needs the library.
            if wanted == "1":
                raise SystemExit(f"VITAPACK_CUDA=1, but nvcc failed: {error}") from error
            print("vitapack: nvcc failed, see above; built without the CUDA library", flush=True)


extension = Pybind11Extension(
    "vitapack._C",
    sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
    cxx_std=17,
    extra_compile_args=["-O3", "-pthread"] if sys.platform != "win32" else ["/O2"],
    extra_link_args=["-pthread"] if sys.platform != "win32" else [],
    depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
)

# The halves and where they lie in a checkout. Every folder below with Python files is a package.
HALVES = {name: name.rpartition(".")[2] for name in (
    "vitapack", "vitapack.kernels", "vitapack.runtime", "vitapack.compressor"
)}  # fmt: skip


def packages() -> list[str]:
    """Dotted names of all packages, found by walking the halves."""
    found = []
    for name, folder in HALVES.items():
        folders = {path.parent.relative_to(folder) for path in Path(folder).rglob("*.py")}
        found += [".".join((name, *inner.parts)) for inner in sorted({Path(), *folders})]
    return found


setup(
    packages=packages(),
    package_dir=HALVES,
    package_data={
        "vitapack.runtime": ["py.typed", "bundled/**/*"],
        "vitapack.kernels.linear": ["tables/*.json"],
        "vitapack.compressor.report": ["assets/*"],
    },
    ext_modules=[extension] if extension.sources else [],
    cmdclass={"build_ext": Build},
)
