"""DINOv2 against transformers' outputs, and the pictures that it is shown."""

import pickle
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_released import chair

from vitapack.runtime.condition.conditioner import ImageConditioner, encoder_part, view_embedding
from vitapack.runtime.condition.dinov2 import (
    MASK,
    Dinov2Config,
    as_installed,
    config_from_shapes,
    config_of,
    from_hub,
    in_parts,
    is_packable,
    released_shapes,
)
from vitapack.runtime.condition.recipes import hunyuan_framing, step1x_framing, trellis_framing
from vitapack.runtime.engines.choose import choose
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.loading.checkpoint_files import StoredTensor, Weights
from vitapack.runtime.loading.source import Source

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
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
    encoder = encoder_part(source(name, "any.prefix."), choose("cpu"), 16)()
    with torch.no_grad():
        found = encoder(tensors[f"inputs/{size}"]).last_hidden_state
    assert relative(found, tensors[f"output/{size}"]) <= 1e-5


def test_released_sizes():
    from vitapack.compressor.tools.random_checkpoint import GIANT, LARGE, _dinov2, _hub

    assert config_of(_dinov2(GIANT), GIANT.settings(), "x") == GIANT
    assert config_of(_dinov2(LARGE), {}, "x") == LARGE
    giant, large = (sum(np.prod(s) for s in _dinov2(c).values()) for c in (GIANT, LARGE))
    assert giant == 1_136_480_768  # transformers' own count
    assert large == sum(np.prod(s) for s in _hub(LARGE).values())
    stored = {
        n: StoredTensor(s, torch.float32, lambda: torch.empty(0)) for n, s in _hub(LARGE).items()
    }
    mapped = from_hub(Weights((), stored))
    assert {name: mapped.shape(name) for name in mapped} == _dinov2(LARGE)


@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_keep_the_features(name):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    part, packed = (encoder_part(source(name), choose("cpu"), bits) for bits in (16, 8))
    with torch.no_grad():
        a, b = (p()(tensors["inputs/70"]).last_hidden_state for p in (part, packed))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    assert cosine.min() > 0.999
    assert not torch.equal(a, b)
    for p in (part, packed):
        held = sum(t.nbytes for t in p().state_dict().values())
        assert p.nbytes == pytest.approx(held, rel=0.01)
    assert packed.nbytes < 0.4 * part.nbytes
    with torch.no_grad():  # as a worker process gets it
        again = pickle.loads(pickle.dumps(packed))()(tensors["inputs/70"]).last_hidden_state
    assert torch.equal(again, b)
    packed.free()
    assert not packed.loaded


@pytest.mark.parametrize("name", NAMES)
def test_names_are_the_released_ones(name):
    """The golden file's are what transformers saves, whatever it calls them inside."""
    whole = source(name)
    config = config_of(whole.shapes, {}, "x")
    assert {**released_shapes(config), MASK: (1, config.hidden)} == whole.shapes
    linears = [n for n, shape in whole.shapes.items() if is_packable(f"any.prefix.{n}", shape)]
    assert len(linears) == 6 * config.layers
    assert not [n for n in linears if "norm" in n or "layer_scale" in n]


