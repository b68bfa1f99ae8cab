"""Picture to mesh on the bundled model, original and packed."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitapack.compressor.evaluate.metrics import grid_iou
from vitapack.compressor.packing.compress import compress
from vitapack.runtime.decode.mesh import read_metadata, report, save
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.families.furniture.family import held_out
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.format.container import lay_out, read_container, write_container
from vitapack.runtime.format.layermap import LayerMap
from vitapack.runtime.pipeline.pipeline import Pipeline

PICTURES = list(held_out("unseen-views"))[:3]


@pytest.fixture(scope="module")
def original() -> Pipeline:
    return Pipeline.from_model("furniture", device="cpu")


@pytest.fixture(scope="module")
def packed_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "int8.safetensors"
    checkpoint = open_checkpoint("furniture")
    compress(checkpoint, LayerMap.uniform("furniture", {"double": 8, "single": 16}, 8), path)
    return path


@pytest.fixture(scope="module")
def packed(packed_path: Path) -> Pipeline:
    return Pipeline.from_packed(packed_path, device="cpu")


def picture(number: int) -> Image.Image:
    return Image.open(PICTURES[number].image_path)


def grid(pipeline: Pipeline, number: int, **settings: object) -> np.ndarray:
    cond = pipeline.condition(picture(number))
    return pipeline.grid(pipeline.latents(cond, pipeline.noise(number), **settings))


def test_int8_packed_draws_the_same_shapes(original: Pipeline, packed: Pipeline) -> None:
    scores = [grid_iou(grid(original, n), grid(packed, n)) for n in range(3)]
    assert np.mean(scores) > 0.95, scores


def test_same_seed_same_mesh_whatever_came_before(packed: Pipeline) -> None:
    alone = packed(picture(1), seed=5)
    packed(picture(0), seed=9)
    again = packed(picture(1), seed=5)
    np.testing.assert_array_equal(alone.vertices, again.vertices)
    np.testing.assert_array_equal(alone.faces, again.faces)
    other = packed(picture(1), seed=6)
    assert other.vertices.shape != alone.vertices.shape or not np.array_equal(
        other.vertices, alone.vertices
    )


def test_a_mesh_says_how_it_was_made(packed: Pipeline, packed_path: Path, tmp_path: Path) -> None:
    mesh = packed(picture(0), seed=3)
    assert report(mesh).watertight
    path = save(mesh, tmp_path / "a.glb")
    found = read_metadata(path)
    assert found["seed"] == 3
    assert found["steps"] == 20
    assert found["sha256"] == packed.source_sha256
    assert len(found["sha256"]) == 64


def test_steps_without_a_table_are_refused_with_what_there_is(packed: Pipeline) -> None:
    with pytest.raises(UserError, match="20 steps") as caught:
        packed(picture(0), steps=7)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_an_original_runs_at_any_step_count(original: Pipeline, sampler: str) -> None:
    found = grid(original, 0, steps=6, sampler=sampler)
    assert np.isfinite(found).all()
    assert found.shape == (66, 66, 66)


def test_a_pruned_network_stands_in(original: Pipeline) -> None:
    network = original.dit.without(("single", 15))
    assert not np.array_equal(grid(original, 0, dit=network), grid(original, 0))


def test_unknown_device_and_missing_gpu() -> None:
    with pytest.raises(UserError, match="no device 'tpux'"):
        Pipeline.from_model("furniture", device="tpux")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA GPU"):
            Pipeline.from_model("furniture", device="cuda")


def test_a_tampered_packed_file_is_refused(packed_path: Path, tmp_path: Path) -> None:
    data = bytearray(packed_path.read_bytes())
    data[-1000] ^= 0xFF
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match="sha256") as caught:
        Pipeline.from_packed(tmp_path / "bad.safetensors", device="cpu")
    assert "bad.safetensors" in str(caught.value)


def test_a_truncated_packed_file_is_refused(packed_path: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(packed_path.read_bytes()[:200_000])
    with pytest.raises(FormatError, match=r"cut\.safetensors"):
        Pipeline.open(tmp_path / "cut.safetensors", device="cpu")


def test_it_goes_to_another_process(original: Pipeline) -> None:
    """The vitality analysis sends the pipeline to its workers."""
    there = pickle.loads(pickle.dumps(original))
    cond = there.condition(picture(0))
    assert there.predicted_bytes() == original.predicted_bytes()
    here = original.latents(cond, original.noise(0), steps=1)
    assert torch.equal(there.latents(cond, there.noise(0), steps=1), here)


@pytest.mark.parametrize("compute", ["a16", "a8"])
def test_torch_s_default_dtype_changes_nothing(compute, packed_path, default_bfloat16) -> None:
    image = PICTURES[0].image_path
    expected = Pipeline.from_packed(packed_path, "cpu", compute)(image, seed=1, steps=2)
    with default_bfloat16():
        found = Pipeline.from_packed(packed_path, "cpu", compute)(image, seed=1, steps=2)
    np.testing.assert_array_equal(found.vertices, expected.vertices)


def test_an_original_takes_nothing_of_a_packed_file(tmp_path) -> None:
    with pytest.raises(UserError, match="furniture is not packed, so it cannot compute in a8"):
        Pipeline.open("furniture", device="cpu", compute="a8")
    with pytest.raises(UserError, match="has its own components: leave --parts out"):
        Pipeline.open("furniture", device="cpu", parts=tmp_path)


VAE_TENSOR = "vae.blocks.0.attn.kv.bias"


@pytest.mark.parametrize(
    ("setting", "tensors", "message"),
    [
        (("shape_decoder", "width", 10**6), {}, "tensors do not fit FurnitureDecoder"),
        (("shape_decoder", "layers", 10**6), {}, "layers is 1000000; expected at most 1000"),
        (("conditioner", "width", 10**6), {}, "tensors do not fit FurnitureEncoder"),
        (("conditioner", "heads", 7), {}, "width 192 is not a multiple of heads 7"),
        (None, {VAE_TENSOR: None}, "do not fit FurnitureDecoder: blocks.0.attn.kv.bias"),
        (None, {VAE_TENSOR: ("F16", (3,))}, "do not fit FurnitureDecoder"),
        (None, {"vae.extra": ("F16", (3,))}, "do not fit FurnitureDecoder: extra"),
        (None, {VAE_TENSOR: ("U64", (384,))}, "is stored as U64, a dtype of no packed file"),
    ],
)
def test_embedded_parts_that_lie(setting, tensors, message, packed_path, tmp_path) -> None:
    """A width of a million would ask for 4 TB."""
    held = read_container(packed_path)
    data = json.loads(held.metadata["vitapack"])
    if setting is not None:
        part, name, value = setting
        data[part]["config"][name] = value
    specs = {name: (info.dtype, info.shape) for name, info in held.tensors.items()} | tensors
    layout = lay_out({n: s for n, s in specs.items() if s}, {"vitapack": json.dumps(data)})
    raw = packed_path.read_bytes()[held.data_start :]

    def content(name: str) -> bytes:
        if name in tensors:
            return bytes(layout.tensors[name].nbytes)
        return raw[held.tensors[name].start : held.tensors[name].end]

    path = tmp_path / "hostile.safetensors"
    write_container(path, layout, ((name, content(name)) for name in layout.tensors))
    with pytest.raises(UserError, match=message) as caught:
        Pipeline.from_packed(path, "cpu")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
