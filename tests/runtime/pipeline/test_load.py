"""Loading: every way a checkpoint may lie on disk gives the same network, in little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vitapack.runtime.engines.choose import PLAIN
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.loading.fill import fill
from vitapack.runtime.loading.source import Source
from vitapack.runtime.pipeline import load as load_module
from vitapack.runtime.pipeline.load import load_dit, load_shape_decoder


def outputs_equal(dit, reference):
    with torch.no_grad():
        return torch.allclose(dit(**reference.inputs), reference.output, rtol=1e-4, atol=1e-5)


def test_folder_and_its_file_are_the_same(golden, released, tmp_path):
    folder = released().save(tmp_path / "model")
    for path in (folder, str(folder), folder / "model.fp16.safetensors"):
        assert outputs_equal(load_dit(path), golden("hunyuan3ddit_tiny"))


@pytest.mark.parametrize("name", ["hunyuan3ddit_tiny", "hunyuan3ddit_tiny_guidance"])
@pytest.mark.parametrize("prefix", ["model.", "", "_forward_module.", "_forward_module.model."])
def test_file_without_config(name, prefix, golden, tmp_path):
    """Every hyper-parameter shows in a shape."""
    reference = golden(name)
    path = tmp_path / "dit.safetensors"
    save_file({f"{prefix}{key}": value for key, value in reference.weights.items()}, path)
    assert outputs_equal(load_dit(path), reference)
    checkpoint = open_checkpoint(path)
    assert checkpoint.decoder is None
    assert checkpoint.scale_factor is None
    with pytest.raises(UserError, match="holds no shape decoder"):
        load_shape_decoder(checkpoint)
    with pytest.raises(UserError, match="furniture has no shape decoder network of its own"):
        load_shape_decoder(open_checkpoint("furniture"))


def test_shards(golden, released, tmp_path):
    made = released()
    folder = made.save(tmp_path / "model")
    (folder / "model.fp16.safetensors").unlink()
    names = sorted(made.tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: made.tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert outputs_equal(load_dit(folder), golden("hunyuan3ddit_tiny"))
    source = open_checkpoint(folder).source(hashed=True)
    assert source["name"] == "model"
    assert len(set(source["sha256"])) > 1
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model-2\.safetensors of its 2 shards are missing"):
        load_dit(folder)


@pytest.mark.parametrize("wrap", [lambda parts: parts, lambda parts: {"state_dict": parts}])
@pytest.mark.parametrize("zipped", [True, False])
def test_ckpt_of_nested_dicts(wrap, zipped, golden, released, tmp_path):
    made = released()
    folder = made.save(tmp_path / "model")
    (folder / "model.fp16.safetensors").unlink()
    parts = {"model": {}, "vae": {}}
    for name, tensor in made.tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    torch.save(wrap(parts), folder / "model.ckpt", _use_new_zipfile_serialization=zipped)
    assert outputs_equal(load_dit(folder), golden("hunyuan3ddit_tiny"))
    assert load_shape_decoder(open_checkpoint(folder)).config.layers == 2


def test_dtype_and_modes(released, tmp_path):
    folder = released().save(tmp_path / "model")
    dit = load_dit(folder, dtype=torch.float16)
    assert {p.dtype for p in dit.parameters()} == {torch.float16}
    assert not dit.training
    assert not any(p.requires_grad for p in dit.parameters())
    with pytest.raises(UserError, match="not packed, so it cannot compute in a8"):
        load_dit(folder, compute="a8")
    with pytest.raises(UserError, match="no compute mode 'fast': choose one of a16, a8"):
        load_dit(folder, compute="fast")


def test_values_too_large_for_the_dtype_are_named(released, tmp_path):
    made = released()
    made.tensors["model.latent_in.weight"][0, 0] = 1e5
    folder = made.save(tmp_path / "model")
    load_dit(folder)
    load_dit(folder, dtype=torch.bfloat16)
    with pytest.raises(FormatError, match=r"'latent_in.weight' reaches 1e\+05, too large for"):
        load_dit(folder, dtype=torch.float16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_damaged_values_are_named(value, released, tmp_path):
    made = released()
    made.tensors["model.single_blocks.1.linear2.weight"][3, 5] = value
    folder = made.save(tmp_path / "model")
    with pytest.raises(FormatError) as caught:
        load_dit(folder)
    assert "model.single_blocks.1.linear2.weight holds 1 NaN or infinite" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_packed_file_goes_to_its_own_reader(released, tmp_path):
    """The metadata key decides, in a file of any name and in a folder without config.yaml."""
    folder = tmp_path / "packed"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors", metadata={"vitapack": "{}"})
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(FormatError, match="vitapack"):  # refused by the packed format's reader
            load_dit(path)
    with pytest.raises(UserError, match="is a packed file of vitapack"):
        open_checkpoint(folder / "model.safetensors")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' own peak figure")
def test_building_takes_one_network_s_memory(tmp_path):
    """The peak beyond the weights is a few tensors, not a second copy of them."""
    path = tmp_path / "weights.safetensors"
    save_file({f"{i}.weight": torch.zeros(1024, 1024) for i in range(32)}, path)  # 128 MiB
    code = f"""
import torch
from pathlib import Path
from vitapack.runtime.engines.choose import PLAIN
from vitapack.runtime.loading.fill import fill
from vitapack.runtime.loading.source import Source
from vitapack.runtime.loading.checkpoint_files import open_weights

def peak():  # MiB; ru_maxrss would start from the parent's
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

weights = open_weights(Path({str(path)!r}))
make = lambda: torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(32)))
before = peak()
shapes = {{name: weights.shape(name) for name in weights}}
fill(make, Source("w", {{}}, shapes, weights.read), PLAIN)
print(peak() - before)
"""
    root = Path(load_module.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert 90 < float(done.stdout) < 180


def test_a_missing_tensor_is_named():
    source = Source("w", {}, {"weight": (2, 2)}, lambda name: torch.zeros(2, 2))
    with pytest.raises(UserError, match="w: the tensors do not fit Linear: bias"):
        fill(lambda: torch.nn.Linear(2, 2), source, PLAIN)
