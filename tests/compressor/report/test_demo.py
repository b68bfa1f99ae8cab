"""The demo's whole way, on the bundled model cut down to a few blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from vitapack.compressor.report import demo
from vitapack.runtime.errors import UserError
from vitapack.runtime.families.furniture.family import FOLDER
from vitapack.runtime.pipeline.pipeline import Pipeline

DOUBLES, SINGLES = 3, 4


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint with its first blocks only."""
    folder = tmp_path_factory.mktemp("cut")
    config = yaml.safe_load((FOLDER / "config.yaml").read_text())
    config["model"]["params"] |= {"depth": DOUBLES, "depth_single_blocks": SINGLES}
    config["pipeline"]["num_inference_steps"] = 2
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    tensors = load_file(FOLDER / "model.fp16.safetensors")
    limits = {"model.double_blocks.": DOUBLES, "model.single_blocks.": SINGLES}

    def kept(name: str) -> bool:
        for prefix, count in limits.items():
            if name.startswith(prefix):
                return int(name.removeprefix(prefix).split(".")[0]) < count
        return True

    save_file({k: v for k, v in tensors.items() if kept(k)}, folder / "model.fp16.safetensors")
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "ANALYSIS_IMAGES": 4, "ANALYSIS_STEPS": 1, "ANALYSIS_POINTS": 64, "RANDOM_DRAWS": 1,
    }.items():  # fmt: skip
        monkeypatch.setattr(demo, name, value)


def test_everything_is_written_and_the_figures_are_of_these_files(
    cut: Path, tmp_path: Path, quick: None
) -> None:
    figures = demo.run_demo(tmp_path, images=1, model=str(cut))
    assert json.loads((tmp_path / "figures.json").read_text()) == figures.data
    assert (tmp_path / "report.html").stat().st_size > 1000
    for name in ("int8", "auto"):
        packed = tmp_path / f"furniture-{name}.safetensors"
        assert figures.data["dit_bytes"][name] < packed.stat().st_size
        assert len(Pipeline.from_packed(packed, device="cpu").dit.double_blocks) <= DOUBLES
    assert figures.data["blocks_kept"]["int8"] == DOUBLES + SINGLES
    assert figures.data["grid_iou_to_original"]["int8"] > 0.9
    assert len(figures.data["random_pruning_grid_iou"]) == 2
    assert sorted(p.name for p in (tmp_path / "meshes").iterdir()) == [
        "auto", "int8", "original", "truth",
    ]  # fmt: skip
    assert not list(tmp_path.rglob("*.part*"))


def test_more_pictures_than_are_bundled(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--images 500: at most"):
        demo.run_demo(tmp_path / "out", images=500)
    assert not (tmp_path / "out").exists()
