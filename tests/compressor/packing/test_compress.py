"""The whole way: released folder -> packed file -> network, against the fake-quantized original."""

import copy
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import PRUNED, tiny_checkpoint, tiny_map, write_released

from vitapack.compressor.packing import compress as module
from vitapack.compressor.packing.compress import compress
from vitapack.compressor.packing.quantizers import QUANTIZERS
from vitapack.kernels.linear import cpu
from vitapack.kernels.linear.layouts import LAYOUTS
from vitapack.kernels.linear.weights import dequantize
from vitapack.runtime.errors import UserError
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.format.container import file_digest
from vitapack.runtime.format.header import read_header
from vitapack.runtime.format.layermap import LayerMap
from vitapack.runtime.format.reader import verify
from vitapack.runtime.format.schedules import SamplerDefaults, evaluation_times
from vitapack.runtime.format.tensors import plan_linears
from vitapack.runtime.loading.packed import load_packed_dit
from vitapack.runtime.networks.linear import PackedLinear
from vitapack.runtime.networks.modulation import MissingTime, ModulationTable
from vitapack.runtime.progress import Cancelled, Control
from vitapack.runtime.sampling.solvers import sample

MAPS = {"int8": tiny_map(8), "int4": tiny_map(4), "mixed": PRUNED}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


def inputs(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, 7, 4, generator=rng), torch.randn(2, 5, 6, generator=rng)


