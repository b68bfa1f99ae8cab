"""Builds a checkout's compiled parts in place through ninja: only what changed, in seconds.

    make build    # or: python csrc/build.py

Objects, dependencies and build.ninja lie in build/ninja. `pip install` compiles without ninja, by
setup.py, with the same flags (extension.py).
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import extension

ROOT = extension.ROOT
FOLDER = Path("build/ninja")
MODULE = f"vitapack/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
LIBRARY = "vitapack/libvitapack_cuda.so"


def main() -> None:
    if not extension.UNIX:
        raise SystemExit("on Windows: python setup.py build_ext --inplace")
    nvcc = extension.nvcc()
    text = compiled_module()
    if nvcc and extension.sources("cu"):
        text += cuda_library(nvcc)
    (ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
    (ROOT / FOLDER / "build.ninja").write_text(f"builddir = {FOLDER}\n\n{text}")
    if code := ninja(MODULE):
        raise SystemExit(code)
    if LIBRARY in text and (code := ninja(LIBRARY)):
        extension.nvcc_failed(f"ninja ended with {code}")


def ninja(target: str) -> int:
    """Runs ninja for a target, the one of this environment before others; its exit code."""
    here = Path(sys.executable).parent / "ninja"
    program = str(here) if here.exists() else shutil.which("ninja")
    if program is None:
        raise SystemExit("ninja is missing: pip install -e '.[dev]'")
    # A job per core; ninja's default has two more, and the row kernels take 0.5 GB each.
    jobs = str(os.cpu_count() or 1)
    command = [program, "-j", jobs, "-f", str(FOLDER / "build.ninja"), target]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def compiled_module() -> str:
    """Rules and targets of the C++ module, with the flags that setuptools adds too."""
    module, told = extension.extension(), sysconfig.get_config_vars()
    includes = [*module.include_dirs, sysconfig.get_path("include")]
    flags = [*told["CFLAGS"].split(), told["CCSHARED"], *(f"-I{path}" for path in includes)]
    compiler = [*told["CXX"].split(), *flags, *module.extra_compile_args]
    # Of LDSHARED the compiler is C's; the rest is how this platform links a module.
    linker = [*told["CXX"].split(), *told["LDSHARED"].split()[1:]]
    return rules("cxx", compiler, linker, module.extra_link_args) + targets(
        "cxx", module.sources, MODULE
    )


def cuda_library(nvcc: str) -> str:
    """Rules and targets of the CUDA library."""
    command = [nvcc, *extension.nvcc_flags()]
    return rules("nvcc", command, [*command, "--shared"], []) + targets(
        "nvcc", extension.sources("cu"), LIBRARY
    )


def rules(name: str, compiler: list[str], linker: list[str], last: list[str]) -> str:
    return (
        f"rule {name}\n"
        f"  command = {line(compiler)} -MD -MF $out.d -c $in -o $out\n"
        "  description = compile $in\n  depfile = $out.d\n  deps = gcc\n\n"
        f"rule {name}_link\n"
        f"  command = {line(linker)} $in -o $out {line(last)}\n"
        "  description = link $out\n\n"
    )


def targets(rule: str, sources: list[str], result: str) -> str:
    objects = {source: f"{FOLDER}/{source}.o" for source in sources}
    lines = [f"build {target}: {rule} {source}" for source, target in objects.items()]
    lines += [f"build {result}: {rule}_link {' '.join(objects.values())}"]
    return "\n".join(lines) + "\n\n"


def line(words: list[str]) -> str:
    """Words of a command, as ninja reads them."""
    return shlex.join(words).replace("$", "$$")


if __name__ == "__main__":
    main()
