"""Steps as CUDA graphs: what a recording may not do, and which calls share one, without a GPU too.

Here a recording is torch's own tracer: like a CUDA graph it keeps operations and addresses, and
nothing of what Python decided.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import MIXED, tiny_checkpoint
from tiny_released import chair, tiny_released
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitapack import cli
from vitapack.compressor.packing.compress import compress
from vitapack.compressor.planning.files import resolve_plan
from vitapack.kernels.linear import attention, cpu, dispatch
from vitapack.runtime.engines import cuda_graph
from vitapack.runtime.engines.choose import Execution, network_of
from vitapack.runtime.engines.cuda_graph import GraphedNetwork, Recording
from vitapack.runtime.engines.gpu_dit import GpuDiT
from vitapack.runtime.errors import UserError
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.format.header import read_header
from vitapack.runtime.format.schedules import SamplerDefaults, evaluation_times
from vitapack.runtime.loading.packed import load_packed_dit
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.modulation import StepModulation
from vitapack.runtime.pipeline.pipeline import Pipeline
from vitapack.runtime.sampling.guidance import denoise, velocity_of


def sampler_of(path: Path) -> SamplerDefaults:
    return replace(SamplerDefaults.from_json(read_header(path).sampler), steps=4)


class Traced(Recording):
    """The same over torch's tracer, which refuses a look at a value as CUDA refuses it."""

    def __init__(
        self, call: Callable[..., Tensor], inputs: Sequence[Tensor], beside: Recording | None
    ) -> None:
        self.inputs = [value.clone() for value in inputs]
        self.traced = make_fx(call)(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for buffer, value in zip(self.inputs, inputs, strict=True):
            buffer.copy_(value)
        return self.traced(*self.inputs).clone()


@pytest.fixture(scope="module")
def packed_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of network and of modulation, tiny."""
    folder = tmp_path_factory.mktemp("graphs")
    checkpoint, _ = tiny_checkpoint(folder / "model")
    embedded, _ = tiny_checkpoint(folder / "embedded", guidance_embed=True)
    trellis = open_checkpoint(tiny_released("trellis-ss", folder / "trellis"))
    files = {}
    for name, source, plan, modulation in (
        ("table", checkpoint, MIXED, "table"),
        ("int8", checkpoint, MIXED, "int8"),
        ("embedded", embedded, MIXED, "table"),
        ("trellis", trellis, resolve_plan("int8", trellis), "table"),
    ):
        files[name] = folder / f"{name}.safetensors"
        compress(source, plan, files[name], modulation=modulation, steps=(4,))
    return files


def inputs(network: Any, batch: int = 1) -> tuple[Tensor, Tensor]:
    config, rng = network.config, torch.Generator().manual_seed(0)
    latents = (7, config.in_channels)
    if hasattr(config, "resolution"):
        latents = (config.in_channels, *[config.resolution] * 3)
    x = torch.randn(batch, *latents, generator=rng)
    return x, torch.randn(batch, 5, config.cond_channels, generator=rng)


class OnOneDevice(TorchDispatchMode):
    """Refuses what stops a recording: a tensor of the host's, or a value that is read there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs or {}, out)):
            assert not isinstance(leaf, Tensor) or leaf.is_meta, f"{func} touches the host"
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        ), func
        return out


def without_values(network: nn.Module) -> nn.Module:
    """A network on the meta device, where every look at a value fails; buffers of any kind too."""
    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to("meta")
    return network


