"""Tiny checkpoints in the layouts of Step1X-3D and TRELLIS from the golden files, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitapack.runtime.errors import UserError
from vitapack.runtime.families.open import open_checkpoint

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def golden_config(name: str) -> dict[str, Any]:
    with safe_open(GOLDEN / f"{name}.safetensors", "np") as file:
        return {k: v for k, v in json.loads(file.metadata()["config"]).items() if k != "family"}


def golden_tensors(name: str, prefix: str = "weights/") -> dict[str, Tensor]:
    found = load_file(GOLDEN / f"{name}.safetensors")
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


def refused(path: Path, kind: type[UserError] = UserError) -> str:
    """The one line with which a path is refused."""
    with pytest.raises(kind) as caught:
        open_checkpoint(path)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 700
    return line


class Step1X:
    """A Step1X-3D folder to be spoilt at will before `save` writes it."""

    def __init__(self) -> None:
        self.index: dict[str, Any] = {"_class_name": "Step1X3DGeometryPipeline"}
        config = golden_config("step1x3d_tiny")
        self.transformer = {"_class_name": "FluxDenoiser", "_diffusers_version": "0.32.0", **config}
        self.vae = {"_class_name": "MichelangeloAutoencoder", **golden_config("step1x_vae_tiny")}
        self.tensors = golden_tensors("step1x3d_tiny")
        self.vae_tensors = golden_tensors("step1x_vae_tiny")
        self.scheduler = {"num_train_timesteps": 1000, "shift": 1.0}

    def save(self, folder: Path) -> Path:
        for name, config, tensors in (
            ("transformer", self.transformer, self.tensors),
            ("vae", self.vae, self.vae_tensors),
        ):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "config.json").write_text(json.dumps(config))
            save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors")
        (folder / "scheduler").mkdir(exist_ok=True)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(self.scheduler))
        (folder / "model_index.json").write_text(json.dumps(self.index))
        return folder


class Trellis:
    """A TRELLIS folder: pipeline.json and two models below ckpts/."""

    FLOW, DECODER = "ckpts/ss_flow_img_dit", "ckpts/ss_dec_conv3d"

    def __init__(self) -> None:
        self.flow = {"name": "SparseStructureFlowModel", "args": golden_config("trellis_ss_tiny")}
        args = golden_config("trellis_ss_decoder_tiny")
        self.decoder = {"name": "SparseStructureDecoder", "args": args}
        self.tensors = golden_tensors("trellis_ss_tiny")
        self.decoder_tensors = golden_tensors("trellis_ss_decoder_tiny")
        self.pipeline: dict[str, Any] = {
            "name": "TrellisImageTo3DPipeline",
            "args": {
                "models": {
                    "sparse_structure_flow_model": self.FLOW,
                    "sparse_structure_decoder": self.DECODER,
                },
                "sparse_structure_sampler": {
                    "name": "FlowEulerGuidanceIntervalSampler",
                    "args": {"sigma_min": 1e-5},
                    "params": {
                        "steps": 25,
                        "cfg_strength": 5.0,
                        "cfg_interval": [0.5, 1.0],
                        "rescale_t": 3.0,
                    },
                },
                "image_cond_model": "dinov2_vitl14_reg",
            },
        }

    def save(self, folder: Path) -> Path:
        (folder / "ckpts").mkdir(parents=True, exist_ok=True)
        for stem, config, tensors in (
            (self.FLOW, self.flow, self.tensors),
            (self.DECODER, self.decoder, self.decoder_tensors),
        ):
            (folder / f"{stem}.json").write_text(json.dumps(config))
            save_file(tensors, folder / f"{stem}.safetensors")
        (folder / "pipeline.json").write_text(json.dumps(self.pipeline))
        return folder
