"""The tables beside the paper's: their rows, their page, and the command for GPU owners."""

import json
from pathlib import Path

from benchmarks.published import hollow, paper_tables
from benchmarks.published import memory as published_memory
from benchmarks.published import page as published_page
from benchmarks.published import run as published
from vitapack.compressor.packing.compress import compress
from vitapack.compressor.planning.files import resolve_plan
from vitapack.compressor.tools.random_checkpoint import Sizes, write
from vitapack.runtime.condition.dinov2 import Dinov2Config
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.pipeline.pipeline import Pipeline

MINI = "hunyuan3d-2mini"
TINY = Sizes(
    hidden=32, heads=1, depth=(8, 16), latents=6, decoder_width=32, decoder_heads=1,
    decoder_layers=1, encoder=Dinov2Config(64, 1, 1, 14, 3, 0, 4, swiglu=True),
)  # fmt: skip


def test_rows_keep_the_paper_s_blocks_in_their_own_bits():
    for row, bits in paper_tables.BITS.items():
        kept = paper_tables.layer_map("step1x-3d", row)
        assert kept.kept("double") == kept.kept("single") == tuple(range(7))
        assert {block.bits for block in kept.blocks} == {bits}
    assert {b.bits for b in paper_tables.layer_map(MINI, "adaptive").blocks} == {4, 8}


def test_the_page_is_made_from_the_record(tmp_path: Path, monkeypatch):
    committed = published_page.PAGE.read_text()
    monkeypatch.setattr(published_page, "PAGE", tmp_path / "published.md")
    published.page()
    assert published_page.PAGE.read_text() == committed
    data = json.loads(published.RESULTS.read_text())
    card = {"device": "A card", "seconds": 1.25, "n": 5, "allocated": 2**30, "reserved": 2**31}
    data["gpu"] = {"A card": {MINI: {"adaptive": {"a8": card}}}}
    published_page.write(data)
    row = f"| A card | {MINI} | adaptive | a8 | 1.25 | 5 | 1.14 | 1.000 | 2.000 | 1.135 |"
    assert row in published_page.PAGE.read_text()


def test_the_paper_s_operations_are_met():
    """Within 0.5 %; Step1X-3D without attention, as the paper counts it."""
    data = json.loads(published.RESULTS.read_text())["tables"]
    for name, model in paper_tables.MODELS.items():
        for row, paper in model.rows.items():
            step = data[name][row]["step"]
            count = step["total"] - (step["attention"] if name == "step1x-3d" else 0)
            if paper.tflop and (name, row) != (MINI, "adaptive"):  # 22 blocks there, 21 by size
                assert abs(count / 1e12 / paper.tflop - 1) < 5e-3, (name, row)


def test_predictions_of_hollow_files_are_those_of_real_ones(tmp_path: Path):
    write(MINI, tmp_path / "m", sizes=TINY)
    checkpoint, real = open_checkpoint(tmp_path / "m"), tmp_path / "real.safetensors"
    compress(checkpoint, resolve_plan("paper", checkpoint), real, quantizer="rtn", embed=False)
    found = published_memory.predicted(checkpoint, MINI, tmp_path / "hollow.safetensors")
    for column, (device, compute, memory) in published_memory.COLUMNS.items():
        if device == "cuda":  # a CPU's begin with the process itself
            pipeline = Pipeline.from_packed(
                real, device, compute, parts=tmp_path / "m", memory=memory, absent=True
            )
            assert found[column] == pipeline.predicted_bytes()
    assert found["cpu a8 lean"]["decode"] > found["cuda a8 lean"]["decode"] > 0


def test_a_hollow_checkpoint_is_read_like_a_real_one(tmp_path: Path):
    with hollow.checkpoint(tmp_path, MINI, ("dit", "decoder")) as checkpoint:
        assert checkpoint.variant == MINI
        assert checkpoint.parameters("shape_decoder") == 214_212_865
        assert sum(p.stat().st_blocks * 512 for p in checkpoint.weights.files) < 2**20
    assert not list(tmp_path.iterdir())


def test_whole_loops_of_an_original_and_a_packed_network(tmp_path: Path):
    write(MINI, tmp_path, parts=("dit",), sizes=TINY)
    checkpoint, out = open_checkpoint(tmp_path), tmp_path / "packed.safetensors"
    kept = paper_tables.layer_map(MINI, "adaptive")
    compress(checkpoint, kept, out, quantizer="rtn", steps=[20], embed=False)
    for path, compute in ((tmp_path, "a16"), (out, "a16"), (out, "a8")):
        found = paper_tables.denoise_times(path, MINI, "cpu", compute, 1, (6, 64), 5)
        assert found["seconds"] > 0
        assert found["n"] == 1
        assert found["allocated"] is None


def test_a_rehearsal_of_the_gpu_command_on_a_cpu(tmp_path: Path, monkeypatch):
    """The whole command, each network in a process of its own; nothing of it is recorded."""
    before = published.RESULTS.read_bytes(), published_page.PAGE.read_bytes()
    words = ["gpu", "--tiny", "--device", "cpu", "--models", "trellis-ss", "--rows", "adaptive"]
    words += ["--repeats", "1", "--work", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["published", *words])
    published.main()
    found = json.loads((tmp_path / "rehearsal.json").read_text())["gpu"]["cpu"]["trellis-ss"]
    assert set(found) == {"adaptive"}
    assert set(found["adaptive"]) == {"a16", "a8"}
    assert all(figures["seconds"] > 0 for figures in found["adaptive"].values())
    assert "| cpu | trellis-ss | adaptive | a8 |" in (tmp_path / "rehearsal.md").read_text()
    assert (published.RESULTS.read_bytes(), published_page.PAGE.read_bytes()) == before