def test_both_namings_of_transformers():
    """Version 4 keeps the released names; 5 has others, and a gated MLP's input as two."""
    start = "encoder.layer.3."
    tensors = {
        f"{start}mlp.weights_in.weight.q8": torch.arange(12).view(6, 2).to(torch.int8),
        f"{start}mlp.weights_in.weight.scale": torch.arange(6.0),
        f"{start}mlp.weights_in.bias": torch.arange(6.0),
        f"{start}attention.attention.query.weight": torch.eye(2),
        f"{start}norm1.weight": torch.ones(2),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    stored = Source("x", {}, shapes, tensors.__getitem__)
    old = as_installed(stored, {f"{start}mlp.weights_in.weight"})
    assert old.shapes == shapes
    wanted = {f"{start}{n}.weight" for n in ("mlp.gate_proj", "mlp.up_proj", "attention.q_proj")}
    new = as_installed(stored, wanted)
    assert new.shapes == {
        f"{start}mlp.gate_proj.weight.q8": (3, 2), f"{start}mlp.up_proj.weight.q8": (3, 2),
        f"{start}mlp.gate_proj.weight.scale": (3,), f"{start}mlp.up_proj.weight.scale": (3,),
        f"{start}mlp.gate_proj.bias": (3,), f"{start}mlp.up_proj.bias": (3,),
        f"{start}attention.q_proj.weight": (2, 2), f"{start}norm1.weight": (2,),
    }  # fmt: skip
    assert new.read(f"{start}mlp.up_proj.weight.q8").tolist() == [[6, 7], [8, 9], [10, 11]]
    assert new.read(f"{start}mlp.gate_proj.bias").tolist() == [0, 1, 2]
    assert new.read(f"{start}norm1.weight").tolist() == [1, 1]


def test_a_tensor_taken_apart_is_read_once():
    """The gated MLPs' inputs of a DINOv2 giant are 1 GB in fp16, which was read twice."""
    whole, counts = source("dinov2_tiny"), Counter()

    def read(name):
        counts[name] += 1
        return whole.read(name)

    for bits in (16, 8):
        counts.clear()
        encoder_part(Source("x", {}, whole.shapes, read), choose("cpu"), bits)()
        assert set(counts) == set(whole.shapes) - {MASK}
        assert set(counts.values()) == {1}
    rows = torch.arange(6).view(6, 1)
    readers = in_parts(lambda: counts.update(["rows"]) or rows, 3)
    for _ in range(2):  # in any order, and from the start again
        assert [readers[i]().tolist() for i in (1, 0, 2)] == [[[2], [3]], [[0], [1]], [[4], [5]]]
    assert counts["rows"] == 2
    assert readers[0]().untyped_storage().nbytes() == rows[:2].nbytes  # not a view of the whole


def test_the_checkpoint_s_own_settings():
    shapes = source(NAMES[0]).shapes
    config = config_from_shapes(shapes, "x")
    own = config.settings() | {"num_attention_heads": 4, "layer_norm_eps": "1e-05"}  # YAML's way
    found = config_of(shapes, own | {"model_type": "dinov2", "torch_dtype": "float32"}, "x")
    assert (found.heads, found.eps) == (4, 1e-5)
    for changed, message in (
        ({"hidden_size": 256}, "hidden_size is 256 in its configuration; its tensors and this"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"use_swiglu_ffn": False}, "use_swiglu_ffn is False"),
        ({"num_attention_heads": 3}, "num_attention_heads is 3; expected a divisor of its 128"),
        ({"num_attention_heads": "2"}, "num_attention_heads is '2'"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'; expected a number near 1e-6"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None"),
    ):
        with pytest.raises(FormatError, match=re.escape(message)):
            config_of(shapes, config.settings() | changed, "x")
    # What it makes of them: heads and eps reach the network.
    part = encoder_part(source(NAMES[0]), choose("cpu"), 16, own)
    network = part()
    assert network.encoder.layer[0].norm1.eps == network.layernorm.eps == 1e-5
    assert network.config.num_attention_heads == 4


def test_no_network_access(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    encoder = encoder_part(source(NAMES[1]), choose("cpu"), 8)
    assert ImageConditioner(encoder, hunyuan_framing(64, 70, 0.15))(chair()).shape == (1, 26, 128)


def test_without_transformers(monkeypatch):
    part = encoder_part(source(NAMES[0]), choose("cpu"), 16)  # opens without it
    assert part.nbytes > 0
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"not installed; .* pip install 'vitapack\[dinov2\]'"):
        part()
    monkeypatch.setitem(sys.modules, "transformers", type(sys)("transformers"))  # one without them
    with pytest.raises(UserError, match=r"does not work \(cannot import name 'Dinov2Config'"):
        part()


def test_transformers_is_imported_for_a_dinov2_only():
    code = (
        "import sys\n"
        "from PIL import Image\n"
        "from vitapack.compressor.packing import compress\n"
        "from vitapack.compressor.tools import random_checkpoint\n"
        "from vitapack.runtime import Pipeline\n"
        "pipeline = Pipeline.from_model('furniture', device='cpu')\n"
        "image = Image.new('RGBA', (64, 64))\n"
        "image.paste((90, 60, 30, 255), (16, 16, 48, 48))\n"
        "assert pipeline.condition(image).shape[0] == 1\n"
        "print('transformers' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "False"


def test_what_is_no_dinov2():
    whole = source(NAMES[0])
    with pytest.raises(FormatError, match=r"should be a DINOv2; found no embeddings\.cls_token"):
        encoder_part(Source("m", {}, {"x": (2,)}, whole.read), choose("cpu"), 16)
    shapes = {n: s for n, s in whole.shapes.items() if "patch" not in n}
    with pytest.raises(FormatError, match=r"projection\.weight is missing"):
        encoder_part(Source("m", {}, shapes, whole.read), choose("cpu"), 16)
    shapes = whole.shapes | {"embeddings.position_embeddings": (1, 8, 128)}
    with pytest.raises(FormatError, match="places form a square"):
        encoder_part(Source("m", {}, shapes, whole.read), choose("cpu"), 16)
    name = "encoder.layer.1.norm1.bias"
    shapes = {n: s for n, s in whole.shapes.items() if n != name}
    with pytest.raises(FormatError, match=r"a DINOv2 of its size: encoder\.layer\.1\.norm1\.bias"):
        encoder_part(Source("m", {}, shapes, whole.read), choose("cpu"), 16)
    shapes = whole.shapes | {"encoder.layer.0.mlp.weights_out.weight": (128, 300)}
    with pytest.raises(FormatError, match="128 channels with 300 in its MLP is no DINOv2"):
        encoder_part(Source("m", {}, shapes, whole.read), choose("cpu"), 16)


def box_of(pixels, ground):
    """Rows and columns of the object in a (3, H, W) picture."""
    object_ = (pixels - ground).abs().amax(0) > 0.02
    rows, columns = object_.any(1).nonzero(), object_.any(0).nonzero()
    return (rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1)


def test_hunyuan_s_picture():
    pixels = hunyuan_framing(128, 112, 0.15)(chair(), "chair")
    assert pixels.shape == (3, 112, 112)
    top, bottom, left, right = box_of(pixels, 1.0)
    assert bottom - top == pytest.approx(0.85 * 112, abs=3)  # the longer side
    assert (top + bottom) / 2 == pytest.approx(56, abs=1.5)
    assert (left + right) / 2 == pytest.approx(56, abs=1.5)
    assert pixels[:, 0, 0].tolist() == [1, 1, 1]
    middle = pixels[:, 40, 56] * 255
    assert torch.allclose(middle, torch.tensor([200.0, 80, 40]), atol=1)


def test_step1x_s_picture():
    pixels = step1x_framing(518, 0.95)(chair(), "chair")
    top, bottom, _, _ = box_of(pixels, 1.0)
    assert bottom - top == pytest.approx(0.95 * 518, abs=8)
    assert pixels[:, 0, 0].tolist() == [1, 1, 1]


def test_trellis_picture():
    pixels = trellis_framing(518)(chair(), "chair")
    top, bottom, _, _ = box_of(pixels, 0.0)
    assert bottom - top == pytest.approx(518 / 1.2, abs=35)  # Lanczos rings
    assert pixels[:, 0, 0].tolist() == [0, 0, 0]
    assert pixels.shape == (3, 518, 518)


@pytest.mark.parametrize("prepare", [hunyuan_framing(64, 56, 0.15), step1x_framing(56, 0.9)])
def test_translucent_pixels_blend_with_the_ground(prepare):
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 128))
    image.putpixel((0, 0), (0, 0, 0, 0))
    assert prepare(image, "x")[:, 28, 28].tolist() == pytest.approx([127 / 255] * 3, abs=0.01)
    with pytest.raises(UserError, match="no object in the image"):
        prepare(Image.new("RGBA", (40, 40)), "x")


