"""The command line as a person meets it: results, one-line complaints, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitapack.cli import build_parser, main
from vitapack.runtime.families.furniture.family import FOLDER, held_out

ROOT = Path(__file__).parent.parent
PICTURE = next(held_out("unseen-views")).image_path


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr of a command that fails with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 2, captured.err
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    return lines[0]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "model.safetensors"
    main(["compress", "furniture", "--plan", "int8", "-o", str(path), "--quiet", "--steps", "4,5"])
    return path


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    actions = build_parser()._subparsers._group_actions[0]
    assert {"demo", "analyze", "plan", "compress", "generate", "evaluate", "inspect", "doctor"} <= (
        set(actions.choices)
    )
    for name in actions.choices:
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        assert caught.value.code == 0
        assert f"example: vitapack {name}" in " ".join(capsys.readouterr().out.split())


def test_a_folder_of_pictures_is_one_call(packed: Path, tmp_path: Path, capsys) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b"):
        (photos / f"{name}.png").write_bytes(PICTURE.read_bytes())
    out = tmp_path / "out"
    call = ["generate", packed, photos, "-o", out, "--steps", "4", "--json", "--quiet"]
    main([str(word) for word in call])
    written = json.loads(capsys.readouterr().out)["written"]
    assert [Path(row["file"]).name for row in written] == ["a.glb", "b.glb"]
    assert (out / "a.glb").read_bytes() == (out / "b.glb").read_bytes()
    main([str(word) for word in ["evaluate", out, out, "--json", "--quiet"]])
    assert json.loads(capsys.readouterr().out)["summary"]["v_iou"]["mean"] == 1.0


def test_one_bad_picture_costs_only_its_own_mesh(packed: Path, tmp_path: Path, capsys) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "good.png").write_bytes(PICTURE.read_bytes())
    Image.new("RGBA", (64, 64)).save(photos / "bad.png")
    with pytest.raises(SystemExit) as caught:
        main(["generate", str(packed), str(photos), "-o", str(tmp_path), "--steps", "4", "--quiet"])
    assert caught.value.code == 2
    assert (tmp_path / "good.glb").exists()
    assert "no object" in capsys.readouterr().err


def test_inspect_needs_no_torch(packed: Path) -> None:
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch':\n"
        "            raise ImportError('torch is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        f"from vitapack.cli import main; main(['inspect', {str(packed)!r}])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "furniture" in out.stdout


def test_doctor_says_what_is_lacking(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["C++ module"].startswith(("built", "missing: pip install"))
    assert "MB" in found["bundled model"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["generate", "nowhere.safetensors", PICTURE, "-o", "x"], "nowhere.safetensors"),
        (["generate", "furniture", "nowhere.png", "-o", "x"], "nowhere.png: no such file"),
        (["generate", "furniture", PICTURE, "-o", "x", "--steps", "0"], "at least 1"),
        (["generate", "furniture", PICTURE, "-o", "x", "--colour", "red"], "--colour"),
        (["generate", "furniture", PICTURE, "-o", "x", "--format", "abc"], "abc"),
        (["compress", "furniture", "--plan", "int5", "-o", "x"], "int5"),
        (["compress", "furniture", "--plan", "int8", "-o", "x", "--steps", "a"], "steps"),
        (
            ["finetune", "furniture", "no.safetensors", "--images", PICTURE, "-o", "x"],
            "no such file",
        ),
        (["finetune", "furniture", "x", "--images", "nowhere", "-o", "x"], "nowhere: no such file"),
        (["inspect", ROOT / "README.md"], "README.md"),
        (["analyze", "furniture", "--images", "nowhere", "-o", "v.json"], "nowhere"),
        (["plan", "nowhere.json", "-o", "p.json"], "nowhere.json"),
        (["plan", "v.json", "-o", "p.json", "--target-size", "small"], "small"),
        (["evaluate", "nowhere", "elsewhere"], "nowhere"),
        *[
            (["generate", "furniture", PICTURE, "-o", "x", *words], expected)
            for words, expected in (
                (["--seed", "-1"], "--seed: '-1': expected a whole number, 0 to 2^63 - 1"),
                (["--seed", str(2**70)], "expected a whole number, 0 to 2^63 - 1"),
                (["--seed", "0" * 20 + str(2**70)], "expected a whole number, 0 to 2^63 - 1"),
                (["--steps", "many"], "'many': expected a whole number of at least 1"),
                (["--steps", "9" * 5000], "expected a whole number of at least 1"),
                (["--device", "meta"], "no device 'meta': expected auto, cpu, cuda or cuda:N"),
                (["--device", "cpu:0"], "no device 'cpu:0': expected auto, cpu, cuda or cuda:N"),
            )
        ],
        *[
            (["plan", "v.json", "-o", "p.json", "--target-size", size], "such as 450MB")
            for size in ("infMB", "1e400MB", "nanMB", "450XB", "MB", "450")
        ],
        (["polish"], "polish"),
        ([], "COMMAND"),
    ],
)
def test_mistakes_are_one_plain_line(words, expected, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = complaint(capsys, *words)
    assert line.startswith("vitapack: ")
    assert expected in line
    assert list(tmp_path.iterdir()) == []


def test_nan_weights_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(FOLDER / "model.fp16.safetensors")
    name = "model.double_blocks.3.img_mlp.0.weight"
    tensors[name].flat[7] = np.nan
    save_file(tensors, tmp_path / "model.fp16.safetensors")
    (tmp_path / "config.yaml").write_bytes((FOLDER / "config.yaml").read_bytes())
    line = complaint(
        capsys,
        "compress",
        tmp_path,
        "--plan",
        "int8",
        "-o",
        tmp_path / "out.safetensors",
        "--quiet",
    )
    assert "double_blocks.3.img_mlp.0.weight" in line
    assert not (tmp_path / "out.safetensors").exists()


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: the kernel refuses the write the same way."""
    code = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "from vitapack.cli import main\n"
        "main(['compress', 'furniture', '--plan', 'int8', '-o', "
        f"{str(tmp_path / 'big.safetensors')!r}, '--quiet'])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 2, out.stderr
    assert len(out.stderr.strip().splitlines()) == 1, out.stderr
    assert not (tmp_path / "big.safetensors").exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_is_one_line_and_exit_code_130(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "vitapack", "analyze", "furniture", "--images", PICTURE.parent,
         "-o", tmp_path / "v.json", "--quiet"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
        # A shell's background jobs ignore SIGINT, and their children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    journal = tmp_path / "v.journal.jsonl"
    deadline = time.monotonic() + 120
    while not journal.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()  # one that ignores it would go on for the hour of its analysis
    assert process.returncode == 130, err
    assert err.strip().splitlines() == [
        "vitapack: interrupted; nothing half-written has a final name; run it again (analyze with "
        "--resume) to go on"
    ]
    assert not (tmp_path / "v.json").exists()


def test_a_place_that_cannot_be_written_is_said_before_the_work(
    packed, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("vitapack.runtime.pipeline.pipeline.Pipeline.__call__", None)  # never asked
    (tmp_path / "file").touch()
    line = complaint(capsys, "generate", packed, PICTURE, "-o", tmp_path / "file", "--quiet")
    assert "cannot write" in line
