"""Detection, hyper-parameters and strictness: one plain line for everything that can be wrong."""

import itertools
import json
import re

import pytest
import torch
import yaml
from released_layouts import refused
from safetensors.torch import save_file

from vitapack.runtime.errors import FormatError
from vitapack.runtime.families.open import BUNDLED, open_checkpoint
from vitapack.runtime.format.schedules import SamplerDefaults


def test_what_a_checkpoint_says(released, tmp_path, caplog):
    made = released()
    made.tensors["vae.encoder.input_proj.weight"] = torch.zeros(3)
    made.tensors["vae.pre_kl.weight"] = torch.zeros(3)
    made.tensors["conditioner.main_image_encoder.model.norm"] = torch.ones(2).half()
    with caplog.at_level("INFO", "vitapack.families"):
        checkpoint = open_checkpoint(made.save(tmp_path / "model"))
    assert "on purpose: vae.encoder.input_proj.weight, vae.pre_kl.weight" in caplog.text
    assert checkpoint.family == "hunyuan3d"
    assert checkpoint.variant == "hunyuan3d-2+3"
    assert checkpoint.config.double_blocks == (0, 1)
    assert checkpoint.config.single_blocks == (0, 1, 2)
    assert checkpoint.config.hidden == 64
    assert checkpoint.sampler == SamplerDefaults("euler", steps=50, guidance=5.0)
    assert checkpoint.scale_factor == 1.0188137142395404
    assert checkpoint.latents == (16, 8)
    assert set(checkpoint.ignored) == {"vae.encoder.input_proj.weight", "vae.pre_kl.weight"}
    assert {f"model.{name}" for name in checkpoint.names()} == {
        name for name in made.tensors if name.startswith("model.")
    }
    name = "double_blocks.0.img_attn.qkv.weight"
    assert checkpoint.shape(name) == (192, 64)
    assert checkpoint.dtype(name) == torch.float32
    assert torch.equal(checkpoint.tensor(name), made.tensors[f"model.{name}"])
    assert checkpoint.part_shapes("conditioner") == {"main_image_encoder.model.norm": ("F16", (2,))}
    norm = checkpoint.part_tensor("conditioner", "main_image_encoder.model.norm")
    assert norm.tolist() == [1, 1]
    shapes = checkpoint.part_shapes("shape_decoder")
    assert shapes["post_kl.weight"] == ("F32", (64, 8))
    assert not any(name.startswith("encoder") for name in shapes)
    assert checkpoint.part_config("shape_decoder")["embed_dim"] == 8
    assert json.loads(json.dumps(checkpoint.part_config("conditioner")))


def test_source_and_its_digest(released, tmp_path):
    import hashlib

    folder = released().save(tmp_path / "model")
    data = (folder / "model.fp16.safetensors").read_bytes()
    checkpoint = open_checkpoint(folder)
    assert checkpoint.source(hashed=True) == {
        "name": "model.fp16.safetensors",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
    }
    assert checkpoint.source(hashed=False)["sha256"] == "0" * 64


