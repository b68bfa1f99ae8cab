"""Golden files of the reference networks, and checkpoints in the released layout made from them."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
DIT_KEYS = ("in_channels", "context_in_dim", "hidden_size", "mlp_ratio", "num_heads", "depth")
DIT_KEYS += ("depth_single_blocks", "axes_dim", "theta", "qkv_bias", "guidance_embed")


class Golden:
    """One reference network: constructor arguments, weights, inputs, output."""

    def __init__(self, name):
        path = GOLDEN / f"{name}.safetensors"
        with safe_open(path, "np") as file:
            self.config = json.loads(file.metadata()["config"])
        self.tensors = load_file(path)
        self.output = self.tensors.get("output")  # DINOv2 has one a picture size

    def under(self, prefix):
        return {
            key.removeprefix(prefix): value
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        }

    @property
    def weights(self):
        return self.under("weights/")

    @property
    def inputs(self):
        return self.under("inputs/")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """These networks are tiny; on two busy cores torch's second thread made tests 25x slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden():
    """golden(name) -> Golden"""
    return Golden


@pytest.fixture(scope="session")
def relative():
    """Relative L2 distance of two tensors."""
    return lambda ours, theirs: ((ours - theirs).norm() / theirs.norm()).item()


class Released:
    """Sections and tensors of a checkpoint in Hunyuan3D's released layout, to be spoilt at will."""

    def __init__(self, dit, vae):
        params = {key: value for key, value in vae.config.items() if key != "family"}
        self.config = {
            "model": {
                "target": "hy3dgen.shapegen.models.Hunyuan3DDiT",
                "params": {key: dit.config[key] for key in DIT_KEYS},
            },
            "vae": {"target": "hy3dgen.shapegen.models.ShapeVAE", "params": params},
            "conditioner": {
                "target": "hy3dgen.shapegen.models.SingleImageEncoder",
                "params": {
                    "main_image_encoder": {
                        "type": "DinoImageEncoder",
                        "kwargs": {"image_size": 518},
                    }
                },
            },
            "scheduler": {
                "target": "hy3dgen.shapegen.schedulers.FlowMatchEulerDiscreteScheduler",
                "params": {"num_train_timesteps": 1000},
            },
        }
        self.tensors = {f"model.{key}": value for key, value in dit.weights.items()}
        self.tensors |= {f"vae.{key}": value for key, value in vae.weights.items()}

    def save(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(self.config))
        save_file(self.tensors, folder / "model.fp16.safetensors")
        return folder


@pytest.fixture
def released():
    """released(dit=..., vae=...) -> Released; `.save(folder)` writes it."""

    def make(dit="hunyuan3ddit_tiny", vae="shapevae_tiny"):
        return Released(Golden(dit), Golden(vae))

    return make


@pytest.fixture
def default_bfloat16():
    """A context in which torch's default dtype is bfloat16, as a host program may have set it."""

    @contextmanager
    def default():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    return default
