"""Step1X-3D: reference outputs through the real loading path, and folders that are wrong."""

import json
from dataclasses import replace

import pytest
import torch
from released_layouts import Step1X, refused

from vitapack.compressor.packing.compress import compress
from vitapack.compressor.planning.files import resolve_plan
from vitapack.compressor.planning.paper import plan_paper
from vitapack.runtime.engines import gpu_dit as dit_gpu
from vitapack.runtime.engines.choose import Execution, network_of
from vitapack.runtime.errors import FormatError
from vitapack.runtime.families.checkpoint import network_shapes
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.families.step1x3d import (
    LABEL_TABLES,
    dit_config,
    label_tokens,
    released_shapes,
)
from vitapack.runtime.format.schedules import SamplerDefaults, evaluation_times
from vitapack.runtime.loading.packed import load_packed_dit
from vitapack.runtime.loading.source import Source
from vitapack.runtime.networks.modulation import StepModulation
from vitapack.runtime.pipeline.load import load_dit, load_shape_decoder

RELEASED = {"input_channels": 64, "width": 1280, "layers": 12, "num_single_layers": 24}


def test_reference_output(golden, relative, tmp_path):
    reference = golden("step1x3d_tiny")
    folder = Step1X().save(tmp_path / "model")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for path in (folder, folder / "transformer", file):
        dit = load_dit(path)
        with torch.no_grad():
            assert relative(dit(**reference.inputs), reference.output) <= 1e-5


def test_keys_without_their_class_prefix(golden, relative, tmp_path):
    made = Step1X()
    made.tensors = {k.removeprefix("dit_model."): v for k, v in made.tensors.items()}
    made.vae_tensors = {f"shape_model.{k}": v for k, v in made.vae_tensors.items()}
    folder = made.save(tmp_path / "model")
    reference = golden("step1x3d_tiny")
    with torch.no_grad():
        assert relative(load_dit(folder)(**reference.inputs), reference.output) <= 1e-5
    load_shape_decoder(open_checkpoint(folder))


def test_reference_decoder(golden, relative, tmp_path):
    reference = golden("step1x_vae_tiny")
    made = Step1X()
    made.vae_tensors |= {"encoder.x": torch.zeros(2), "pre_kl.weight": torch.zeros(2)}
    checkpoint = open_checkpoint(made.save(tmp_path / "model"))
    assert set(checkpoint.ignored) == {"vae.encoder.x", "vae.pre_kl.weight"}
    decoder = load_shape_decoder(checkpoint)
    latents, queries = reference.inputs["latents"], reference.inputs["queries"]
    with torch.no_grad():
        assert relative(decoder.tokens(latents), reference.tensors["decoded_latents"]) <= 1e-5
        assert relative(decoder(latents, queries), reference.output) <= 1e-5
    assert decoder.config.bounds == 1.05


def test_what_a_checkpoint_says(tmp_path):
    made = Step1X()
    made.vae["volume_decoder_type"] = "hierarchical"
    checkpoint = open_checkpoint(made.save(tmp_path / "model"))
    assert checkpoint.family == "step1x3d"
    assert checkpoint.variant == "step1x-3d-2+3"
    assert checkpoint.latents == (16, 8)
    defaults = SamplerDefaults("euler", 30, 7.5, flow="step1x", zero_init=True)
    assert checkpoint.sampler == defaults
    assert len(evaluation_times(defaults)) == 29  # the first is multiplied by zero
    assert len(checkpoint.unknown) == 1
    assert "volume_decoder_type = 'hierarchical'" in checkpoint.unknown[0]
    assert checkpoint.part_config("shape_decoder")["width"] == 64
    made.transformer["use_label_condition"] = True
    assert open_checkpoint(made.save(tmp_path / "l")).variant == "step1x-3d-2+3-label"


def test_released_size():
    config = dit_config(RELEASED, "test", [])
    shapes = network_shapes(config)
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert count == 1_316_287_808
    assert sum(torch.Size(s).numel() for s in released_shapes(config).values()) == count
    assert len(plan_paper("step1x-3d").blocks) == 14


@pytest.mark.parametrize("modulation", ["table", "int8"])
def test_compressed_it_is_the_same_network(modulation, golden, relative, tmp_path):
    """8 bits on 64 channels cost 1 %; a wrong row order or swap would cost all."""
    checkpoint = open_checkpoint(Step1X().save(tmp_path / "model"))
    out = tmp_path / "m.safetensors"
    compress(checkpoint, resolve_plan("int8", checkpoint), out, modulation=modulation, steps=[4])
    packed, original = load_packed_dit(out), load_dit(tmp_path / "model")
    inputs = golden("step1x3d_tiny").inputs
    t = evaluation_times(SamplerDefaults("euler", 4, 1.0, flow="step1x", zero_init=True))[0]
    when = torch.tensor([t], dtype=torch.float64)
    with torch.no_grad():
        found = packed(inputs["x"], when, inputs["cond"])
        wanted = original(inputs["x"], when, inputs["cond"])
    assert relative(found, wanted) < 0.02