def test_views():
    encoder = encoder_part(source(NAMES[0]), choose("cpu"), 16)
    several = ImageConditioner(encoder, hunyuan_framing(64, 70, 0.15), views=True)
    flipped = chair().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    both = several({"back": flipped, "front": chair()}, "two")
    assert both.shape == (1, 52, 128)
    one = ImageConditioner(encoder, hunyuan_framing(64, 70, 0.15))
    front, back = one(chair()), one(flipped)
    assert torch.allclose(both[:, :26], front + view_embedding(0, 128), atol=1e-6)
    assert torch.allclose(both[:, 26:], back + view_embedding(2, 128), atol=1e-6)
    assert view_embedding(0, 4).tolist() == [0, 0, 1, 1]
    assert view_embedding(3, 4).tolist() == pytest.approx(
        [np.sin(3), np.sin(0.03), np.cos(3), np.cos(0.03)], abs=1e-6
    )
    with pytest.raises(UserError, match="takes one image, not 2 views"):
        one({"front": chair(), "back": flipped}, "two")
    with pytest.raises(UserError, match="no view 'top'"):
        several({"top": chair()}, "x")


def test_configuration_of_a_tiny_model_shows_in_its_shapes():
    assert config_from_shapes(source(NAMES[1]).shapes, "x") == Dinov2Config(
        128, 3, 2, 14, 5, 4, 4, swiglu=False
    )
