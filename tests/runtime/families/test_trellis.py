"""TRELLIS: reference outputs through the real loading path, compression, folders that are wrong."""

import json

import pytest
import torch
from released_layouts import Trellis, refused
from safetensors.torch import save_file

from vitapack.compressor.packing.compress import compress
from vitapack.compressor.planning.files import resolve_plan
from vitapack.runtime.decode.occupancy import OccupancyConfig, OccupancyDecoder
from vitapack.runtime.engines.choose import network_of
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.families import probe as probe_module
from vitapack.runtime.families.checkpoint import network_shapes, shapes_of
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.families.trellis import flow_config
from vitapack.runtime.format.describe import describe
from vitapack.runtime.format.header import read_header
from vitapack.runtime.format.layermap import BlockEntry, LayerMap
from vitapack.runtime.format.schedules import SamplerDefaults, evaluation_times
from vitapack.runtime.format.tensors import model_tensors
from vitapack.runtime.loading.packed import load_packed_dit
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.flow import cube, patches
from vitapack.runtime.pipeline.load import load_dit, load_shape_decoder


def test_reference_output(golden, relative, tmp_path):
    reference = golden("trellis_ss_tiny")
    folder = Trellis().save(tmp_path / "model")
    file = folder / f"{Trellis.FLOW}.safetensors"
    for path in (folder, file, file.with_suffix(".json")):
        flow = load_dit(path)
        with torch.no_grad():
            assert relative(flow(**reference.inputs), reference.output) <= 1e-5


def test_one_token_stands_for_equal_ones(golden, relative, tmp_path):
    inputs = golden("trellis_ss_tiny").inputs
    flow = load_dit(Trellis().save(tmp_path / "model"))
    one = torch.randn(1, 1, inputs["cond"].shape[2]).expand(len(inputs["x"]), -1, -1)
    with torch.no_grad():
        many = flow(inputs["x"], inputs["t"], one.expand(-1, 1374, -1))
        assert relative(flow(inputs["x"], inputs["t"], Condition(one, 1374)), many) <= 5e-6


def test_computed_places_are_the_stored_ones(golden, relative):
    from vitapack.runtime.networks.flow import position_embedding

    stored = golden("trellis_ss_tiny").weights["pos_emb"]
    assert relative(position_embedding(4, 64), stored) <= 1e-6


def test_reference_decoder(golden, relative, tmp_path):
    reference = golden("trellis_ss_decoder_tiny")
    decoder = load_shape_decoder(open_checkpoint(Trellis().save(tmp_path / "model")))
    with torch.no_grad():
        assert relative(decoder(reference.inputs["z"]), reference.output) <= 1e-5


def test_what_a_checkpoint_says(tmp_path):
    checkpoint = open_checkpoint(Trellis().save(tmp_path / "model"))
    assert (checkpoint.family, checkpoint.variant) == ("trellis", "trellis-ss-4")
    assert checkpoint.latents == (8, 4, 4, 4)
    assert checkpoint.ignored == ("model.pos_emb",)
    assert "pos_emb" not in checkpoint.names()
    defaults = SamplerDefaults("euler", 25, 6.0, 3.0, "trellis", guidance_interval=(0.5, 1.0))
    assert checkpoint.sampler == defaults
    assert checkpoint.decoder.side == 16


def test_released_sizes():
    config = flow_config({}, "test", [], slat=False)
    count = sum(torch.Size(shape).numel() for shape in network_shapes(config).values())
    assert count == 555_543_560
    decoder = OccupancyConfig(8, (512, 128, 32), 2, 2)
    shapes = shapes_of(lambda: OccupancyDecoder(decoder))
    assert round(sum(torch.Size(s).numel() for s in shapes.values()) / 1e5) == 737  # 73.7 M


def test_patches_have_the_channel_slowest():
    x = torch.arange(2 * 3 * 4**3).view(2, 3, 4, 4, 4)
    tokens = patches(x, 2)
    assert tokens.shape == (2, 8, 24)
    assert tokens[0, 1, 8 + 5] == x[0, 1, 1, 0, 3]  # token (0, 0, 1), channel 1, offset (1, 0, 1)
    assert torch.equal(cube(tokens, 2, 2), x)