@pytest.mark.parametrize(
    ("depths", "guidance", "scheduler", "encoder", "variant"),
    [
        ((16, 32), False, "FlowMatchEuler", "DinoImageEncoder", "hunyuan3d-2.0"),
        ((16, 32), True, "FlowMatchEuler", "DinoImageEncoder", "hunyuan3d-2.0-fast"),
        ((16, 32), True, "ConsistencyFlowMatchEuler", "DinoImageEncoder", "hunyuan3d-2.0-turbo"),
        ((8, 16), False, "FlowMatchEuler", "DinoImageEncoder", "hunyuan3d-2mini"),
        ((8, 16), True, "ConsistencyFlowMatchEuler", "DinoImageEncoder", "hunyuan3d-2mini-turbo"),
        ((16, 32), False, "FlowMatchEuler", "DinoImageEncoderMV", "hunyuan3d-2mv"),
        ((16, 32), True, "ConsistencyFlowMatchEuler", "DinoImageEncoderMV", "hunyuan3d-2mv-turbo"),
    ],
)
def test_released_variants(depths, guidance, scheduler, encoder, variant, released, tmp_path):
    """The released configurations, at a width of 8."""
    from vitapack.runtime.families.checkpoint import network_shapes
    from vitapack.runtime.families.hunyuan3d import dit_config

    made = released()
    params = made.config["model"]["params"]
    params |= {"hidden_size": 8, "num_heads": 2, "guidance_embed": guidance}
    params |= {"depth": depths[0], "depth_single_blocks": depths[1]}
    made.config["scheduler"]["target"] = f"hy3dgen.schedulers.{scheduler}DiscreteScheduler"
    if scheduler.startswith("Con"):
        made.config["scheduler"]["params"]["pcm_timesteps"] = 100
    made.config["conditioner"]["params"]["main_image_encoder"]["type"] = encoder
    shapes = network_shapes(dit_config(params, "test"))
    made.tensors = {f"model.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    checkpoint = open_checkpoint(made.save(tmp_path / "model"))
    assert checkpoint.variant == variant
    assert checkpoint.config.embeds_guidance == guidance
    if scheduler.startswith("Con"):
        assert checkpoint.sampler == SamplerDefaults("consistency", 5, 5.0, pcm_timesteps=100)
    else:
        assert checkpoint.sampler == SamplerDefaults("euler", 50, 5.0)


@pytest.mark.parametrize(("depths", "count"), [((16, 32), 1_113_274_432), ((8, 16), 559_196_224)])
def test_released_sizes(depths, count):
    """Parameters of 2.0 as its file size says, and of 2mini, from the published numbers alone."""
    from vitapack.runtime.families.checkpoint import network_shapes
    from vitapack.runtime.families.hunyuan3d import dit_config

    params = {"depth": depths[0], "depth_single_blocks": depths[1]}
    shapes = network_shapes(dit_config(params, "test"))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count


def test_tensors_that_do_not_fit_are_counted_and_named(released, tmp_path):
    made = released()
    qkv = made.tensors.pop("model.double_blocks.1.img_attn.qkv.weight")
    made.tensors["model.double_blocks.1.img_attn.qvk.weight"] = qkv
    made.tensors["model.latent_in.weight"] = torch.zeros(64, 9)
    line = refused(made.save(tmp_path / "model"), FormatError)
    assert "missing: model.double_blocks.1.img_attn.qkv.weight" in line
    assert "unexpected: model.double_blocks.1.img_attn.qvk.weight" in line
    assert "of another shape: model.latent_in.weight [64, 9], expected [64, 8]" in line

    made = released()
    made.config["model"]["params"]["depth_single_blocks"] = 6
    line = refused(made.save(tmp_path / "deeper"), FormatError)
    assert "(24 in all)" in line

    made = released()
    made.tensors["model.latent_in.weight"] = torch.zeros(64, 8, dtype=torch.int32)
    assert "not floating point: model.latent_in.weight" in refused(made.save(tmp_path / "int"))

    made = released()
    del made.tensors["vae.post_kl.bias"]
    assert "missing: vae.post_kl.bias" in refused(made.save(tmp_path / "vae"), FormatError)

    made = released()
    made.tensors["optimizer.step"] = torch.zeros(1)
    assert "1 tensors are neither" in refused(made.save(tmp_path / "stray"), FormatError)


def change(path, value):
    """A function that sets one value of a released config."""

    def apply(config):
        *parents, last = path.split(".")
        for parent in parents:
            config = config[parent]
        if value is None:
            del config[last]
        else:
            config[last] = value

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("model.target", "a.b.HunYuanDiTPlain"), "says HunYuanDiTPlain; looked for"),
        (change("model.target", None), "says no model.target"),
        (change("model", "Hunyuan3DDiT"), "says no model.target"),
        (change("model.params", [1, 2]), "section model is not target and params"),
        (change("model.params.hidden_size", "wide"), "hidden_size is 'wide'; expected a int"),
        (change("model.params.hidden_size", True), "hidden_size is True"),
        (change("model.params.hidden_size", -64), "hidden_size is -64; expected 1 to 1000000"),
        (change("model.params.num_heads", 5), "not a multiple of heads 5"),
        (change("model.params.depth", 10**6), "expected <= 1000"),
        (change("model.params.rope", True), "unknown rope; known are"),
        (change("model.params.mlp_ratio", float("nan")), "mlp_ratio is nan; expected at most 1e9"),
        (change("model.params.mlp_ratio", 1e300), "mlp_ratio is 1e+300; expected at most 1e9"),
        (change("model.params.mlp_ratio", -1), "mlp_ratio is -1.0; expected above 0"),
        (change("vae.params.num_decoder_layers", 10**6), "is 1000000; expected at most 1000"),
        (change("vae.params.scale_factor", 0.0), "scale_factor is 0.0"),
        (change("vae.params.heads", 7), "do not divide one another"),
        (change("scheduler.target", "x.DDIMScheduler"), "scheduler is DDIMScheduler; expected"),
        (change("scheduler.params.num_train_timesteps", 500), "has 500 training steps"),
        (change("scheduler.params.shift", "much"), "shift 'much'"),
    ],
)
def test_configurations_that_cannot_be(spoil, message, released, tmp_path):
    made = released()
    spoil(made.config)
    assert message in refused(made.save(tmp_path / "model"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.yaml is empty"),
        ("- 1\n- 2\n", "config.yaml is a list"),
        ("model: {", "config.yaml is not YAML"),
        ("!!python/object/apply:os.system ['true']", "config.yaml is not YAML"),
        ("\x00", "config.yaml is not YAML"),
        ("a: &a [*a]", "more than 100000 entries, aliases resolved"),
        ("#" * (1 << 20) + "\n", "has 1048577 bytes; expected at most 1048576"),
    ],
)
def test_config_that_is_no_config(text, message, released, tmp_path):
    folder = released().save(tmp_path / "model")
    (folder / "config.yaml").write_text(text)
    assert message in refused(folder)


