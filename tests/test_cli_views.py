"""`vitapack generate` with several views of one object."""

import json

import pytest
from tiny_released import chair, tiny_released

from vitapack import cli
from vitapack.runtime.condition.conditioner import VIEWS
from vitapack.runtime.decode.mesh import report
from vitapack.runtime.errors import UserError
from vitapack.runtime.pipeline.pipeline import Pipeline

FAST = ["--steps", "2", "--resolution", "16", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    for name in ("hunyuan3d-2mv", "step1x-3d"):
        tiny_released(name, folder / name)
    picture = chair()
    for number, view in enumerate(VIEWS):
        picture.rotate(90 * number, expand=True).save(folder / f"{view}.png")
    return folder


def complaint(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(map(str, words)))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_views_are_one_mesh_as_from_python(made, tmp_path, capsys):
    assert cli.VIEWS == VIEWS
    words = ["--front", made / "front.png", "--back", made / "back.png", "--seed", "3"]
    model = made / "hunyuan3d-2mv"
    cli.main(["generate", str(model), *map(str, words), "-o", str(tmp_path), *FAST, "--json"])
    (row,) = json.loads(capsys.readouterr().out)["written"]
    assert (tmp_path / "front.glb").exists()
    pipeline = Pipeline.from_model(model, device="cpu")
    pipeline.decoder.resolution = 16
    views = {view: cli.read_images([made / f"{view}.png"])[0][1] for view in ("front", "back")}
    both = pipeline(views, seed=3, steps=2)
    assert row["mesh"]["faces"] == report(both).faces
    assert row["mesh"]["volume"] == pytest.approx(report(both).volume)
    front = pipeline(views["front"], seed=3, steps=2)
    assert report(front).volume != pytest.approx(report(both).volume)


def test_wrong_combinations_are_one_line(made, tmp_path, capsys):
    front, left, model = made / "front.png", made / "left.png", made / "hunyuan3d-2mv"
    out = ["-o", tmp_path / "out", *FAST]
    for words, expected in (
        ([front, "--left", left], "one or the other"),
        (["--front", front, "--left", front], "the same picture for two views"),
        (["--front", made], "expected one picture"),
        (["--front", made / "none.png"], "no such file"),
        ([], "no picture"),
    ):
        assert expected in complaint(capsys, "generate", model, *words, *out)
    line = complaint(capsys, "generate", made / "step1x-3d", "--left", left, *out)
    assert "takes one picture, no views" in line
    assert not (tmp_path / "out").exists()


def test_from_python(made):
    single = Pipeline.from_model(made / "step1x-3d", device="cpu")
    with pytest.raises(UserError, match="takes one picture"):
        single({"front": chair(), "right": chair()})
    several = Pipeline.from_model(made / "hunyuan3d-2mv", device="cpu")
    with pytest.raises(UserError, match="view 'top'"):
        several({"front": chair(), "top": chair()})
    with pytest.raises(UserError, match="no picture"):
        several({})