def test_the_table_of_tensors_is_the_networks_own_state_dict(tmp_path):
    config = open_checkpoint(Trellis().save(tmp_path / "model")).config
    network = config
    kept = {"kind": "kept", "dtype": "F16", "nodes": 0}
    tensors = model_tensors(network, {}, "F16", kept)
    shapes = {n.removeprefix("model."): shape for n, (_, shape) in tensors.items()}
    assert shapes == network_shapes(config)
    owned = {f"{name}.{leaf}" for name in network.linears() for leaf in ("weight", "bias")}
    assert owned | set(network.norms()) == set(shapes)


MIXED = LayerMap(
    "trellis",
    {"block": 4},
    (BlockEntry("block", 0, 8), BlockEntry("block", 2, 4), BlockEntry("block", 3, 16)),
    how="by hand",
)


@pytest.mark.parametrize("modulation", ["table", "int8"])
def test_compressed_and_pruned(modulation, golden, relative, tmp_path):
    """The packed network is the original one without block 1, to within its rounding."""
    checkpoint = open_checkpoint(Trellis().save(tmp_path / "model"))
    out = tmp_path / "m.safetensors"
    sizes = compress(checkpoint, MIXED, out, modulation=modulation, steps=[6])
    assert sizes.total == out.stat().st_size
    header = read_header(out)
    assert header.network.blocks == (0, 2, 3)
    assert "block     3 of 4 blocks kept" in describe(header)
    packed, original = load_packed_dit(out), load_dit(tmp_path / "model")
    assert header.network == original.without(("block", 1)).config
    inputs = golden("trellis_ss_tiny").inputs
    t = evaluation_times(SamplerDefaults("euler", 6, 1.0, 3.0, "trellis"))[2]
    when = torch.tensor([t], dtype=torch.float64)
    with torch.no_grad():
        wanted = original.without(("block", 1))(inputs["x"], when, inputs["cond"])
        found = packed(inputs["x"], when, inputs["cond"])
        whole = original(inputs["x"], when, inputs["cond"])
    assert relative(found, wanted) < 0.1  # 4 bits on 64 channels
    assert relative(found, wanted) < 0.5 * relative(whole, wanted)


def test_plans(tmp_path):
    checkpoint = open_checkpoint(Trellis().save(tmp_path / "model"))
    assert resolve_plan("int8", checkpoint).totals == {"block": 4}
    with pytest.raises(UserError, match="paper has no layer map for trellis with 4 block"):
        resolve_plan("paper", checkpoint)
    wrong = LayerMap("trellis", {"double": 4}, (BlockEntry("double", 0, 8),))
    with pytest.raises(UserError, match="the plan is for trellis with 4 double blocks"):
        resolve_plan(wrong, checkpoint)


def test_structured_latent_flow_by_its_blocks(golden, relative, tmp_path):
    """Its transformer alone: tokens in, tokens out; the sparse ends are named as ignored."""
    made = Trellis()
    args = made.flow["args"] | {"io_block_channels": [16], "num_io_res_blocks": 2, "patch_size": 2}
    config = {"name": "ElasticSLatFlowModel", "args": args | {"resolution": 8}}
    ends = {"input_blocks.0.conv1.weight": torch.zeros(3), "out_blocks.1.emb.bias": torch.zeros(2)}
    (tmp_path / "slat.json").write_text(json.dumps(config))
    tensors = {k: v for k, v in made.tensors.items() if k != "pos_emb"}
    save_file(tensors | ends, tmp_path / "slat.safetensors")
    checkpoint = open_checkpoint(tmp_path / "slat.safetensors")
    assert checkpoint.variant == "trellis-slat-4"
    assert checkpoint.latents is None
    assert len(checkpoint.ignored) == 6
    reference = golden("trellis_ss_tiny")
    whole = load_dit(Trellis().save(tmp_path / "ss"))
    seen = []
    whole.blocks["3"].register_forward_hook(lambda module, given, out: seen.append((given, out)))
    whole.blocks["0"].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    torso = load_dit(tmp_path / "slat.json")
    with torch.no_grad():
        whole(**reference.inputs)
        tokens, (_, last) = seen
        out = torso(tokens, reference.inputs["t"], reference.inputs["cond"])
    assert torch.equal(out, last)
    compress(checkpoint, resolve_plan("int4", checkpoint), tmp_path / "p.safetensors", steps=[3])
    assert network_of(read_header(tmp_path / "p.safetensors").network).config.in_channels == 0


