"""The report file: self-contained, escaped, deterministic, its meshes decodable."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vitapack.compressor.evaluate.metrics import METRICS
from vitapack.compressor.report.render import frame_of, render
from vitapack.compressor.report.report import (
    ASSETS,
    Block,
    MetricRow,
    ReportData,
    ReportObject,
    SizePart,
    write_report,
)
from vitapack.runtime.decode.mesh import Mesh, surface_from_grid
from vitapack.runtime.errors import UserError

VOID = {"meta", "img", "br", "line", "rect", "path", "input", "hr", "link"}


class Page(HTMLParser):
    """Collects tags and text, and insists that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[self.tags[-1][1].get("id") or "js"] = data
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    def attributes(self, tag: str, name: str) -> list[str | None]:
        return [attrs[name] for found, attrs in self.tags if found == tag and name in attrs]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def sphere(radius=0.7, nodes=25) -> Mesh:
    line = np.linspace(-1.0, 1.0, nodes)
    grid = np.stack(np.meshgrid(line, line, line, indexing="ij"))
    return surface_from_grid(radius - np.linalg.norm(grid, axis=0), 1.0)


def full_data() -> ReportData:
    photo = np.full((20, 30, 3), 200, np.uint8)
    interval = {"mean": 0.91, "median": 0.92, "low": 0.87654, "high": 0.95, "n": 4}
    return ReportData(
        title="Chairs & <script>alert(1)</script>",
        lead=["First line.", "Second $line with $$."],
        headline=[("0.97", "mean V-IoU")],
        objects=[
            ReportObject(
                "chair </script>",
                photo,
                {"original": sphere(), "compressed": sphere(0.6)},
                {"compressed": 'V-IoU "0.6"'},
            ),
            ReportObject("nothing came out", None, {"original": sphere(), "compressed": None}),
        ],
        blocks=[
            Block("double", 0, 0.2, 0.15, 0.25, 8),
            Block("double", 1, 0.1, None, None, 4),
            Block("single", 0, 0.05, 0.04, 0.06, None),
            Block("single", 3, 0.07, 0.06, 0.08, 16),
        ],
        vitality_floor=0.03,
        sizes=[SizePart("8-bit weights", None, 2_000_000), SizePart("blocks", 8_000_000, None)],
        metrics=[MetricRow("compressed to original", {"v_iou": interval, "emd": interval})],
        settings={"steps": 20},
        versions={"vitapack": "0.1.0"},
    )


def written(tmp_path, data: ReportData, **options) -> tuple[str, Page]:
    text = write_report(tmp_path / "report.html", data, **options).read_text("utf-8")
    return text, Page(text)


def test_file_is_whole_and_asks_for_nothing_else(tmp_path):
    text, page = written(tmp_path, full_data(), picture=48)
    assert text.startswith("<!doctype html>")
    for name in ("src", "href", "data", "action"):
        for tag in ("img", "script", "link", "a", "object", "iframe"):
            assert all(str(v).startswith("data:image/png") for v in page.attributes(tag, name))
    assert not re.search(r"https?://|@import|url\(", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html"]


def test_text_is_escaped_and_dollars_survive(tmp_path):
    text, page = written(tmp_path, full_data(), picture=32)
    assert "<script>alert" not in text
    assert "Chairs & <script>alert(1)</script>" in page.words
    assert "chair </script>" in page.words
    assert "Second $line with $$." in page.words
    assert 'V-IoU "0.6"' in page.words
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 2


def test_every_section_says_its_numbers(tmp_path):
    words = written(tmp_path, full_data(), picture=32)[1].words
    for part in (
        "0.97",
        "double blocks",
        "single blocks",
        "kept, 4 bits",
        "pruned",
        "sampling floor 0.03",
        "double block 0: 0.2, 95 % interval 0.15 to 0.25; 8 bits",
        "single block 0: 0.05, 95 % interval 0.04 to 0.06; pruned",
        "original: 8 MB",
        "25.0 %",
        "V-IoU ↑",
        "EMD ↓",
        "0.877 to 0.95",
        METRICS["v_iou"].definition,
        "steps 20",
        "vitapack 0.1.0",
        "no mesh",
    ):
        assert part in words, part


def test_pictures_are_the_meshes_in_one_frame(tmp_path):
    page = written(tmp_path, full_data(), picture=40)[1]
    sources = page.attributes("img", "src")
    assert len(sources) == 1 + 2 + 1
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(s.split(",")[1])))) for s in sources
    ]
    both = sphere(), sphere(0.6)
    for picture, mesh in zip(pictures[1:3], both, strict=True):
        want = render(mesh, 40, frame=frame_of(*both), background=None)
        assert np.array_equal(picture, want)
    assert (pictures[1][..., 3] > 0).sum() > (pictures[2][..., 3] > 0).sum()
    assert all(page.attributes("img", "alt"))


