"""Pickled weights (.ckpt, .pt, .pth, .bin) through every family's reader: honest and hostile."""

import contextlib
import io
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from released_layouts import refused
from safetensors.torch import load_file
from tiny_released import tiny_released

from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.families.furniture import family as furniture
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.loading.checkpoint_files import open_weights

DIFFUSERS = "diffusion_pytorch_model"
PLACES = [
    ("furniture", "model.fp16", ".ckpt"),
    ("hunyuan3d-2mini", "model.fp16", ".ckpt"),
    ("step1x-3d-label", f"transformer/{DIFFUSERS}", ".ckpt"),
    ("step1x-3d-label", f"vae/{DIFFUSERS}", ".bin"),
    ("step1x-3d-label", f"visual_encoder/{DIFFUSERS}", ".bin"),
    ("step1x-3d-label", f"label_encoder/{DIFFUSERS}", ".pt"),
    ("trellis-ss", "ckpts/ss_flow_img_dit_L_16l8_fp16", ".ckpt"),
    ("trellis-ss", "ckpts/ss_dec_conv3d_16l8_fp16", ".pt"),
    ("trellis-ss", "dinov2_vitl14_reg4_pretrain", ".pth"),
    ("trellis-slat", "ckpts/slat_flow_img_dit_L_64l8p2_fp16", ".pt"),
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """originals(name) -> a folder in the released layout, made once."""
    made = {"furniture": furniture.FOLDER}

    def folder(name):
        if name not in made:
            made[name] = tiny_released(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture(params=PLACES, ids=lambda place: f"{place[0]} {place[1]}")
def pickled(request, originals, tmp_path):
    """A copy of a model's folder, and the file that its weights move to."""
    name, stem, suffix = request.param
    folder = tmp_path / "model"
    shutil.copytree(
        originals(name), folder, ignore=shutil.ignore_patterns("held-out") if stem else None
    )
    source = folder / f"{stem}.safetensors"
    tensors = load_file(source)
    source.unlink()
    return folder, folder / f"{stem}{suffix}", tensors


def test_the_same_tensors(pickled, originals, request):
    opened, file, tensors = pickled
    torch.save(tensors, file)
    name = request.node.callspec.params["pickled"][0]
    wanted = open_checkpoint(originals(name))
    found = open_checkpoint(opened)
    assert (found.variant, list(found.weights)) == (wanted.variant, list(wanted.weights))
    for tensor in list(wanted.weights)[:: max(1, len(wanted.weights.stored) // 10)]:
        assert torch.equal(found.weights.read(tensor), wanted.weights.read(tensor))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def test_a_pickle_bomb_does_not_go_off(pickled, tmp_path):
    opened, file, tensors = pickled
    fuse = tmp_path / "went off"
    content = {**tensors, "x": Bomb(fuse)}
    for blob, load in (
        (saved(content), lambda file: torch.load(file, weights_only=False)),
        (pickle.dumps(content, protocol=2), pickle.load),
    ):
        file.write_bytes(blob)
        line = refused(opened, FormatError)
        assert "refused" in line
        assert str(file) in line
        assert not fuse.exists()
        with file.open("rb") as stream:  # it does go off where pickles are believed
            load(stream)
        assert fuse.exists()
        fuse.unlink()


@pytest.fixture(scope="module")
def hostile():
    """What to write, and a part of the line that refuses it."""
    around = {}
    around["model"] = around
    laughs = {"a": torch.zeros(1)}
    for _ in range(64):
        laughs = {"a": laughs, "b": laughs}
    small = {"model": {"latent_in.weight": torch.zeros(64, 64)}}
    whole = saved(small)
    squeezed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(whole)) as held,
        zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for name in held.namelist():
            out.writestr(name, held.read(name))
    return [
        (saved(around), "nests its dicts endlessly"),
        (saved(laughs), "nests its dicts endlessly"),
        (saved({"model": {"x": torch.eye(3).to_sparse()}}), "tensor model.x is torch.sparse_coo"),
        (saved({"model": {"x": torch.empty(2, device="meta")}}), "on meta; expected plain numbers"),
        (saved({"model": [1, "text"]}), "holds no tensors"),
        (squeezed.getvalue(), "is a compressed zip"),
        (whole[: len(whole) // 2], "torch checkpoint"),
        (saved(small, _use_new_zipfile_serialization=False)[:900], "torch checkpoint"),
        (b"", "torch checkpoint"),
    ]


def test_hostile_contents(pickled, hostile):
    opened, file, _ = pickled
    for blob, message in hostile:
        file.write_bytes(blob)
        line = refused(opened)
        assert message in line
        assert str(file) in line


def test_damaged_values_name_their_own_file(pickled):
    opened, file, tensors = pickled
    name = next(n for n, t in tensors.items() if t.is_floating_point() and t.ndim > 1)
    tensors[name].view(-1)[0] = float("nan")
    torch.save(tensors, file)
    checkpoint = open_checkpoint(opened)
    with pytest.raises(FormatError, match="1 NaN or infinite") as caught:
        [checkpoint.weights.read(tensor) for tensor in checkpoint.weights]
    assert str(caught.value).startswith(f"{file}: tensor ")


@pytest.mark.parametrize("zipped", [True, False])
def test_any_changed_bytes_are_an_error_in_words(zipped, tmp_path):
    """Or they open, where they changed a number. Never another exception."""
    parts = {"model": {"a.weight": torch.randn(4, 8).half(), "n": 3}, "vae": {"x": torch.arange(6)}}
    whole = saved(parts, _use_new_zipfile_serialization=zipped)
    rng, refusals = random.Random(0), 0
    for _ in range(150):
        blob = bytearray(whole)
        for _ in range(rng.choice((1, 2, 4))):
            at = rng.randrange(min(len(blob), 1000))  # the pickle comes first
            if rng.random() < 0.7:
                blob[at] = rng.randrange(256)
            else:
                del blob[at : at + rng.randrange(1, 9)]
        file = tmp_path / "m.ckpt"
        file.write_bytes(blob)
        with contextlib.suppress(UserError):
            open_weights(file)
            continue
        refusals += 1
    assert refusals > 50