def fake_quantized(dit, header, quantizer="search"):
    """The original with each weight replaced by what the packed file should stand for."""
    fake = copy.deepcopy(dit).without(
        *(("double", i) for i in header.layer_map.pruned("double")),
        *(("single", i) for i in header.layer_map.pruned("single")),
    )
    for name, layout in header.linears.items():
        linear = fake.get_submodule(name)
        if LAYOUTS[layout].packed:
            packed = QUANTIZERS[quantizer]().quantize(name, linear.weight, LAYOUTS[layout])
            linear.weight.data = dequantize(packed)
    return fake


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("modulation", ["int8", "kept"])
def test_the_packed_network_is_the_fake_quantized_one(
    original, tmp_path, name, modulation, monkeypatch
):
    checkpoint, dit = original
    out = tmp_path / "m.safetensors"
    compress(checkpoint, MAPS[name], out, modulation=modulation)
    packed, fake = load_packed_dit(out), fake_quantized(dit, read_header(out))
    x, cond = inputs()
    times = [torch.tensor([t]) for t in (0.0, 0.123, 0.9)]
    plain = [fake(x, when, cond) for when in times]
    # To rounding through the CPU engine, to the bit through the reference.
    for when, expected in zip(times, plain, strict=True):
        torch.testing.assert_close(packed(x, when, cond), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(cpu, "available", lambda: False)
    reference = load_packed_dit(out)
    for when, expected in zip(times, plain, strict=True):
        assert torch.equal(reference(x, when, cond), expected)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_tables_differ_by_their_rounding_only(original, tmp_path, name, dtype):
    checkpoint, dit = original
    out = tmp_path / "m.safetensors"
    compress(checkpoint, MAPS[name], out, steps=[5], table_dtype=dtype)
    packed, fake = load_packed_dit(out), fake_quantized(dit, read_header(out))
    x, cond = inputs()
    for t in evaluation_times(replace(checkpoint.sampler, steps=5)):
        when = torch.tensor([t], dtype=torch.float64)
        exact = fake(x, when, cond)
        error = (packed(x, when, cond) - exact).norm() / exact.norm()
        assert error < (1e-3 if dtype == "F16" else 2e-5)
    with pytest.raises(MissingTime, match=r"no modulation table at t=0.37.*euler 5 steps"):
        packed(x, torch.tensor([0.37]), cond)
    with pytest.raises(MissingTime, match="no modulation table at t=nan"):
        packed(x, torch.tensor([float("nan")]), cond)


def test_samplers_find_all_their_times(original, tmp_path):
    checkpoint, _ = original
    out = tmp_path / "m.safetensors"
    compress(checkpoint, MAPS["int8"], out, samplers=["euler", "unipc"], steps=[4, 6])
    packed = load_packed_dit(out)
    x, cond = inputs()
    for sampler in ("euler", "unipc"):
        for steps in (4, 6):
            settings = SamplerDefaults(sampler, steps, 1.0)
            out_x = sample(
                lambda x, t: packed(x, torch.tensor([t], dtype=torch.float64), cond), x, settings
            )
            assert torch.isfinite(out_x).all()


def test_guidance_embedded_models(tmp_path):
    checkpoint, dit = tiny_checkpoint(tmp_path / "model", guidance_embed=True)
    x, cond = inputs()
    when, guidance = torch.tensor([0.0, 0.25]), torch.tensor([5.0, 5.0])
    for modulation in ("table", "both", "int8"):
        out = tmp_path / f"{modulation}.safetensors"
        compress(checkpoint, tiny_map(16), out, modulation=modulation, steps=[5], table_dtype="F32")
        held = read_header(out).modulation["guidance"]
        assert held == (None if modulation == "int8" else 5.0)
        packed = load_packed_dit(out)
        exact = dit(x, when, cond, guidance)
        error = (packed(x, when, cond, guidance) - exact).norm() / exact.norm()
        assert error < (2e-2 if modulation == "int8" else 3e-4)
    packed = load_packed_dit(tmp_path / "table.safetensors")
    with pytest.raises(MissingTime, match=r"guidance 5, not 7\.5"):
        packed(x, when, cond, torch.tensor([7.5, 7.5]))


def test_both_kinds_of_modulation_can_be_chosen(original, tmp_path):
    checkpoint, _ = original
    out = tmp_path / "m.safetensors"
    compress(checkpoint, MAPS["int8"], out, modulation="both", steps=[5])
    table, int8 = load_packed_dit(out), load_packed_dit(out, modulation="int8")
    assert isinstance(table.single_blocks["0"].modulation, ModulationTable)
    assert isinstance(int8.single_blocks["0"].modulation.lin, PackedLinear)
    x, cond = inputs()
    here = torch.tensor([0.25])
    error = (table(x, here, cond) - int8(x, here, cond)).norm() / table(x, here, cond).norm()
    assert 0 < error < 2e-2
    int8(x, torch.tensor([0.37]), cond)  # any time
    with pytest.raises(UserError, match="not as 'kept'"):
        load_packed_dit(out, modulation="kept")


def test_a8_stays_near_a16(original, tmp_path):
    checkpoint, _ = original
    for name in MAPS:
        out = tmp_path / f"{name}.safetensors"
        compress(checkpoint, MAPS[name], out, modulation="int8")
        a16, a8 = load_packed_dit(out), load_packed_dit(out, compute="a8")
        x, cond = inputs()
        t = torch.tensor([0.4])
        error = (a8(x, t, cond) - a16(x, t, cond)).norm() / a16(x, t, cond).norm()
        assert 0 < error < 0.03
    with pytest.raises(UserError, match="no compute mode 'a4': choose one of a16, a8"):
        load_packed_dit(out, compute="a4")


@pytest.mark.parametrize("modulation", ["table", "int8", "both", "kept"])
@pytest.mark.parametrize("embed", [None, True, False])
def test_a_dry_run_knows_the_exact_size(original, tmp_path, modulation, embed):
    checkpoint, _ = original
    out = tmp_path / "m.safetensors"
    settings = {"modulation": modulation, "steps": [3, 5], "embed": embed}
    planned = compress(checkpoint, PRUNED, out, dry_run=True, **settings)
    assert list(tmp_path.iterdir()) == []
    made = compress(checkpoint, PRUNED, out, **settings)
    assert planned == made == read_header(out).sizes()
    assert made.total == out.stat().st_size
    embedded = made.parts["shape decoder"] + made.parts["conditioner"]
    assert (embedded > 0) == (embed is not False)
    assert f"{made.total:,} B" in made.describe()


def test_equal_inputs_give_equal_bytes(original, tmp_path):
    checkpoint, _ = original
    for name in ("a", "b"):
        compress(checkpoint, PRUNED, tmp_path / f"{name}.safetensors")
    first, second = ((tmp_path / f"{n}.safetensors").read_bytes() for n in "ab")
    assert first == second
    header = read_header(tmp_path / "a.safetensors")
    source = checkpoint.weights.files[0]
    assert header.source["sha256"] == file_digest(source)
    assert verify(header.path) == header.sha256


def test_bytes_per_weight(original, tmp_path):
    checkpoint, dit = original
    header_linears = plan_linears(dit.config, tiny_map(4), "table")
    weights = sum(dit.get_submodule(name).weight.numel() for name in header_linears)
    made = compress(checkpoint, tiny_map(8), tmp_path / "m", dry_run=True)
    rows = sum(dit.get_submodule(name).out_features for name in header_linears)
    assert made.parts["8-bit weights"] == weights + 4 * rows


def test_progress_reaches_its_end(original, tmp_path):
    checkpoint, _ = original
    seen = []
    compress(checkpoint, PRUNED, tmp_path / "m.safetensors", control=Control(seen.append))
    assert {at.phase for at in seen} == {"compress"}
    done = [at.done for at in seen]
    assert done == sorted(done)
    assert seen[0].done == 0
    assert seen[-1].done == seen[-1].total > 0


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("after", [1, 9, 30])
@pytest.mark.parametrize("how", [Stop, Cancelled])
def test_an_interrupted_job_continues(original, tmp_path, monkeypatch, after, how):
    checkpoint, _ = original
    whole, out = tmp_path / "whole.safetensors", tmp_path / "m.safetensors"
    compress(checkpoint, PRUNED, whole)
    calls = []

    def interrupt(at):
        calls.append(at.done)
        if len(calls) == after + 1:
            if how is Stop:
                raise Stop
            control.cancel()

    control = Control(interrupt)
    with pytest.raises(how):
        compress(checkpoint, PRUNED, out, control=control)
    assert not out.exists()
    made = []
    real = module.pack

    def counted(weight, stored, layout, quantizer, name):
        made.append(name)
        return real(weight, stored, layout, quantizer, name)

    monkeypatch.setattr(module, "pack", counted)
    compress(checkpoint, PRUNED, out)
    resumed = len(made)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "whole.safetensors"]
    made.clear()
    compress(checkpoint, PRUNED, out)
    assert resumed <= len(made) - min(after - 3, 10)