def test_tensors_that_do_not_fit(tmp_path):
    made = Trellis()
    made.tensors["blocks.1.self_attn.to_qvk.weight"] = made.tensors.pop(
        "blocks.1.self_attn.to_qkv.weight"
    )
    made.tensors["input_layer.weight"] = torch.zeros(64, 9)
    line = refused(made.save(tmp_path / "a"))
    assert "missing: flow.blocks.1.self_attn.to_qkv.weight" in line
    assert "unexpected: flow.blocks.1.self_attn.to_qvk.weight" in line
    assert "of another shape: flow.input_layer.weight [64, 9], expected [64, 8]" in line
    made = Trellis()
    del made.decoder_tensors["out_layer.2.bias"]
    assert "missing: vae.out_layer.2.bias" in refused(made.save(tmp_path / "b"))


def test_damaged_values_are_named(tmp_path):
    made = Trellis()
    made.tensors["blocks.0.mlp.mlp.0.weight"][3, 5] = float("nan")
    with pytest.raises(FormatError, match=r"ss_flow_img_dit.*holds 1 NaN or infinite"):
        load_dit(made.save(tmp_path / "model"))


@pytest.mark.parametrize("keep", [0, 7, 100, 10_000, -1])
def test_truncated_weights(keep, tmp_path):
    file = Trellis().save(tmp_path / "model") / f"{Trellis.FLOW}.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert str(file) in refused(tmp_path / "model")


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("flow", "model_channels", "wide", "model_channels is 'wide'"),
        ("flow", "num_heads", 5, "not a multiple of heads 5"),
        ("flow", "num_blocks", 10**5, "expected at most 1000, 256 and 16"),
        ("flow", "pe_mode", "rope", "only 'ape' is supported"),
        ("flow", "qk_rms_norm", False, "only True is supported"),
        ("flow", "patch_size", 3, "not a multiple of 3"),
        ("decoder", "channels", [], "expected one to six widths"),
        ("decoder", "norm_type", "group", "only layer norms"),
    ],
)
def test_configurations_that_cannot_be(part, key, value, message, tmp_path):
    made = Trellis()
    getattr(made, part)["args"][key] = value
    assert message in refused(made.save(tmp_path / "model"))


def test_other_places(tmp_path):
    made = Trellis()
    made.pipeline["args"]["models"]["sparse_structure_flow_model"] = "../elsewhere"
    assert "points out of its folder" in refused(made.save(tmp_path / "out"))
    made = Trellis()
    made.pipeline["args"]["sparse_structure_sampler"]["params"]["cfg_interval"] = [2, 1]
    assert "guidance_interval" in refused(made.save(tmp_path / "interval"))
    folder = Trellis().save(tmp_path / "model")
    (folder / f"{Trellis.FLOW}.json").write_text("{not json")
    assert "is not JSON" in refused(folder)
    (folder / f"{Trellis.FLOW}.json").unlink()
    assert "cannot read" in refused(folder)
    (folder / "pipeline.json").write_text("{}")
    assert "pipeline.json naming a sparse_structure_flow_model" in refused(folder)


def test_pipeline_json_is_read_once(monkeypatch, tmp_path):
    read, names = probe_module.read_json, []
    monkeypatch.setattr(
        probe_module, "read_json", lambda path: names.append(path.name) or read(path)
    )
    open_checkpoint(Trellis().save(tmp_path / "model"))
    assert names.count("pipeline.json") == 1