def test_a_billion_laughs(released, tmp_path):
    """Aliases of aliases are small in memory; the words of a refusal would never end."""
    folder = released().save(tmp_path / "model")
    place = folder / "config.yaml"
    laughs = "a: &a [ha, ha, ha, ha, ha, ha, ha, ha, ha]\n"
    for last, name in itertools.pairwise("abcdefghij"):
        laughs += f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n"
    text = place.read_text()
    for setting in ("hidden_size", "scale_factor", "target"):
        place.write_text(laughs + re.sub(f"{setting}: .*", f"{setting}: *j", text))
        assert "aliases resolved" in refused(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("pipeline", "euler"), "pipeline: a str; expected settings by name"),
        (change("conditioner.params.heads", 7), "width 192 is not a multiple of heads 7"),
        (change("vae.params.heads", 7), "width 192 is not a multiple of heads 7"),
        (change("vae.params.scale_factor", 0.0), "scale_factor is 0.0; expected above 0"),
        (change("conditioner.params.layers", 10**6), "layers is 1000000; expected at most 1000"),
    ],
)
def test_furniture_configurations_that_cannot_be(spoil, message, tmp_path):
    config = yaml.safe_load((BUNDLED["furniture"] / "config.yaml").read_text())
    spoil(config)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "model.safetensors").symlink_to(BUNDLED["furniture"] / "model.fp16.safetensors")
    assert message in refused(tmp_path)


def test_places_without_a_model(released, tmp_path):
    assert "does not exist; expected a checkpoint" in refused(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "found nothing" in refused(empty)
    (empty / "notes.txt").write_text("hello")
    assert "found notes.txt" in refused(empty)
    assert "is not a weight file" in refused(empty / "notes.txt")
    (tmp_path / "repository").mkdir()
    released().save(tmp_path / "repository" / "dit")
    assert "these folders have: " in refused(tmp_path / "repository")
    assert str(tmp_path / "repository" / "dit") in refused(tmp_path / "repository")


def test_folder_without_config_or_weights(released, tmp_path):
    folder = released().save(tmp_path / "model")
    (folder / "config.yaml").rename(tmp_path / "config.yaml.bak")
    assert "found model.fp16.safetensors" in refused(folder)
    (tmp_path / "config.yaml.bak").rename(folder / "config.yaml")
    (folder / "model.fp16.safetensors").unlink()
    assert "holds no weights: looked for model.fp16.safetensors" in refused(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, 10_000, -1])
def test_truncated_weights(keep, released, tmp_path):
    folder = released().save(tmp_path / "model")
    file = folder / "model.fp16.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    line = refused(folder, FormatError)
    assert str(file) in line


def test_text_under_a_weight_file_s_name(released, tmp_path):
    folder = released().save(tmp_path / "model")
    file = folder / "model.fp16.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "not a safetensors file" in refused(folder, FormatError)
    file.unlink()
    for content in (b"", b"hello there", b"PK\x03\x04 no zip"):
        (folder / "model.ckpt").write_bytes(content)
        assert "torch checkpoint" in refused(folder, FormatError)
    other = tmp_path / "other.safetensors"
    save_file({"text_model.embed.weight": torch.zeros(2, 2)}, other)
    assert "its tensors are model.text_model.embed.weight" in refused(other)


def test_shard_index_may_not_point_elsewhere(released, tmp_path):
    folder = released().save(tmp_path / "model")
    (folder / "model.fp16.safetensors").rename(tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    assert "points outside its folder" in refused(folder, FormatError)
    index.write_text("[]")
    assert "is not a shard index" in refused(folder, FormatError)


def test_the_same_tensor_twice(released, tmp_path):
    made = released()
    made.tensors["_forward_module.model.latent_in.bias"] = made.tensors["model.latent_in.bias"] + 1
    assert "twice, with and without prefix" in refused(made.save(tmp_path / "model"), FormatError)


def test_bundled_names(monkeypatch, tmp_path):
    monkeypatch.setitem(BUNDLED, "furniture", tmp_path / "gone")
    assert "bundled model furniture is not in this installation" in refused("furniture")


def test_yaml_is_what_users_have(released, tmp_path):
    """Comments, True and ints where floats are meant, as in the released files."""
    folder = released().save(tmp_path / "model")
    text = yaml.safe_dump(released().config).replace("mlp_ratio: 4.0", "mlp_ratio: 4 # ratio")
    (folder / "config.yaml").write_text(text.replace("qkv_bias: true", "qkv_bias: True"))
    assert open_checkpoint(folder).config.mlp_hidden == 256