def decoded(entry: dict) -> tuple[np.ndarray, np.ndarray]:
    places = np.frombuffer(base64.b64decode(entry["places"]), "<u2").reshape(-1, 3)
    kind = "<u4" if entry["wide"] else "<u2"
    faces = np.frombuffer(base64.b64decode(entry["faces"]), kind).reshape(-1, 3)
    return np.array(entry["low"]) + places / 65535 * np.array(entry["extent"]), faces


def test_embedded_meshes_decode_to_the_meshes(tmp_path):
    page = written(tmp_path, full_data(), picture=32)[1]
    meshes = json.loads(page.scripts["meshes"])
    assert page.attributes("div", "data-mesh") == list(meshes) == ["m0", "m1", "m2"]
    for key, mesh in zip(meshes, (sphere(), sphere(0.6), sphere()), strict=True):
        vertices, faces = decoded(meshes[key])
        assert np.array_equal(vertices[faces].shape, mesh.vertices[mesh.faces].shape)
        assert np.abs(vertices[faces] - mesh.vertices[mesh.faces]).max() < 2e-5
        assert meshes[key]["radius"] > 0.5


@pytest.mark.parametrize("nodes", [91, 141])
def test_large_meshes_are_embedded_coarser_or_with_wide_indices(tmp_path, nodes):
    mesh = sphere(0.9, nodes)
    data = ReportData("x", objects=[ReportObject("ball", None, {"a": mesh})])
    page = written(tmp_path, data, picture=16, max_faces=5000)[1]
    vertices, faces = decoded(json.loads(page.scripts["meshes"])["m0"])
    assert 1500 < len(faces) <= 5000
    assert np.linalg.norm(vertices, axis=1) == pytest.approx(0.9, abs=0.03)
    page = written(tmp_path, data, picture=16, max_faces=10**7)[1]
    entry = json.loads(page.scripts["meshes"])["m0"]
    assert entry["wide"] == (nodes == 141) == (len(mesh.vertices) > 65535)
    assert len(decoded(entry)[1]) == len(mesh.faces)


def test_flat_and_empty_meshes_are_no_trouble(tmp_path):
    flat = Mesh(np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]]), np.array([[0, 1, 2]]))
    none = Mesh(np.zeros((0, 3)), np.zeros((0, 3)))
    data = ReportData("x", objects=[ReportObject("f", None, {"a": flat, "b": none})])
    page = written(tmp_path, data, picture=16)[1]
    assert "no mesh" in page.words
    assert list(json.loads(page.scripts["meshes"])) == ["m0"]


def test_parts_left_empty_are_left_out(tmp_path):
    page = written(tmp_path, ReportData("Only a title"))[1]
    assert [tag for tag, _ in page.tags if tag == "h2"] == []
    assert json.loads(page.scripts["meshes"]) == {}
    zero = ReportData("x", blocks=[Block("single", 0, 0.0, bits=8)], sizes=[SizePart("a", 0, 0)])
    assert "single blocks" in written(tmp_path, zero)[1].words


def test_input_images_of_every_kind(tmp_path):
    photo = Image.new("L", (900, 300), 128)
    photo.save(tmp_path / "photo.png")
    kinds = [
        photo,
        tmp_path / "photo.png",
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8), np.uint8),
    ]
    (tmp_path / "out").mkdir()
    data = ReportData("x", objects=[ReportObject(str(k), image) for k, image in enumerate(kinds)])
    page = written(tmp_path / "out", data, picture=64)[1]
    sizes = [
        Image.open(io.BytesIO(base64.b64decode(s.split(",")[1]))).size
        for s in page.attributes("img", "src")
    ]
    assert sizes == [(128, 43), (128, 43), (8, 8), (8, 8)]


def test_same_data_same_bytes_and_a_bad_place_is_plain(tmp_path):
    data = replace(full_data(), objects=full_data().objects[1:])
    first = written(tmp_path, data, picture=16)[0]
    assert first == written(tmp_path, data, picture=16)[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_report(tmp_path / "file" / "report.html", data, picture=16)


def test_viewer_and_renderer_share_camera_and_lights():
    script = (ASSETS / "viewer.js").read_text("utf-8")
    for number in ("FIELD_OF_VIEW = 30", "azimuth: 35, elevation: 25", "1.03 * radius"):
        assert number in script
    for vector in ("-0.70, 0.75, 0.50", "0.85, 0.10, 0.45", "0.80, 0.74, 0.68"):
        assert vector in script
        assert vector in (ASSETS.parent / "render.py").read_text("utf-8")
