"""The image encoders' benchmark on tiny ones: what it reads, computes and says."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_released import tiny_released

from benchmarks.published import encoders


@pytest.mark.parametrize("name", ["hunyuan3d-2.0", "step1x-3d"])
def test_forms_of_one_encoder(name, tmp_path, capsys):
    folder = tiny_released(name, tmp_path / "model")
    features, figures = {}, {}
    for form in ("fp32", "int8"):
        out = tmp_path / f"{form}.safetensors"
        encoders.one(1, name, str(folder), form, "1", str(out))
        features[form] = load_file(out)
        figures[form] = json.loads(capsys.readouterr().out)
    assert figures["int8"]["predicted"] < figures["fp32"]["predicted"]
    assert figures["fp32"]["transformers"]
    found = encoders.compared(features["int8"], features["fp32"])
    assert found["tokens"] == next(iter(features["fp32"].values())).shape[1]
    assert 0.99 < found["cosine_min"] < found["cosine_mean"] < 1
    assert 0 < found["relative_error"] < 0.1
    assert encoders.compared(features["fp32"], features["fp32"])["relative_error"] == 0


def test_compared():
    plain = {"a": torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])}
    turned = {"a": torch.tensor([[[0.0, 1.0], [0.0, 2.0]]])}
    found = encoders.compared(turned, plain)
    assert found["tokens"] == 2
    assert found["cosine_mean"] == pytest.approx(0.5)
    assert found["cosine_min"] == pytest.approx(0)
    assert found["relative_error"] == pytest.approx((2 / 5) ** 0.5)
