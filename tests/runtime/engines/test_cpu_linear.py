"""The CPU engine's linear as a module: immutable, shared by threads and copies, itself again after
a pickle and a state_dict."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_model import tiny_checkpoint, tiny_map
from torch import nn

from vitapack.compressor.packing.compress import compress
from vitapack.compressor.packing.quantizers import QUANTIZERS
from vitapack.kernels.linear import cpu, support
from vitapack.kernels.linear.layouts import LAYOUTS, W4, W8, WeightLayout
from vitapack.kernels.linear.weights import PackedWeight
from vitapack.runtime.engines.choose import Execution
from vitapack.runtime.engines.cpu_linear import CpuLinear, linear_for
from vitapack.runtime.errors import UserError
from vitapack.runtime.loading.packed import load_packed
from vitapack.runtime.networks.linear import PackedLinear
from vitapack.runtime.pipeline.load import load_dit

LAYOUT = pytest.mark.parametrize("layout", [W8, W4[0], W4[2]], ids=lambda layout: layout.id)


def weight_of(layout, n=70, k=200):
    rng = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=rng)
    return QUANTIZERS["rtn"]().quantize("x", weight, layout), torch.randn(n, generator=rng)


def inputs(rows=9, k=200):
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows))


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


@LAYOUT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_is_the_files_tensors_both_ways(layout, dtype):
    weight, bias = weight_of(layout)
    plain, engine = PackedLinear(weight, bias.to(dtype)), CpuLinear(weight, bias.to(dtype))
    same(engine.state_dict(), plain.state_dict())
    other, _ = weight_of(layout, k=200)
    flipped = PackedWeight(layout, other.tensors | {"scale": other.scale * 2}, 200)
    blank = nn.Sequential(CpuLinear(flipped, torch.zeros(70, dtype=dtype)))
    blank.load_state_dict({f"0.{name}": tensor for name, tensor in plain.state_dict().items()})
    same(blank[0].state_dict(), plain.state_dict())
    assert torch.equal(blank(inputs()), engine(inputs()))
    alone = nn.Sequential(CpuLinear(weight, None))
    assert list(alone.state_dict()) == [f"0.{name}" for name in layout.names]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\.'):
        alone.load_state_dict({})
    alone.load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError, match="Unexpected"):
        alone.load_state_dict(alone.state_dict() | {"0.bias": bias})


@LAYOUT
def test_copies_share_the_weight_and_pickles_hold_the_files_tensors(layout):
    weight, bias = weight_of(layout)
    engine = CpuLinear(weight, bias, "a8")
    x = inputs()
    twin = copy.deepcopy(engine)
    assert twin.panels is engine.panels
    assert torch.equal(twin(x), engine(x))
    raw = pickle.dumps(engine)
    assert len(raw) < 1.1 * layout.nbytes(70, 200) + 4000
    again = pickle.loads(raw)
    assert isinstance(again, CpuLinear)
    assert (again.compute, again.layout) == ("a8", layout)
    assert again.panels is not engine.panels
    assert torch.equal(again(x), engine(x))
    same(again.state_dict(), engine.state_dict())


@LAYOUT
@pytest.mark.parametrize("compute", ["a16", "a8"])
def test_gradients_pass_through_the_exact_weight(layout, compute):
    weight, bias = weight_of(layout)
    found = []
    for form in (PackedLinear, CpuLinear):
        x = inputs().requires_grad_()
        y = form(weight, bias, compute)(x)
        if compute == "a16":
            y.square().sum().backward()
            found.append((y.detach(), x.grad))
        else:
            found.append((y.detach(), y.detach()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("form", [PackedLinear, CpuLinear])
@pytest.mark.parametrize("compute", ["a16", "a8"])
def test_threads_share_a_module_from_its_first_call_on(form, compute):
    """Calls with and without gradients at once, all first ones: nothing is made in `forward`."""
    weight, bias = weight_of(W4[0])
    expected_x = inputs(50)
    alone = form(weight, bias, compute)
    expected = alone(expected_x).detach(), alone(expected_x.clone().requires_grad_()).detach()
    threads = 8
    for _ in range(20):
        layer, gate = form(weight, bias, compute), threading.Barrier(threads)

        def call(number, layer=layer, gate=gate):
            x = expected_x.clone().requires_grad_(bool(number % 2))
            gate.wait()
            return layer(x).detach()

        with ThreadPoolExecutor(threads) as pool:
            for number, found in enumerate(pool.map(call, range(threads))):
                assert torch.equal(found, expected[number % 2])


def test_threads_share_a_network_from_its_first_call_on(tmp_path):
    checkpoint, _ = tiny_checkpoint(tmp_path / "model")
    compress(checkpoint, tiny_map(4), tmp_path / "m.safetensors", steps=[3])
    rng = torch.Generator().manual_seed(0)
    x, cond = torch.randn(1, 7, 4, generator=rng), torch.randn(1, 5, 6, generator=rng)
    with torch.no_grad():
        expected = load_dit(tmp_path / "m.safetensors")(x, torch.zeros(1), cond)
    for _ in range(5):
        dit, gate = load_dit(tmp_path / "m.safetensors"), threading.Barrier(4)

        def call(number, dit=dit, gate=gate):
            gate.wait()
            with torch.set_grad_enabled(bool(number % 2)):
                given = x.clone().requires_grad_(bool(number % 2))
                return dit(given, torch.zeros(1), cond).detach()

        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(call, range(4)):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_moves_are_refused_and_conversions_change_nothing():
    weight, bias = weight_of(W4[0])
    network = nn.Sequential(nn.Linear(200, 200), CpuLinear(weight, bias))
    before = network[1](inputs())
    network.bfloat16().float().to("cpu", torch.float64)
    assert network[0].weight.dtype == torch.float64
    assert torch.equal(network[1](inputs()), before)
    message = "cannot move to meta: load it there, with device='meta'"
    with pytest.raises(UserError, match=message):
        network[1].to("meta")
    assert torch.equal(network[1](inputs()), before)
    with pytest.raises(ValueError, match=r"on cpu, found .* on meta"):
        network[1](torch.empty(3, 200, device="meta"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo names what breaks the graph
def test_torch_compile_runs_the_engine():
    weight, bias = weight_of(W8)
    layer = CpuLinear(weight, bias, "a8")
    compiled = torch.compile(lambda x: torch.relu(layer(2 * x)), backend="aot_eager")
    x = inputs()
    assert torch.equal(compiled(x), torch.relu(layer(2 * x)))


def test_who_makes_which(monkeypatch, caplog):
    weight, bias = weight_of(W8)
    assert type(linear_for(weight, bias, "a8", "cpu-int8")) is CpuLinear
    assert type(linear_for(weight, bias, "a8", "plain")) is PackedLinear
    other = WeightLayout("w8-other-v1", 8, "q8", "I8")
    monkeypatch.setitem(LAYOUTS, other.id, other)
    odd = PackedWeight(other, weight.tensors, 200)
    support.announce.cache_clear()
    made = linear_for(odd, bias, "a8", "cpu-int8")
    assert type(made) is PackedLinear
    assert "the int8 engine does not read layout w8-other-v1; slow" in caplog.text
    torch.testing.assert_close(made(inputs()), CpuLinear(weight, bias, "a8")(inputs()))


def test_the_loader_makes_the_engines_linears_and_training_gets_plain_ones(tmp_path):
    checkpoint, _ = tiny_checkpoint(tmp_path / "model")
    path = tmp_path / "m.safetensors"
    compress(checkpoint, tiny_map(8), path, steps=[3])

    def forms(network):
        return {type(m) for m in network.modules() if isinstance(m, PackedLinear)}

    for compute in ("a16", "a8"):
        assert forms(load_dit(path, compute=compute)) == {CpuLinear}
    plain = load_packed(path, Execution("cpu", torch.float32))
    assert forms(plain) == {PackedLinear}
    same(load_dit(path).state_dict(), plain.state_dict())


def test_packing_holds_one_weight_at_a_time(tmp_path, monkeypatch):
    """While the next weight is read, the one before is held in the engine's order only."""
    checkpoint, _ = tiny_checkpoint(tmp_path / "model")
    compress(checkpoint, tiny_map(8), tmp_path / "m.safetensors", steps=[3])
    import weakref

    alive, most, pack = weakref.WeakSet(), [], cpu.pack

    def noted(weight, bias=None):
        alive.add(weight)
        most.append(len(alive))
        return pack(weight, bias)

    monkeypatch.setattr(cpu, "pack", noted)
    load_dit(tmp_path / "m.safetensors", compute="a8")
    assert len(most) > 4
    assert max(most) == 1
    assert not alive
