"""`vitapack bench` on tiny models and on the bundled one."""

import json

import pytest
from tiny_released import tiny_released

from vitapack import cli
from vitapack.compressor.packing.compress import compress
from vitapack.compressor.planning.files import resolve_plan
from vitapack.runtime.errors import UserError
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.pipeline.pipeline import Pipeline
from vitapack.runtime.tools.bench import bench, describe
from vitapack.runtime.tools.flops import guided_flops, step_flops


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tiny_released("hunyuan3d-2mini", tmp_path_factory.mktemp("bench"))
    checkpoint = open_checkpoint(folder)
    out = folder / "packed.safetensors"
    compress(checkpoint, resolve_plan("int8", checkpoint), out, steps=[3], embed=False)
    return folder, out, checkpoint


def test_packed_beside_its_original(made):
    folder, out, checkpoint = made
    found = bench(out, original=folder, device="cpu", repeats=2, cond_tokens=10, resolution=8)
    names = ["packed a16", "bfloat16", "float32"]
    assert [row["name"] for row in found["steps"][::2]] == names
    assert [row["name"] for row in found["steps"][1::2]] == names
    whole = step_flops(checkpoint.config, (24, 64), 10, 2)
    halves = [step_flops(checkpoint.config, (24, 64), tokens, 1).total for tokens in (10, 1)]
    for row in found["steps"]:
        if row["guidance"] == "one batch":
            assert row["flops"] == whole.to_json()
        else:
            assert row["guidance"] == "two passes"
            assert row["flops"]["total"] == sum(halves) < whole.total
        assert 0 < row["median_seconds"] <= row["p90_seconds"]
    assert found["steps"][0]["bytes"] == out.stat().st_size
    assert [row["name"] for row in found["phases"]] == ["packed a16", "float32"]
    parts = [row["memory"] for row in found["steps"]]
    for row in found["phases"]:
        assert set(row["seconds"]) == {"condition", "denoise", "decode"} == set(row["bytes"])
        assert 0 < row["queries"] <= 9**3
        parts += row["bytes"].values()
    assert all(part["predicted"] > 0 for part in parts)
    text = describe(found)
    assert "hunyuan3d-2+2 on cpu" in text
    assert "decode" in text
    assert json.loads(json.dumps(found)) == found


def test_phases_that_ended_are_kept_where_no_mesh_comes(made, monkeypatch):
    folder, out, _ = made

    def no_surface(self, grid):
        raise UserError("the shape grid is empty")

    monkeypatch.setattr(Pipeline, "surface", no_surface)
    found = bench(
        out, original=folder, device="cpu", repeats=1, cond_tokens=10, resolution=8,
        steps=3,
    )  # fmt: skip
    for row in found["phases"]:
        assert row["stopped"] == "the shape grid is empty"
        assert min(row["seconds"][p] for p in ("condition", "denoise", "decode")) > 0
    assert describe(found).endswith("float32: stopped: the shape grid is empty")


def test_a_packed_file_alone_says_what_is_missing(made):
    _, out, _ = made
    with pytest.raises(UserError, match="give its --original"):
        bench(out, device="cpu", repeats=1)


def test_an_original_belongs_to_its_packed_file(made, tmp_path):
    folder, out, _ = made
    other = tiny_released("trellis-ss", tmp_path)
    with pytest.raises(UserError, match="is not the original of"):
        bench(out, original=other, device="cpu")
    with pytest.raises(UserError, match="needs a packed file"):
        bench(folder, original=folder, device="cpu")


def test_command_line_on_an_original(made, capsys):
    folder, _, _ = made
    words = ["--repeats", "1", "--cond-tokens", "10", "--device", "cpu", "--no-pass"]
    cli.main(["bench", str(folder), *words, "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "predicted peak" in err  # before each part, on stderr
    assert found["phases"] == []
    assert [row["name"] for row in found["steps"][::2]] == ["bfloat16", "float32"]
    assert found["cond_tokens"] == 10


def test_structured_latents_by_their_blocks(tmp_path, monkeypatch):
    """Found in a folder, compressed, timed; what cannot be done with them is one plain line."""
    folder, out = tiny_released("trellis-slat", tmp_path / "slat"), tmp_path / "m.safetensors"
    checkpoint = open_checkpoint(folder)
    compress(checkpoint, resolve_plan("int8", checkpoint), out, steps=[3], embed=False)
    monkeypatch.setattr("vitapack.runtime.tools.bench.SLAT_TOKENS", 40)
    for original in (None, folder):
        found = bench(out, original=original, device="cpu", compute="a8", repeats=1, cond_tokens=10)
        assert found["latents"] == [40, 64]
        assert (
            found["steps"][0]["flops"]
            == guided_flops(checkpoint.config, (40, 64), 10, one_batch=False).to_json()
        )
        for row in found["phases"]:
            assert "only the transformer blocks are read" in row["skipped"]
    with pytest.raises(UserError, match="compressed and timed, but give no mesh"):
        Pipeline.from_packed(out, "cpu", parts=folder)
    with pytest.raises(UserError, match="compressed and timed, but give no mesh"):
        Pipeline.from_model(folder, "cpu")
