"""In bf16 our networks lose at most twice what plain PyTorch loses there, on every golden file."""

import pytest
import torch
from plain_networks import (
    Plain,
    dinov2,
    hunyuan3d,
    shape_decoder,
    step1x3d,
    trellis_decoder,
    trellis_flow,
)
from released_layouts import Step1X, Trellis

from vitapack.runtime.condition.conditioner import encoder_part
from vitapack.runtime.engines.choose import Execution
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.loading.source import Source
from vitapack.runtime.pipeline.load import load_dit, load_shape_decoder

BF16 = torch.bfloat16


def inputs_in(golden, dtype):
    """The golden inputs in a dtype; times and guidance stay float32."""
    kept = ("t", "guidance")
    return {k: v if k in kept else v.to(dtype) for k, v in golden.inputs.items()}


def check(plain, ours, golden, output, inputs, relative):
    """`plain` is the golden network in float32; in bf16 ours errs at most twice as much."""
    with torch.no_grad():
        exact = plain(Plain(golden.weights, torch.float32), golden.config, **inputs(torch.float32))
        assert relative(exact, output) <= 1e-5
        rounded = plain(Plain(golden.weights, BF16), golden.config, **inputs(BF16))
        found = ours(inputs(BF16))
    assert rounded.dtype == found.dtype == BF16
    allowed = 2 * relative(rounded.float(), output)
    assert 0 < relative(found.float(), output) <= allowed


DITS = {
    "hunyuan3ddit_tiny": hunyuan3d, "hunyuan3ddit_tiny_guidance": hunyuan3d,
    "step1x3d_tiny": step1x3d, "trellis_ss_tiny": trellis_flow,
}  # fmt: skip


def folder_of(name, released, place):
    if name.startswith("step1x"):
        return Step1X().save(place)
    if name.startswith("trellis"):
        return Trellis().save(place)
    return released(**{"vae" if "vae" in name else "dit": name}).save(place)


@pytest.mark.parametrize("name", DITS)
def test_transformers(name, golden, released, relative, tmp_path):
    reference = golden(name)
    dit = load_dit(folder_of(name, released, tmp_path / "model"), dtype=BF16)
    check(
        DITS[name], lambda given: dit(**given), reference, reference.output,
        lambda dtype: inputs_in(reference, dtype), relative,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["shapevae_tiny", "shapevae_tiny_turbo", "step1x_vae_tiny"])
def test_shape_decoders(name, golden, released, relative, tmp_path):
    reference = golden(name)
    checkpoint = open_checkpoint(folder_of(name, released, tmp_path / "model"))
    decoder = load_shape_decoder(checkpoint, dtype=BF16)
    check(
        shape_decoder, lambda given: decoder(given["latents"], given["queries"]), reference,
        reference.output, lambda dtype: inputs_in(reference, dtype), relative,
    )  # fmt: skip


def test_occupancy_decoder(golden, relative, tmp_path):
    reference = golden("trellis_ss_decoder_tiny")
    checkpoint = open_checkpoint(Trellis().save(tmp_path / "model"))
    decoder = load_shape_decoder(checkpoint, dtype=BF16)
    check(
        trellis_decoder, lambda given: decoder(given["z"]), reference, reference.output,
        lambda dtype: inputs_in(reference, dtype), relative,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["dinov2_tiny", "dinov2_registers_tiny"])
def test_image_encoders(name, golden, relative):
    reference = golden(name)
    weights = reference.weights
    shapes = {tensor: tuple(value.shape) for tensor, value in weights.items()}
    part = encoder_part(Source(name, {}, shapes, weights.__getitem__), Execution("cpu", BF16), 16)
    check(
        dinov2, lambda given: part()(given["images"]).last_hidden_state, reference,
        reference.tensors["output/70"],
        lambda dtype: {"images": reference.tensors["inputs/70"].to(dtype)}, relative,
    )  # fmt: skip
