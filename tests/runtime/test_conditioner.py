"""DINOv2 against transformers' outputs, and the pictures that it is shown."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_released import chair

from vitapack.runtime.conditioner import (
    ImageConditioner,
    encoder_part,
    framed_picture,
    hunyuan_picture,
    trellis_picture,
    view_embedding,
)
from vitapack.runtime.dinov2 import Dinov2Config, config_from_shapes, from_hub
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.parts import Source
from vitapack.runtime.weights import Stored, Weights

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
NAMES = ["dinov2_tiny", "dinov2_registers_tiny"]


def source(name, prefix=""):
    tensors = {
        prefix + key.removeprefix("weights/"): value
        for key, value in load_file(GOLDEN / f"{name}.safetensors").items()
        if key.startswith("weights/")
    }
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    return Source(name, {}, shapes, tensors.__getitem__)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", ["70", "98"])  # 98: places are interpolated
def test_reference_output(name, size, relative):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    encoder = encoder_part(source(name, "any.prefix."), torch.float32, "cpu", 16)()
    with torch.no_grad():
        found = encoder(tensors[f"inputs/{size}"])
    assert relative(found, tensors[f"output/{size}"]) <= 1e-5


def test_released_sizes():
    from vitapack.compressor.random_checkpoint import GIANT, LARGE, _dinov2, _hub

    assert config_from_shapes(_dinov2(GIANT), "x") == GIANT
    assert config_from_shapes(_dinov2(LARGE), "x") == LARGE
    giant, large = (sum(np.prod(s) for s in _dinov2(c).values()) for c in (GIANT, LARGE))
    assert giant == 1_136_480_768  # transformers' own count
    assert large == sum(np.prod(s) for s in _hub(LARGE).values())
    stored = {n: Stored(s, torch.float32, lambda: torch.empty(0)) for n, s in _hub(LARGE).items()}
    mapped = from_hub(Weights((), stored))
    assert {name: mapped.shape(name) for name in mapped} == _dinov2(LARGE)


@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_keep_the_features(name):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    part, packed = (encoder_part(source(name), torch.float32, "cpu", bits) for bits in (16, 8))
    with torch.no_grad():
        a, b = (p()(tensors["inputs/70"]) for p in (part, packed))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    assert cosine.min() > 0.999
    assert not torch.equal(a, b)
    for p in (part, packed):
        held = sum(t.nbytes for t in p().state_dict().values())
        assert p.nbytes == pytest.approx(held, rel=0.01)
    assert packed.nbytes < 0.4 * part.nbytes
    packed.free()
    assert not packed.loaded


def test_what_is_no_dinov2():
    whole = source(NAMES[0])
    with pytest.raises(FormatError, match=r"should be a DINOv2; found no embeddings\.cls_token"):
        encoder_part(Source("m", {}, {"x": (2,)}, whole.read), torch.float32, "cpu", 16)
    shapes = {n: s for n, s in whole.shapes.items() if "patch" not in n}
    with pytest.raises(FormatError, match=r"projection\.weight is missing"):
        encoder_part(Source("m", {}, shapes, whole.read), torch.float32, "cpu", 16)
    shapes = whole.shapes | {"embeddings.position_embeddings": (1, 8, 128)}
    with pytest.raises(FormatError, match="places form a square"):
        encoder_part(Source("m", {}, shapes, whole.read), torch.float32, "cpu", 16)
    name = "encoder.layer.1.norm1.bias"
    shapes = {n: s for n, s in whole.shapes.items() if n != name}
    part = encoder_part(Source("m", {}, shapes, whole.read), torch.float32, "cpu", 16)
    with pytest.raises(UserError, match=r"do not fit Dinov2: encoder\.layer\.1\.norm1\.bias"):
        part()


def box_of(pixels, ground):
    """Rows and columns of the object in a (3, H, W) picture."""
    object_ = (pixels - ground).abs().amax(0) > 0.02
    rows, columns = object_.any(1).nonzero(), object_.any(0).nonzero()
    return (rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1)


def test_hunyuan_s_picture():
    pixels = hunyuan_picture(128, 112, 0.15)(chair(), "chair")
    assert pixels.shape == (3, 112, 112)
    top, bottom, left, right = box_of(pixels, 1.0)
    assert bottom - top == pytest.approx(0.85 * 112, abs=3)  # the longer side
    assert (top + bottom) / 2 == pytest.approx(56, abs=1.5)
    assert (left + right) / 2 == pytest.approx(56, abs=1.5)
    assert pixels[:, 0, 0].tolist() == [1, 1, 1]
    middle = pixels[:, 40, 56] * 255
    assert torch.allclose(middle, torch.tensor([200.0, 80, 40]), atol=1)


def test_step1x_s_picture():
    pixels = framed_picture(518, 0.95)(chair(), "chair")
    top, bottom, _, _ = box_of(pixels, 1.0)
    assert bottom - top == pytest.approx(0.95 * 518, abs=8)
    assert pixels[:, 0, 0].tolist() == [1, 1, 1]


def test_trellis_picture():
    pixels = trellis_picture(518)(chair(), "chair")
    top, bottom, _, _ = box_of(pixels, 0.0)
    assert bottom - top == pytest.approx(518 / 1.2, abs=35)  # Lanczos rings
    assert pixels[:, 0, 0].tolist() == [0, 0, 0]
    assert pixels.shape == (3, 518, 518)


@pytest.mark.parametrize("prepare", [hunyuan_picture(64, 56, 0.15), framed_picture(56, 0.9)])
def test_translucent_pixels_blend_with_the_ground(prepare):
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 128))
    image.putpixel((0, 0), (0, 0, 0, 0))
    assert prepare(image, "x")[:, 28, 28].tolist() == pytest.approx([127 / 255] * 3, abs=0.01)
    with pytest.raises(UserError, match="no object in the picture"):
        prepare(Image.new("RGBA", (40, 40)), "x")


def test_views():
    encoder = encoder_part(source(NAMES[0]), torch.float32, "cpu", 16)
    several = ImageConditioner(encoder, hunyuan_picture(64, 70, 0.15), views=True)
    flipped = chair().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    both = several({"back": flipped, "front": chair()}, "two")
    assert both.shape == (1, 52, 128)
    one = ImageConditioner(encoder, hunyuan_picture(64, 70, 0.15))
    front, back = one(chair()), one(flipped)
    assert torch.allclose(both[:, :26], front + view_embedding(0, 128), atol=1e-6)
    assert torch.allclose(both[:, 26:], back + view_embedding(2, 128), atol=1e-6)
    assert view_embedding(0, 4).tolist() == [0, 0, 1, 1]
    assert view_embedding(3, 4).tolist() == pytest.approx(
        [np.sin(3), np.sin(0.03), np.cos(3), np.cos(0.03)], abs=1e-6
    )
    with pytest.raises(UserError, match="takes one picture, not 2 views"):
        one({"front": chair(), "back": flipped}, "two")
    with pytest.raises(UserError, match="no view 'top'"):
        several({"top": chair()}, "x")


def test_configuration_of_a_tiny_model_shows_in_its_shapes():
    assert config_from_shapes(source(NAMES[1]).shapes, "x") == Dinov2Config(
        128, 3, 2, 14, 5, 4, 512, swiglu=False
    )
