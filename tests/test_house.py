"""The house rules that a machine can check: one-way imports, names, no weight on import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["kernels", "runtime", "compressor", "benchmarks"]


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        for name in names:
            parts = name.removeprefix("vitapack.").split(".")
            found |= {parts[0]} & set(ORDER)
    return found


@pytest.mark.parametrize("room", ORDER)
def test_imports_run_one_way(room: str) -> None:
    above = set(ORDER[ORDER.index(room) + 1 :])
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & above, f"{path} imports upward"


def test_kernels_is_no_top_level_module() -> None:
    """A regular `kernels` package on the path would shadow another project's, and break
    transformers' DINOv2 with it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_the_root_and_the_command_line_is_light() -> None:
    code = (
        "import sys, vitapack.cli; print(sorted({'torch', 'numpy', 'triton'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
