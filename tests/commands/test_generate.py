"""`vitapack generate`: folders of images, several views of one object."""

import json
from pathlib import Path

import pytest
from command_line import complaint, run
from PIL import Image
from tiny_released import chair, tiny_released

from vitapack.runtime.choices import VIEWS
from vitapack.runtime.condition.images import load_image
from vitapack.runtime.decode.mesh import report
from vitapack.runtime.errors import UserError
from vitapack.runtime.families.furniture.family import held_out
from vitapack.runtime.pipeline.pipeline import Pipeline

PICTURE = next(held_out("unseen-views")).image_path
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


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    run("compress", "furniture", "--plan", "int8", "-o", path, "--quiet", "--steps", "4")
    return path


def test_a_folder_of_pictures_is_one_call(packed: Path, tmp_path: Path, capsys) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b"):
        (photos / f"{name}.png").write_bytes(PICTURE.read_bytes())
    out = tmp_path / "out"
    run("generate", packed, photos, "-o", out, "--steps", "4", "--json", "--quiet")
    written = json.loads(capsys.readouterr().out)["written"]
    assert [Path(row["file"]).name for row in written] == ["a.glb", "b.glb"]
    assert (out / "a.glb").read_bytes() == (out / "b.glb").read_bytes()
    run("evaluate", out, out, "--json", "--quiet")
    assert json.loads(capsys.readouterr().out)["summary"]["v_iou"]["mean"] == 1.0


def test_one_bad_picture_costs_only_its_own_mesh(packed: Path, tmp_path: Path, capsys) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "good.png").write_bytes(PICTURE.read_bytes())
    Image.new("RGBA", (64, 64)).save(photos / "bad.png")
    with pytest.raises(SystemExit) as caught:
        run("generate", packed, photos, "-o", tmp_path, "--steps", "4", "--quiet")
    assert caught.value.code == 2
    assert (tmp_path / "good.glb").exists()
    assert "no object" in capsys.readouterr().err


def test_an_interrupted_folder_is_resumed(packed: Path, tmp_path: Path, capsys) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("a", "b"):
        (photos / f"{name}.png").write_bytes(PICTURE.read_bytes())
    words = ["-o", out, "--steps", "4", "--quiet"]
    run("generate", packed, photos / "a.png", *words, "--json")
    assert "kept" not in json.loads(capsys.readouterr().out)
    before = (out / "a.glb").stat().st_mtime_ns
    run("generate", packed, photos, *words, "--resume", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["kept"] == [str(out / "a.glb")]
    assert [row["file"] for row in found["written"]] == [str(out / "b.glb")]
    assert (out / "a.glb").stat().st_mtime_ns == before
    run("generate", packed, photos, *words, "--resume")
    assert capsys.readouterr().out == f"{out / 'a.glb'}  kept\n{out / 'b.glb'}  kept\n"
    run("generate", packed, photos, *words, "--resume", "--json", "--seed", "1")
    assert len(json.loads(capsys.readouterr().out)["written"]) == 2
    line = complaint(capsys, "generate", packed, photos, *words, "--resume", "--format", "stl")
    assert "--resume: an STL file cannot hold the settings" in line


def test_a_place_that_cannot_be_written_is_said_before_the_work(
    packed, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("vitapack.runtime.pipeline.pipeline.Pipeline.generate", None)  # never asked
    (tmp_path / "file").touch()
    line = complaint(capsys, "generate", packed, PICTURE, "-o", tmp_path / "file", "--quiet")
    assert "cannot write" in line


def test_views_are_one_mesh_as_from_python(made, tmp_path, capsys):
    words = ["--front", made / "front.png", "--back", made / "back.png", "--seed", "3"]
    model = made / "hunyuan3d-2mv"
    run("generate", model, *words, "-o", tmp_path, *FAST, "--json")
    (row,) = json.loads(capsys.readouterr().out)["written"]
    assert (tmp_path / "front.glb").exists()
    pipeline = Pipeline.from_model(model, device="cpu")
    pipeline.decoder.resolution = 16
    views = {view: load_image(made / f"{view}.png") for view in ("front", "back")}
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
        (["--front", front, "--left", front], "the same image for two views"),
        (["--front", made], "expected one image"),
        (["--front", made / "none.png"], "no such file"),
        ([], "no image: name images"),
    ):
        assert expected in complaint(capsys, "generate", model, *words, *out)
    line = complaint(capsys, "generate", made / "step1x-3d", "--left", left, *out)
    assert "takes one image, no views" in line
    assert not (tmp_path / "out").exists()


def test_from_python(made):
    single = Pipeline.from_model(made / "step1x-3d", device="cpu")
    with pytest.raises(UserError, match="takes one image"):
        single({"front": chair(), "right": chair()})
    several = Pipeline.from_model(made / "hunyuan3d-2mv", device="cpu")
    with pytest.raises(UserError, match="view 'top'"):
        several({"front": chair(), "top": chair()})
    with pytest.raises(UserError, match="no image was given"):
        several({})