def test_another_plan_or_damaged_work_starts_afresh(original, tmp_path):
    checkpoint, _ = original
    out = tmp_path / "m.safetensors"

    def interrupted(layer_map):
        def stop(at):
            if at.done > at.total // 2:
                control.cancel()

        control = Control(stop)
        with pytest.raises(Cancelled):
            compress(checkpoint, layer_map, out, control=control)
        return tmp_path / ".m.safetensors.partial" / "file"

    interrupted(tiny_map(8))
    compress(checkpoint, PRUNED, out)
    expected = out.read_bytes()
    work = interrupted(PRUNED)
    damaged = bytearray(work.read_bytes())
    damaged[len(damaged) // 3 :] = b"\x55" * (len(damaged) - len(damaged) // 3)
    work.write_bytes(damaged)
    compress(checkpoint, PRUNED, out)
    assert out.read_bytes() == expected


KILLED = """
import os, signal, sys
os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [{root!r}, {tests!r}]
from tiny_model import tiny_map
from vitapack.compressor.packing.compress import compress
from vitapack.runtime.progress import Control
from vitapack.runtime.families.open import open_checkpoint
def kill(at):
    if at.done > at.total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
compress(open_checkpoint({model!r}), tiny_map(4), {out!r}, control=Control(kill))
"""


def test_a_killed_process_leaves_nothing_under_the_final_name(original, tmp_path):
    checkpoint, _ = original
    root = Path(__file__).parents[3]
    out = tmp_path / "m.safetensors"
    code = KILLED.format(
        root=str(root),
        tests=str(root / "tests" / "helpers"),
        model=str(checkpoint.path),
        out=str(out),
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    compress(checkpoint, tiny_map(4), out)
    compress(checkpoint, tiny_map(4), tmp_path / "again.safetensors")
    assert out.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_two_runs_onto_one_name(original, tmp_path):
    checkpoint, _ = original
    out = tmp_path / "m.safetensors"

    def meanwhile(at):
        if at.done == 0:
            with pytest.raises(UserError, match="another compression is writing it"):
                compress(checkpoint, PRUNED, out)

    compress(checkpoint, PRUNED, out, control=Control(meanwhile))
    verify(out)


def test_mistakes_are_one_line_and_leave_nothing(original, tmp_path):
    checkpoint, _ = original
    out = tmp_path / "m.safetensors"
    other = LayerMap.uniform("hunyuan3d", {"double": 4, "single": 3}, 8)
    for settings, message in (
        ({"layer_map": other}, "map is for a network of 4 double blocks and 3 single .* has 2 dou"),
        ({"quantizer": "magic"}, "no quantizer 'magic': choose one of rtn, search"),
        ({"modulation": "x"}, "no modulation 'x'"),
        ({"schedules": []}, "at least one step"),
        ({"steps": [10_000]}, "expected a whole number from 1 to"),
        ({"out": tmp_path}, "is a folder"),
        ({"out": Path("/proc/nope/m.safetensors")}, "cannot write /proc/nope"),
    ):
        arguments = {"layer_map": PRUNED, "out": out, **settings}
        with pytest.raises(UserError, match=message) as caught:
            compress(checkpoint, **arguments)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(original):
    checkpoint, _ = original
    with pytest.raises(UserError, match="cannot write"):
        compress(checkpoint, PRUNED, "/dev/full/m.safetensors")


def test_broken_weights_are_named_and_leave_nothing(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    file = tmp_path / "model" / "model.fp16.safetensors"
    tensors = load_file(file)
    tensors["model.single_blocks.1.linear1.weight"][3, 4] = float("nan")
    save_file(tensors, file)
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UserError, match=r"single_blocks\.1\.linear1\.weight"):
        compress(open_checkpoint(tmp_path / "model"), tiny_map(4), folder / "m.safetensors")
    assert list(folder.iterdir()) == []


def test_json_of_the_sizes(original, tmp_path):
    checkpoint, _ = original
    made = compress(checkpoint, PRUNED, tmp_path / "m", dry_run=True)
    data = json.loads(json.dumps(made.to_json()))
    assert data["total"] == sum(data["bytes"].values())
    assert 0 < data["dit"] < data["total"]


def test_values_beyond_fp16_are_refused_with_a_way_out(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.fp16.safetensors")
    tensors["model.cond_in.bias"] = torch.full((40,), 1e5)
    write_released(tmp_path / "model", tensors)
    checkpoint, out = open_checkpoint(tmp_path / "model"), tmp_path / "m.safetensors"
    with pytest.raises(UserError, match=r"cond_in\.bias: .*1e\+05 does not fit F16; .* rest F32"):
        compress(checkpoint, PRUNED, out)
    compress(checkpoint, PRUNED, out, rest="F32")
    assert load_packed_dit(out).cond_in.bias[0] == 1e5