@pytest.mark.parametrize("repeats", [1, 300])
@pytest.mark.parametrize("compute", ["a16", "a8"])
@pytest.mark.parametrize("name", ["table", "int8", "embedded", "trellis"])
def test_a_step_touches_no_host(
    packed_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, compute: str,
    repeats: int,
) -> None:  # fmt: skip
    """The GPU's form of every network, as it runs where the Triton operators serve it."""
    monkeypatch.setattr(cpu, "available", lambda: False)
    network: Any = load_packed_dit(packed_files[name], compute=compute)
    if name != "trellis":
        fused = network_of(network.config, Execution("cuda", torch.float16, path="triton"))
        assert isinstance(fused, GpuDiT)
        fused._modules = network._modules
        network = fused
    guidance = torch.tensor([5.0]) if name == "embedded" else None
    x, cond = (value.half().to("meta") for value in inputs(network))
    t = evaluation_times(sampler_of(packed_files[name]))[0]
    eager = network.step_modulation(torch.tensor([t], dtype=torch.float64), guidance)
    monkeypatch.setattr(dispatch, "_on_gpu", lambda layer, layout, x: True)
    step = network.velocity if isinstance(network, GpuDiT) else network
    without_values(network.half())
    field = "vector" if name == "int8" else "rows"
    when = StepModulation(**{field: getattr(eager, field).to("meta")})
    cond = cond[:, :1] if repeats > 1 else cond
    with torch.inference_mode():
        step(x, when, Condition(cond, repeats))  # what is made once may come from the host
        with OnOneDevice():
            out = step(x, when, Condition(cond, repeats))
    assert out.shape == x.shape


def test_the_guard_sees_what_a_recording_would_not_survive() -> None:
    value = torch.zeros(3, device="meta")
    with OnOneDevice():
        assert (value + 1).is_meta
        for host in (
            lambda: value + torch.tensor([1.0]),
            lambda: torch.arange(3).to("meta"),
            lambda: bool(value.any()),
            lambda: value.nonzero(),
        ):
            with pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
                host()


@pytest.mark.parametrize(
    ("name", "one_batch"),
    [("table", False), ("table", True), ("int8", False), ("embedded", False), ("trellis", False)],
)
def test_a_recording_serves_every_step(
    packed_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, one_batch: bool
) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(cuda_graph, "Recording", Traced)
    network = load_packed_dit(packed_files[name])
    x, cond = inputs(network)
    sampler = sampler_of(packed_files[name])
    expected = denoise(network, sampler, cond, x, one_batch=one_batch)
    graphs = GraphedNetwork(network)
    found = denoise(graphs, sampler, cond, x, one_batch=one_batch)
    assert torch.equal(found, expected)
    assert len(graphs._recordings) == (1 if one_batch or name == "embedded" else 2)
    recordings = list(graphs._recordings.values())
    addresses = [[b.data_ptr() for b in recording.inputs] for recording in recordings]
    again = denoise(graphs, sampler, 2 * cond, x + 1, one_batch=one_batch)
    assert torch.equal(again, denoise(network, sampler, 2 * cond, x + 1, one_batch=one_batch))
    assert list(graphs._recordings.values()) == recordings  # another picture, the same graphs
    assert addresses == [[b.data_ptr() for b in recording.inputs] for recording in recordings]


def test_other_shapes_are_recorded_anew(
    packed_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(cuda_graph, "Recording", Traced)
    network = load_packed_dit(packed_files["table"])
    graphs = GraphedNetwork(network)
    x, cond = inputs(network)
    when = network.step_modulation(torch.zeros(1))
    for count, (tokens, repeats) in enumerate([(cond, 1), (cond[:, :1], 5), (cond[:, :1], 6)], 1):
        for _ in range(2):
            found = graphs(x, when, Condition(tokens, repeats))
            assert len(graphs._recordings) == count
        # One token for five or for six is the same shape and other arithmetic.
        assert torch.equal(found, network(x, when, Condition(tokens, repeats)))


def test_results_outlive_the_next_replay(
    packed_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(cuda_graph, "Recording", Traced)
    network = load_packed_dit(packed_files["table"])
    x, cond = inputs(network)
    sampler = sampler_of(packed_files["table"])
    velocity = velocity_of(GraphedNetwork(network), sampler, cond)
    times = evaluation_times(sampler)
    first = velocity(x, times[0])
    kept = first.clone()
    assert not torch.equal(velocity(x, times[1]), kept)
    assert torch.equal(first, kept)


def test_what_cannot_be_recorded_is_not(packed_files: dict[str, Path]) -> None:
    """A time in place of its row: the tables are searched on the host."""
    network = load_packed_dit(packed_files["table"])
    x, cond = inputs(network)
    with pytest.raises(RuntimeError), torch.inference_mode():
        Traced(lambda x, t, cond: network(x, t, cond), (x, torch.zeros(1), cond), None)


def test_without_a_gpu_it_is_one_plain_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="the device is cpu, and only CUDA GPUs"):
        cuda_graph.expect_gpu("cpu")
    picture = tmp_path / "a.png"
    picture.write_bytes(b"")
    words = [str(picture), "-o", str(tmp_path), "--device", "cpu", "--cuda-graphs"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "furniture", *words])
    assert caught.value.code == 2
    assert "only CUDA GPUs have graphs" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("one_batch", [False, True])
