"""Encoder weights that are brought to 8 bits as they are read."""

import numpy as np
import pytest
import torch

from vitapack.compressor.packing.compress import compress
from vitapack.kernels.linear import cpu
from vitapack.kernels.linear.layouts import W8
from vitapack.runtime import Pipeline
from vitapack.runtime.engines.choose import PLAIN, Execution
from vitapack.runtime.errors import FormatError
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.format.container import content_digest
from vitapack.runtime.format.header import read_header
from vitapack.runtime.format.layermap import LayerMap
from vitapack.runtime.format.reader import verify
from vitapack.runtime.loading.fill import fill, in_8_bits
from vitapack.runtime.loading.packed import load_packed_dit
from vitapack.runtime.loading.source import Source


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (700, 96), (513, 130)])
def test_the_engine_makes_the_same_codes(dtype, shape, monkeypatch):
    rng = torch.Generator().manual_seed(shape[1])
    weight = torch.randn(shape, generator=rng).to(dtype)
    weight[-1] = 0
    codes, scale = in_8_bits(weight)
    assert scale.shape == shape[:1]
    assert (codes.float() * scale[:, None] - weight.float()).abs().max() <= scale.max() / 2 * 1.001
    monkeypatch.setattr(cpu, "available", lambda: False)
    plain = in_8_bits(weight)
    assert torch.equal(codes, plain[0])
    assert torch.equal(scale, plain[1])


@pytest.fixture(scope="module")
def packed_furniture(tmp_path_factory):
    """The bundled model with everything inside, and its bytes."""
    path = tmp_path_factory.mktemp("fill") / "model.safetensors"
    checkpoint = open_checkpoint("furniture")
    counts = {kind: len(kept) for kind, kept in checkpoint.config.blocks_by_kind().items()}
    compress(checkpoint, LayerMap.uniform("furniture", counts, 8), path, embed=True)
    return read_header(path), path.read_bytes()


def damaged(packed, folder, name, value):
    """The file with the first value of a tensor replaced, its digest made right again."""
    header, raw = packed
    info, raw = header.tensors[name], bytearray(raw)
    start = header.data_start + info.start
    dtype = {"F16": np.float16, "F32": np.float32}[info.dtype]
    item = np.array(value, dtype).tobytes()
    raw[start : start + len(item)] = item
    path = folder / "damaged.safetensors"
    path.write_bytes(raw)
    stated, actual = content_digest(path)
    path.write_bytes(raw.replace(stated.encode(), actual.encode()))
    assert verify(path) == actual
    return path


@pytest.mark.parametrize(
    ("ending", "value", "words"),
    [
        ("norm.bias", np.nan, "holds NaN or infinite values"),
        ("up8.weight", np.inf, "holds NaN or infinite values"),
    ],
)
@pytest.mark.parametrize("component", ["vae", "conditioner"])
def test_damaged_components_are_named(packed_furniture, tmp_path, component, ending, value, words):
    names = [n for n in packed_furniture[0].tensors if n.startswith(f"{component}.")]
    name = next((n for n in names if n.endswith(ending)), names[0])
    path = damaged(packed_furniture, tmp_path, name, value)
    with pytest.raises(FormatError) as caught:
        Pipeline.from_packed(path, device="cpu").load()
    assert str(caught.value) == f"{path}: tensor {name!r} {words}"


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_scales_that_are_not_above_0_are_named(packed_furniture, tmp_path, value):
    name = next(n for n in packed_furniture[0].tensors if n.endswith(".weight.scale"))
    path = damaged(packed_furniture, tmp_path, name, value)
    with pytest.raises(FormatError, match=f"{name}.*scales are above 0"):
        load_packed_dit(path)


def test_values_too_large_for_the_dtype_are_named():
    source = Source("w", {}, {"weight": (1, 2)}, lambda name: torch.tensor([[1.0, 1e5]]))
    narrow = Execution("cpu", torch.float16)
    with pytest.raises(FormatError, match="w: tensor 'weight' reaches 1e\\+05, too large"):
        fill(lambda: torch.nn.Linear(2, 1, bias=False), source, narrow)


def test_sources_by_other_names_keep_their_layouts():
    weights = {"a.weight.q8": torch.ones(2, 3, dtype=torch.int8), "a.weight.scale": torch.ones(2)}
    shapes = {name: tuple(value.shape) for name, value in weights.items()} | {"b": (1,)}
    source = Source("w", {}, shapes, weights.__getitem__, {"a": W8})
    moved = source.renamed({"c.weight.q8": "a.weight.q8", "c.weight.scale": "a.weight.scale"})
    assert moved.layouts == {"c": W8}
    assert moved.unpacked_shapes() == {"c.weight": (2, 3)}
    linear = fill(
        lambda: torch.nn.ModuleDict({"c": torch.nn.Linear(3, 2, bias=False)}), moved, PLAIN
    )
    assert torch.equal(linear["c"](torch.ones(1, 3)), torch.full((1, 2), 3.0))
