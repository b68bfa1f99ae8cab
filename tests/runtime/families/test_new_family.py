"""A family in one file and one entry of FAMILIES, as docs/adding.md describes it: this one.

A DiT of the double-single kind whose condition tokens are an image's mean colours and whose latents
are the radii and centres of balls. Nothing else in the project knows it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_model import tiny_config, tiny_dit
from torch import Tensor, nn

from vitapack.compressor.packing.compress import compress
from vitapack.runtime.condition.conditioner import Conditioner, Picture
from vitapack.runtime.decode.decoders import Decoder
from vitapack.runtime.decode.mesh import report
from vitapack.runtime.engines.choose import Execution
from vitapack.runtime.errors import UserError
from vitapack.runtime.families.checkpoint import Checkpoint, check_part, network_shapes, shapes_of
from vitapack.runtime.families.family import Family
from vitapack.runtime.families.open import FAMILIES, open_checkpoint
from vitapack.runtime.families.probe import PathProbe, read_json
from vitapack.runtime.format.layermap import LayerMap
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.loading.fill import fill
from vitapack.runtime.loading.lazy import Lazy
from vitapack.runtime.loading.source import Source
from vitapack.runtime.pipeline.pipeline import Pipeline
from vitapack.runtime.progress import Control
from vitapack.runtime.tools.bench import bench

CONFIG = tiny_config()
TOKENS, LATENTS = 4, (8, CONFIG.in_channels)


class Colours(Conditioner):
    """The mean colours of an image's quarters, (1, 4, 6): a linear of three channels."""

    def __init__(self, source: Source, execution: Execution) -> None:
        self.component = Lazy(
            lambda: fill(lambda: nn.Linear(3, CONFIG.cond_channels), source, execution), 84
        )

    @torch.inference_mode()
    def __call__(
        self, image: Picture, name: str = "image", control: Control | None = None
    ) -> Tensor:
        if isinstance(image, Mapping):
            raise UserError(f"{name}: one image, no views")
        pixels = np.asarray(image.convert("RGB").resize((2, 2)), np.float32) / 255
        layer = self.component()
        return layer(torch.from_numpy(pixels).reshape(1, TOKENS, 3).to(layer.weight)).float().cpu()


class Balls(Decoder):
    """The union of eight balls on a grid of 20 nodes per side."""

    bounds = 1.0
    latent_shape = LATENTS

    def __init__(self, source: Source) -> None:
        self.radius = float(source.read("radius"))

    def __call__(self, latents: Tensor, control: Control | None = None) -> np.ndarray:
        axis = np.linspace(-1, 1, 20)
        nodes = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
        centres = 0.4 * np.tanh(latents[0, :, :3].double().numpy())
        field = [self.radius - np.linalg.norm(nodes - centre, axis=-1) for centre in centres]
        return np.max(field, axis=0).astype(np.float32)


class Radius(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.radius = nn.Parameter(torch.tensor(0.5))


def read(probe: PathProbe) -> Checkpoint:
    check_part(probe.weights, "model", network_shapes(CONFIG), probe.path)
    check_part(probe.weights, "vae", shapes_of(Radius), probe.path)
    return Checkpoint(
        family="toy",
        variant="toy-1",
        path=probe.path,
        config=CONFIG,
        sampler=SamplerDefaults("euler", steps=3, guidance=2.0),
        latents=LATENTS,
        decoder=None,
        scale_factor=1.0,
        weights=probe.weights,
    )


def toy_json(probe: PathProbe) -> bool:
    file = probe.folder / "toy.json"
    return file.is_file() and read_json(file).get("class") == "Toy"


TOY = Family(
    name="toy",
    looks_for="toy.json of class Toy",
    recognises=toy_json,
    read=read,
    conditioner=lambda source, execution, bits: Colours(source, execution),
    shape_decoder=lambda source, execution: Balls(source),
    condition_tokens=lambda variant: TOKENS,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    place = tmp_path / "toy-model"
    place.mkdir()
    (place / "toy.json").write_text(json.dumps({"class": "Toy"}))
    tensors = {f"model.{name}": value for name, value in tiny_dit(CONFIG).state_dict().items()}
    linear = nn.Linear(3, CONFIG.cond_channels)
    tensors |= {f"conditioner.{name}": value for name, value in linear.state_dict().items()}
    tensors["vae.radius"] = torch.tensor(0.5)
    save_file(
        {name: value.detach() for name, value in tensors.items()}, place / "model.safetensors"
    )
    return place


def image() -> Image.Image:
    return Image.linear_gradient("L")


@pytest.mark.parametrize("memory", ["resident", "lean"])
def test_original_and_packed_file_give_meshes(folder: Path, memory: str, tmp_path: Path) -> None:
    original = Pipeline.open(folder, device="cpu", memory=memory)
    assert (original.family, original.variant) == ("toy", "toy-1")
    assert report(original(image(), seed=1)).watertight
    packed = tmp_path / "packed.safetensors"
    checkpoint = open_checkpoint(folder)
    compress(checkpoint, LayerMap.uniform("toy", {"double": 2, "single": 3}, 8), packed, embed=True)
    for compute in ("a16", "a8"):
        pipeline = Pipeline.open(packed, device="cpu", compute=compute, memory=memory)
        assert set(pipeline.predicted_bytes()) == {"condition", "denoise", "decode"}
        mesh = pipeline(image(), seed=1)
        assert report(mesh).watertight
        assert mesh.metadata["family"] == "toy"
        assert set(pipeline.bytes) == {"condition", "denoise", "decode"}


def test_other_tools_know_it(folder: Path) -> None:
    result = bench(folder, device="cpu", repeats=1)
    assert result["cond_tokens"] == TOKENS
    assert result["latents"] == list(LATENTS)
    assert result["phases"][0]["stopped"] is None
    assert result["phases"][0]["resolution"] is None


def test_options_that_it_lacks_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="shapes of toy have one grid only"):
        Pipeline.open(folder, device="cpu", resolution=32)
    with pytest.raises(UserError, match="view 'left': toy-1 takes one image, no views"):
        Pipeline.open(folder, device="cpu").check_views({"front": image(), "left": image()})


def test_a_packed_file_of_an_unknown_family_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "packed.safetensors"
    checkpoint = open_checkpoint(folder)
    compress(checkpoint, LayerMap.uniform("toy", {"double": 2, "single": 3}, 8), packed, embed=True)
    monkeypatch.delitem(FAMILIES, "toy")
    with pytest.raises(UserError, match="no family 'toy' here; known are step1x3d, trellis"):
        Pipeline.open(packed, device="cpu")
    with pytest.raises(UserError, match="no model that is known here"):
        open_checkpoint(folder)