@pytest.mark.parametrize("compute", ["a16", "a8"])
@pytest.mark.parametrize("name", ["table", "int8", "embedded", "trellis"])
def test_on_a_gpu_a_run_is_the_same_to_the_bit(
    packed_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, compute: str,
    one_batch: bool,
) -> None:  # fmt: skip
    monkeypatch.setenv("VITAPACK_ATTENTION", "sdpa")  # which graphs have in any case
    attention._sage.cache_clear()
    network = load_packed_dit(packed_files[name], device="cuda", compute=compute)
    x, cond = inputs(network)
    sampler = sampler_of(packed_files[name])
    graphs = GraphedNetwork(network)
    for scale in (1, 2):
        given = scale * cond, scale * x
        expected = denoise(network, sampler, *given, one_batch=one_batch)
        assert torch.equal(denoise(graphs, sampler, *given, one_batch=one_batch), expected)
    assert len(graphs._recordings) == (1 if one_batch or name == "embedded" else 2)
    attention._sage.cache_clear()


@pytest.mark.gpu
def test_on_a_gpu_passes_share_memory_and_give_it_back(packed_files: dict[str, Path]) -> None:
    network = load_packed_dit(packed_files["table"], device="cuda")
    x, cond = inputs(network)
    sampler = sampler_of(packed_files["table"])
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    graphs = GraphedNetwork(network)
    denoise(graphs, sampler, cond, x)
    first, second = graphs._recordings.values()
    assert first.graph.pool() == second.graph.pool()
    del first, second, graphs
    gc.collect()
    torch.cuda.empty_cache()
    # cuBLAS keeps a workspace for the stream on which graphs are recorded.
    assert torch.cuda.memory_reserved() - before <= 64 << 20


@pytest.mark.gpu
def test_on_a_gpu_a_look_at_a_value_is_one_plain_line() -> None:
    """In a process of its own: what follows a broken recording is CUDA's affair."""
    code = (
        "import torch; from vitapack.runtime.engines.cuda_graph import Recording\n"
        "x = torch.randn(4, device='cuda')\n"
        "try: Recording(lambda x: x * x.sum().item(), (x,), None)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "assert torch.cuda.current_stream() == torch.cuda.default_stream()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("UserError this model's step cannot be recorded as a CUDA graph")
    assert done.stdout.count("\n") == 1


@pytest.mark.gpu
def test_on_a_gpu_a_kernel_past_torch_s_stream_is_noticed() -> None:
    """As SageAttention 2 launches its own: on the default stream, whatever torch's is."""
    x = torch.randn(4, device="cuda")
    elsewhere = torch.zeros(4, device="cuda")

    def call(x: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            return elsewhere + 0
        return x + 1

    with pytest.raises(UserError, match="differs from the step itself"):
        Recording(call, (x,), None)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_on_a_gpu_phases_are_measured_and_lean_gives_back(
    tmp_path: Path, cuda_graphs: bool
) -> None:
    """From a picture to a mesh, twice: the graphs go with the network and come again."""
    folder = tiny_released("hunyuan3d-2mini", tmp_path / "model")
    checkpoint, path = open_checkpoint(folder), tmp_path / "packed.safetensors"
    compress(checkpoint, resolve_plan("int8", checkpoint), path, steps=[3], embed=True)
    pipeline = Pipeline.from_packed(path, "cuda", memory="lean", cuda_graphs=cuda_graphs)
    pipeline.decoder.resolution = 16
    meshes = [pipeline(chair(), seed=1) for _ in range(2)]
    assert (meshes[0].vertices == meshes[1].vertices).all()
    assert pipeline._graphs is None
    for phase, found in pipeline.bytes.items():
        assert 0 < found["peak"] <= found["predicted"] + (8 << 20), phase
        assert found["peak"] <= found["reserved"], phase
