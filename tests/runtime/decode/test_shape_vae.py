"""The ShapeVAE decoder against the reference classes, read through the real loading path."""

from dataclasses import replace

import pytest
import torch

from vitapack.runtime.decode.grid import dense
from vitapack.runtime.decode.shape_vae import ShapeDecoder, ShapeDecoderConfig, fourier
from vitapack.runtime.engines.choose import PLAIN
from vitapack.runtime.errors import FormatError
from vitapack.runtime.families.checkpoint import shapes_of
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.loading.fill import fill
from vitapack.runtime.loading.source import Source
from vitapack.runtime.pipeline.load import load_shape_decoder

HUNYUAN = ["shapevae_tiny", "shapevae_tiny_turbo"]


@pytest.mark.parametrize("name", HUNYUAN)
def test_reference_output(name, golden, released, relative, tmp_path):
    reference = golden(name)
    decoder = load_shape_decoder(open_checkpoint(released(vae=name).save(tmp_path / "model")))
    latents, queries = reference.inputs["latents"], reference.inputs["queries"]
    with torch.no_grad():
        assert relative(decoder.tokens(latents), reference.tensors["decoded_latents"]) <= 1e-5
        assert relative(decoder(latents, queries), reference.output) <= 1e-5
    # One shape by itself, keys and values made once.
    logits = decoder.field(latents[:1])(queries[0])
    assert relative(logits, reference.output[0, :, 0]) <= 1e-5


def test_reference_grid(golden, released, relative, tmp_path):
    reference = golden("shapevae_tiny_turbo")
    made = released(vae="shapevae_tiny_turbo").save(tmp_path / "model")
    decoder = load_shape_decoder(open_checkpoint(made))
    field = decoder.field(reference.inputs["latents"])
    grid = dense(field, 6, decoder.config.bounds, chunk=50)
    assert relative(grid.values, reference.tensors["grid_logits_r6_bounds1.01"][0]) <= 1e-5
    assert grid.queries == 343


def test_step1x_variant(golden, relative, tmp_path):
    """The same graph with other epsilons, no qk-norm, and a decoder under another name."""
    reference = golden("step1x_vae_tiny")
    given = reference.config
    config = ShapeDecoderConfig(
        latents=given["num_latents"],
        channels=given["embed_dim"],
        width=given["width"],
        heads=given["heads"],
        layers=given["num_decoder_layers"],
        num_freqs=given["num_freqs"],
        include_pi=given["include_pi"],
        qkv_bias=given["qkv_bias"],
        qk_norm=given["qk_norm"],
        scale_factor=given["z_scale_factor"],
        geo_name="decoder",
        eps=1e-5,
        bounds=1.05,
    )
    shapes = {name: tuple(value.shape) for name, value in reference.weights.items()}
    source = Source("reference", {}, shapes, reference.weights.__getitem__)
    decoder = fill(lambda: ShapeDecoder(config), source, PLAIN)
    with torch.no_grad():
        out = decoder(reference.inputs["latents"], reference.inputs["queries"])
        assert relative(out, reference.output) <= 1e-5
        other = fill(lambda: ShapeDecoder(replace(config, eps=1e-3)), source, PLAIN)
        assert relative(other(**rename(reference.inputs)), reference.output) > 1e-5


def rename(inputs):
    return {"latents": inputs["latents"], "points": inputs["queries"]}


def test_released_sizes_are_the_published_ones():
    """214,212,865 parameters: what is left of v2-0's file beside DiT and DINOv2."""
    config = ShapeDecoderConfig(3072, 64, 1024, 16, 16, 8, False, False, True, 1.0)
    shapes = shapes_of(lambda: ShapeDecoder(config))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 214_212_865


def test_points_pi_and_frequencies():
    config = ShapeDecoderConfig(1, 1, 64, 1, 1, 2, True, False, True, 1.0)
    features = fourier(torch.tensor([[0.5, 0.25, -1.0]]), config)[0]
    angles = torch.tensor([0.5, 1.0, 0.25, 0.5, -1.0, -2.0]) * torch.pi
    expected = torch.cat([torch.tensor([0.5, 0.25, -1.0]), angles.sin(), angles.cos()])
    assert torch.allclose(features, expected, atol=1e-6)


def test_turbo_weights_in_a_plain_configuration_are_refused(golden, released, tmp_path):
    made = released(vae="shapevae_tiny_turbo")
    del made.config["vae"]["params"]["geo_decoder_ln_post"]
    with pytest.raises(FormatError, match=r"missing: vae\.geo_decoder\.cross_attn_decoder"):
        open_checkpoint(made.save(tmp_path / "model"))
