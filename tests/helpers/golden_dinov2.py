"""Outputs of transformers' DINOv2 classes at tiny sizes, for `tests/runtime/test_conditioner.py`.

`python tests/golden_dinov2.py` writes them anew (transformers 5.24.0 was used; 4.57.3 gives the
same outputs). `save_pretrained` gives the released names, which version 5 no longer uses inside.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
COMMON = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 70,
    "patch_size": 14, "mlp_ratio": 4,
}  # fmt: skip


def main() -> None:
    import transformers
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    for name, model in (
        ("dinov2_tiny", Dinov2Model(Dinov2Config(use_swiglu_ffn=True, **COMMON))),
        (
            "dinov2_registers_tiny",
            Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=4, **COMMON)),
        ),
    ):
        rng = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                spread = 0.5 if parameter.shape[-1] < 2 or parameter.ndim == 1 else 0.08
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * spread)
        model.eval()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            tensors = {
                f"weights/{key}": value
                for key, value in load_file(Path(folder) / "model.safetensors").items()
            }
            for size in (70, 98):
                image = torch.randn(2, 3, size, size, generator=rng)
                tensors[f"inputs/{size}"] = image
                tensors[f"output/{size}"] = model(image).last_hidden_state
        config = json.dumps({"transformers": transformers.__version__, **COMMON})
        save_file(tensors, GOLDEN / f"{name}.safetensors", metadata={"config": config})


if __name__ == "__main__":
    main()