def test_tensors_that_do_not_fit(tmp_path):
    made = Step1X()
    moved = made.tensors.pop("dit_model.transformer_blocks.1.attn.to_k.weight")
    made.tensors["dit_model.transformer_blocks.1.attn.to_kk.weight"] = moved
    made.tensors["dit_model.proj_in.weight"] = torch.zeros(64, 9)
    line = refused(made.save(tmp_path / "a"))
    assert "missing: transformer.transformer_blocks.1.attn.to_k.weight" in line
    assert "unexpected: transformer.transformer_blocks.1.attn.to_kk.weight" in line
    assert "of another shape: transformer.proj_in.weight [64, 9], expected [64, 8]" in line
    made = Step1X()
    del made.vae_tensors["decoder.ln_post.bias"]
    assert "missing: vae.decoder.ln_post.bias" in refused(made.save(tmp_path / "b"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_values_are_named(value, tmp_path):
    made = Step1X()
    made.tensors["dit_model.transformer_blocks.0.attn.to_v.weight"][3, 5] = value
    folder = made.save(tmp_path / "model")
    with pytest.raises(FormatError, match=r"transformer/diffusion.*holds 1 NaN or infinite"):
        load_dit(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, 10_000, -1])
@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_truncated_weights(keep, part, tmp_path):
    file = Step1X().save(tmp_path / "model") / part / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert str(file) in refused(tmp_path / "model")


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("transformer", "width", "wide", "width is 'wide'"),
        ("transformer", "num_heads", 5, "not a multiple of heads 5"),
        ("transformer", "layers", 10**5, "expected at most 1000"),
        ("transformer", "visual_condition_dim", 32, "project their condition first"),
        ("vae", "heads", 7, "that the heads divide"),
        ("vae", "z_scale_factor", 0.0, "z_scale_factor is 0.0"),
        ("scheduler", "num_train_timesteps", 500, "must be 1000"),
        ("scheduler", "use_dynamic_shifting", True, "dynamic shifting"),
    ],
)
def test_configurations_that_cannot_be(part, key, value, message, tmp_path):
    made = Step1X()
    getattr(made, part)[key] = value
    assert message in refused(made.save(tmp_path / "model"))


def test_other_places(tmp_path):
    folder = Step1X().save(tmp_path / "model")
    (folder / "transformer" / "config.json").write_text("{not json")
    assert "is not JSON" in refused(folder)
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "Unet"}))
    assert "class FluxDenoiser (Step1X-3D)" in refused(folder)
    (folder / "transformer" / "config.json").write_text(json.dumps([]))
    assert "expected an object of settings" in refused(folder)
    folder = Step1X().save(tmp_path / "bare")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert "holds no weights" in refused(folder)


@pytest.mark.parametrize("prefix", ["", "label_condition."])
def test_label_tables(prefix):
    rows = {name: torch.full((3, 4), 1.0 + i) for i, name in enumerate(LABEL_TABLES)}
    tensors = {prefix + name: value for name, value in rows.items()}

    def source(changed=()):
        held = {**tensors, **dict(changed)}
        held = {name: value for name, value in held.items() if value is not None}
        return Source("m", {}, {n: tuple(v.shape) for n, v in held.items()}, held.__getitem__)

    assert label_tokens(source())[0].tolist() == [[1.0] * 4, [2.0] * 4, [3.0] * 4]
    one = prefix + LABEL_TABLES[1]
    with pytest.raises(FormatError, match=r"the table embedding_table_symmetry_type\.") as caught:
        label_tokens(source({one: None, "symmetry.weight": torch.zeros(2, 4)}))
    assert f"it holds {prefix}embedding_table_geometry_quality.weight" in str(caught.value)
    assert "symmetry.weight" in str(caught.value)
    with pytest.raises(FormatError, match="once, and has it 2 times"):
        label_tokens(source({f"ema.{LABEL_TABLES[0]}": torch.zeros(3, 4)}))
    with pytest.raises(FormatError, match=r"have \[4, 5, 4\] columns"):
        label_tokens(source({one: torch.zeros(2, 5)}))


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # whose order of arithmetic, not where it runs
def test_streams_stay_inside_fp16(device, tmp_path):
    """As the reference clips them there: one overflowing channel must not become NaN everywhere."""
    step1x = load_dit(Step1X().save(tmp_path / "model"), dtype=torch.float16)
    time = replace(step1x.config.time, activation="silu")
    for config, expected in (
        (step1x.config, [65504.0, -65504.0]),
        (replace(step1x.config, time=time), [float("inf"), float("-inf")]),  # not Hunyuan3D
    ):
        network = network_of(
            config, Execution(device, torch.float16, path="triton" if device == "cuda" else "plain")
        )
        network.load_state_dict(step1x.state_dict())
        network.half().eval().requires_grad_(False)
        double, single = network.double_blocks["0"], network.single_blocks["0"]
        double.img_mlp[2].bias[:2] = double.txt_attn.proj.bias[0] = torch.tensor(6e4)
        double.img_mlp[2].bias[1] = single.linear2.bias[1] = -6e4
        single.linear2.bias[0] = 6e4
        # Gates of one, and shifts and scales of zero.
        for mod, gates in (
            (double.img_mod, (2, 5)), (double.txt_mod, (2, 5)), (single.modulation, (2,))
        ):  # fmt: skip
            mod.lin.weight.zero_()
            rows = mod.lin.bias.zero_().view(3 * mod.sublayers, -1)
            for gate in gates:
                rows[gate] = 1
        when = StepModulation(vector=torch.zeros(1, config.hidden).half())
        x = torch.zeros(1, 3, config.hidden).half()
        x[..., 0], x[..., 1] = 6e4, -6e4
        if device == "cpu":
            (latents, condition), z = double(x, x, when), single(x, when)
        else:
            latents, condition = dit_gpu.double_block(double, x, x, when)
            z = dit_gpu.single_block(single, x, when)
        for stream in (latents, z):
            assert stream[0, :, :2].tolist() == [expected] * 3
        assert bool(condition.isfinite().all()) == (config == step1x.config)
