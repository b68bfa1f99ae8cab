"""Builds the wheel: the package mapping, the C++ module and, where nvcc is, the CUDA library.

The subpackages lie at the top level of the checkout and are installed under `vitapack` only: a
top-level module called `kernels` would break transformers' DINOv2 and overwrite another project.
VITAPACK_CUDA=0 leaves the CUDA library out, =1 requires it; the default builds it if nvcc is found
and works. VITAPACK_COMPILE=0 compiles nothing: `make` does it through ninja (csrc/build.py).
"""

import os
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))
from extension import extension, nvcc, nvcc_failed, nvcc_flags, sources  # noqa: E402

ParallelCompile("VITAPACK_BUILD_JOBS", default=2).install()


class Build(build_ext):
    """Builds `vitapack._C`, then `libvitapack_cuda.so` next to it with nvcc alone."""

    def run(self) -> None:
        super().run()
        compiler, files = nvcc(), sources("cu")
        if compiler is None or not files:
            return
        target = ROOT if self.inplace else Path(self.build_lib)
        library = target / "vitapack" / "libvitapack_cuda.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        command = [compiler, *nvcc_flags(), "--shared", "-o", str(library), *files]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            nvcc_failed(str(error))


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
    ext_modules=[] if os.environ.get("VITAPACK_COMPILE") == "0" else [extension()],
    cmdclass={"build_ext": Build},
)
