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
from command_line import complaint

from vitapack.cli import COMMANDS, build_parser, main
from vitapack.runtime.families.furniture.family import FOLDER, held_out

ROOT = Path(__file__).parent.parent
PICTURE = next(held_out("unseen-views")).image_path


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


def test_every_file_of_commands_is_one() -> None:
    files = {path.stem for path in (ROOT / "vitapack" / "commands").glob("*.py")}
    names = {command.__name__.rpartition(".")[2] for command in COMMANDS}
    assert files - {"__init__"} == names


def test_help_and_inspect_need_no_torch(packed: Path) -> None:
    code = (
        "import contextlib, sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch':\n"
        "            raise ImportError('torch is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        "from vitapack.cli import COMMANDS, main\n"
        "for words in ([], *([c.__name__.split('.')[-1].replace('_', '-')] for c in COMMANDS)):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([*words, '--help'])\n"
        f"main(['inspect', {str(packed)!r}])"
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
        "vitapack: interrupted; no incomplete file has its final name; run it again (analyze and "
        "generate with --resume) to continue"
    ]
    assert not (tmp_path / "v.json").exists()
