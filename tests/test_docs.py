"""What a machine can check of the hand-written pages: figures, links, the header example."""

import json
import re
from pathlib import Path

from tests.test_house import FLOORS
from vitapack.runtime.format.container import read_container
from vitapack.runtime.format.header import KEY

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_repeats_figures_of_the_generated_pages() -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("## What it does for you\n")[2].partition("\n## ")[0]
    pages = [(ROOT / "docs" / f"{page}.md").read_text() for page in ("published", "furniture")]
    # Versions such as 2.0 are left out: they have one digit after the point and no percent sign.
    figures = re.findall(r"\d+\.\d{3}|\d+\.\d%", section)
    assert len(figures) >= 20
    for figure in figures:
        assert any(figure in page for page in pages), f"{figure}: in no generated page"


def test_links_lead_to_files() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_file_names_are_those_of_the_tree() -> None:
    pattern = r"`((?:runtime|compressor|kernels|csrc|vitapack|benchmarks|tests|examples)/[\w./]+)`"
    for page in PAGES:
        for name in re.findall(pattern, page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_header_example_is_the_golden_file() -> None:
    text = (ROOT / "docs" / "format.md").read_text()
    (example,) = re.findall(r"```json\n(.*?)\n```", text, re.DOTALL)
    container = read_container(ROOT / "tests" / "data" / "packed_v1.safetensors")
    assert json.loads(example) == json.loads(container.metadata[KEY])


def test_the_house_lists_the_floors() -> None:
    text = (ROOT / "docs" / "house.md").read_text()
    for half, floors in FLOORS.items():
        if half == "kernels":
            continue
        section = text.partition(f"**{half}**")[2].split("\n\n**")[0]
        listed = re.findall(r"^\| (\d+) \| `(\w+)` \|", section, re.MULTILINE)
        expected = {(str(n), room) for n, rooms in enumerate(floors) for room in rooms}
        assert set(listed) == expected, f"docs/house.md, {half}"
