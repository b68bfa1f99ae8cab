"""`vitapack bench` on tiny models and on the bundled one."""

import json

import pytest
from tiny_released import tiny_released

from vitapack import cli
from vitapack.compressor.compress import compress
from vitapack.compressor.plan import resolve_plan
from vitapack.runtime.bench import bench, describe
from vitapack.runtime.errors import UserError
from vitapack.runtime.families import open_checkpoint
from vitapack.runtime.flops import step_flops
from vitapack.runtime.pipeline import Pipeline


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
    assert set(found["phases"]["seconds"]) == {"condition", "denoise", "decode"}
    for part in (*found["phases"]["bytes"].values(), *(row["memory"] for row in found["steps"])):
        assert part["predicted"] > 0
    assert 0 < found["phases"]["queries"] <= 9**3
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
        sampling_steps=3,
    )  # fmt: skip
    assert found["phases"]["stopped"] == "the shape grid is empty"
    assert min(found["phases"]["seconds"][p] for p in ("condition", "denoise", "decode")) > 0
    assert describe(found).endswith("stopped: the shape grid is empty")


def test_a_packed_file_alone_says_what_is_missing(made):
    _, out, _ = made
    with pytest.raises(UserError, match="give its --original"):
        bench(out, device="cpu", repeats=1)


def test_command_line_on_an_original(made, capsys):
    folder, _, _ = made
    words = ["--repeats", "1", "--cond-tokens", "10", "--device", "cpu", "--no-pass"]
    cli.main(["bench", str(folder), *words, "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "predicted peak" in err  # before each part, on stderr
    assert "skipped" in found["phases"]
    assert [row["name"] for row in found["steps"][::2]] == ["bfloat16", "float32"]
    assert found["cond_tokens"] == 10
