"""The bundled model: its parts, its held-out sets, its attribution."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from vitapack.runtime.condition.images import load_image
from vitapack.runtime.errors import FormatError
from vitapack.runtime.families.furniture.family import FOLDER, held_out, preprocess
from vitapack.runtime.families.furniture.networks import (
    FurnitureDecoder,
    FurnitureVAEConfig,
    anchors,
)
from vitapack.runtime.families.open import open_checkpoint


def test_topology_and_size() -> None:
    checkpoint = open_checkpoint("furniture")
    assert checkpoint.family == "furniture"
    assert len(checkpoint.config.double_blocks) == 8
    assert len(checkpoint.config.single_blocks) == 16
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) <= 40e6


def test_every_latent_token_has_its_own_place() -> None:
    places = anchors()
    assert len(torch.unique(places, dim=0)) == 64
    assert abs(float(places.std()) - 1) < 0.01


def test_cells_of_the_decoder_lie_where_their_token_does() -> None:
    """x slowest, both in the lattice of tokens and in the grid: an impulse in one token moves the
    logits around its own cell most."""
    torch.manual_seed(0)
    decoder = FurnitureDecoder(replace(FurnitureVAEConfig(), layers=0)).eval()
    still = torch.zeros(1, 64, 16)
    token = 3 * 16 + 1 * 4 + 2  # x 3, y 1, z 2 of 4
    moved = still.clone()
    moved[0, token] = 5.0
    with torch.no_grad():
        change = (decoder(moved) - decoder(still)).abs()[0]
    centre = [float((change.sum([a for a in range(3) if a != axis]) * torch.arange(64)).sum()
                    / change.sum()) for axis in range(3)]  # fmt: skip
    np.testing.assert_allclose(centre, [55.5, 23.5, 39.5], atol=8)


def test_held_out_sets_are_disjoint_and_labelled() -> None:
    seen: dict[str, set[str]] = {}
    for which in ("unseen-views", "validation-shapes", "test-shapes"):
        items = list(held_out(which))
        assert items
        seen[which] = {item.label["id"] for item in items}
        for item in items[:3]:
            assert item.solid.any()
            assert not item.solid.all()
            assert 0 < item.label["autoencoder_iou"] <= 1
            assert preprocess(load_image(item.image_path)).shape == (1, 112, 112)
    assert not seen["unseen-views"] & (seen["validation-shapes"] | seen["test-shapes"])
    assert not seen["validation-shapes"] & seen["test-shapes"]


def test_every_shape_is_attributed() -> None:
    lines = (FOLDER / "ATTRIBUTION.tsv").read_text().splitlines()
    assert lines[0].split("\t")[:5] == ["id", "name", "creator", "library", "licence"]
    rows = [line.split("\t") for line in lines[1:]]
    assert all(len(row) == 6 and all(row[:5]) for row in rows)
    ids = {row[0] for row in rows}
    for which in ("unseen-views", "validation-shapes", "test-shapes"):
        assert {item.label["id"] for item in held_out(which)} <= ids


def test_a_network_of_other_channels_is_refused(tmp_path: Path) -> None:
    config = yaml.safe_load((FOLDER / "config.yaml").read_text())
    config["model"]["params"]["in_channels"] = 16
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "model.fp16.safetensors").symlink_to(FOLDER / "model.fp16.safetensors")
    with pytest.raises(FormatError, match="in_channels is 16"):
        open_checkpoint(tmp_path)
