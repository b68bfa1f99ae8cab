"""The rules of the house that a machine can check: floors, rooms, packaging, light imports."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HALVES = ["kernels", "runtime", "compressor", "benchmarks"]
# A room may import rooms of lower floors and none of its own floor. Type-only imports count.
FLOORS = {
    "runtime": [
        {"errors", "progress"},
        {"choices", "files"},
        {"format", "options"},
        {"networks"},
        {"engines"},
        {"loading", "sampling"},
        {"condition", "decode"},
        {"families", "mesh"},
        {"pipeline"},
        {"integrations", "tools"},
    ],
    "compressor": [
        {"options", "tools"},
        {"evaluate"},
        {"vitality"},
        {"planning"},
        {"packing"},
        {"distill"},
        {"report"},
    ],
    "kernels": [{"emd", "linear"}],
}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(path: Path) -> set[str]:
    """The halves that a file imports from."""
    return {name.removeprefix("vitapack.").split(".")[0] for name in imports(path)} & set(HALVES)


def files_of(half: str) -> list[Path]:
    found = sorted((ROOT / half).rglob("*.py"))
    assert found
    return found


def room_of(half: str, path: Path) -> str:
    return path.relative_to(ROOT / half).parts[0].removesuffix(".py")


@pytest.mark.parametrize("half", HALVES)
def test_imports_run_one_way(half: str) -> None:
    above = set(HALVES[HALVES.index(half) + 1 :])
    for path in files_of(half):
        assert not imported(path) & above, f"{path} imports upward"


@pytest.mark.parametrize("half", FLOORS)
def test_rooms_import_lower_floors_only(half: str) -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS[half]) for room in rooms}
    for path in files_of(half):
        room = room_of(half, path)
        if room == "__init__":
            continue
        assert room in floor, f"{path}: a room without a floor; give it one in FLOORS"
        for name in imports(path):
            if name.startswith(f"vitapack.{half}."):
                other = name.split(".")[2]
                assert other == room or floor[other] < floor[room], f"{path} imports {name}"


def test_every_room_says_what_it_is() -> None:
    for half in FLOORS:
        for path in files_of(half):
            if path.name == "__init__.py" and path.parent != ROOT / half:
                words = ast.get_docstring(ast.parse(path.read_text())) or ""
                assert "\n" in words, f"{path}: expected a paragraph"


def test_every_module_is_packaged() -> None:
    """setup.py's own rule, asked for the modules that a wheel would hold."""
    code = "import setup; from setuptools.discovery import *; print(*setup.packages(), sep='\\n')"
    code = "import setuptools; setuptools.setup = lambda **k: None\n" + code
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    packages = set(out.stdout.split())
    for half in ("vitapack", "kernels", "runtime", "compressor"):
        for path in files_of(half):
            inner = path.parent.relative_to(ROOT).parts
            name = ".".join(inner if half == "vitapack" else ("vitapack", *inner))
            assert name in packages, f"{path} would be in no wheel"


def test_kernels_is_no_top_level_module() -> None:
    """A regular `kernels` package on the path would shadow another project's, and break
    transformers' DINOv2 with it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_public_names() -> None:
    """The import names that users have."""
    code = (
        "from vitapack.runtime import Pipeline, attach, held_out, load_dit, save\n"
        "from vitapack.runtime.families.furniture import held_out as same\n"
        "from vitapack.runtime.mesh import save as also\n"
        "from vitapack.kernels.emd import emd\n"
        "assert held_out is same and save is also and callable(emd)\n"
        "import vitapack.runtime\n"
        "assert all(getattr(vitapack.runtime, name) for name in vitapack.runtime.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importing_the_root_and_the_command_line_is_light() -> None:
    code = (
        "import sys, vitapack.cli; print(sorted({'torch', 'numpy', 'triton'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
