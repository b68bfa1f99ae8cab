"""Times the same 2mini forward pass in other libraries, each interleaved with our W8A8.

The table names libraries that are not installed instead of omitting them. All quantize the linears
of the blocks.
"""

from __future__ import annotations

import ctypes
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cpu.mini import float32_output, inputs, relative
from benchmarks.timing import interleaved
from vitapack.runtime.pipeline.load import load_dit

LATENTS = 512
NEEDS = {
    "torchao": ("torchao",),
    "quanto": ("optimum.quanto",),
    "ggml": ("ggml",),
    "openvino": ("openvino",),
    "openvino-int8": ("openvino", "nncf"),
}
PEERS = (
    "torch-fp32",
    "torch-bf16-compiled",
    "torchao-int8-weights",
    "torchao-int8-dynamic",
    "torchao-int4-weights",
    "quanto-int8",
    "quanto-int4",
    "ggml-q8_0",
    "ggml-q4_k",
    "openvino-bf16",
    "openvino-int8",
)


def measure(name: str, work: Path, rounds: int) -> dict[str, Any]:
    """Interleaved seconds of a peer and our W8A8, and its error; or the reason it did not run."""
    if name not in PEERS:
        raise SystemExit(f"no peer {name!r}: choose from {', '.join(PEERS)}")
    needs = NEEDS.get(name, NEEDS.get(name.split("-")[0], ()))
    if missing := [package for package in needs if _missing(package)]:
        return {"status": f"{' and '.join(missing)} not installed"}
    torch._dynamo.reset()
    args = inputs(LATENTS)
    with torch.no_grad():
        ours = load_dit(work / "int8.safetensors", compute="a8")
        started = time.perf_counter()
        try:
            peer = BUILD[name.split("-")[0]](name, work, args)
            first = peer()
        except Exception as error:  # a peer's failure is a result, with its reason
            return {"status": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:100]}"}
        built = time.perf_counter() - started
        seconds = interleaved({"peer": peer, "ours": lambda: ours(*args)}, rounds, warm=False)
        exact = float32_output(work, LATENTS)
        return {
            "seconds": seconds,
            "n_runs": rounds,
            "build_and_first_seconds": built,
            "error": relative(first, exact),
        }


def _missing(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:
        return True


def _half(work: Path) -> nn.Module:
    return load_dit(work / "mini", dtype=torch.bfloat16)


def _called(module: Any, args: tuple[torch.Tensor, ...], dtype: torch.dtype) -> Callable[[], Any]:
    x, t, cond = args
    return lambda: module(x.to(dtype), t, cond.to(dtype))


def _torch(name: str, work: Path, args: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    if name == "torch-fp32":
        return _called(load_dit(work / "mini"), args, torch.float32)
    return _called(torch.compile(_half(work)), args, torch.bfloat16)


def _block_linears(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "_blocks." in name and name[-4:] != ".lin"


def _torchao(name: str, work: Path, args: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    module = _half(work)
    config: Any
    if name == "torchao-int8-weights":
        config = Int8WeightOnlyConfig()
    elif name == "torchao-int8-dynamic":
        config = Int8DynamicActivationInt8WeightConfig()
    else:
        config = PrototypeInt4WeightOnlyConfig(group_size=64)  # the one with a CPU kernel
    quantize_(module, config, filter_fn=_block_linears)
    return _called(module, args, torch.bfloat16)


def _quanto(name: str, work: Path, args: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    from optimum.quanto import freeze, qint4, qint8, quantize

    module = _half(work)
    quantize(
        module, weights=qint8 if name == "quanto-int8" else qint4, include=["*_blocks.*"],
        exclude=["*_mod.lin", "*modulation.lin"],
    )  # fmt: skip
    freeze(module)
    return _called(module, args, torch.bfloat16)


class GgmlLinear(nn.Module):
    """A linear on a weight in one of GGUF's formats, by ggml's own CPU kernel (ggml-python)."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        import ggml

        super().__init__()
        self.ggml, self.kind = ggml, getattr(ggml, f"GGML_TYPE_{kind.upper()}")
        (self.n, self.k), self.bias = linear.weight.shape, linear.bias
        weight = linear.weight.detach().float().contiguous()
        self.codes = torch.empty(ggml.ggml_row_size(self.kind, self.k) * self.n, dtype=torch.uint8)
        rows = ctypes.cast(weight.data_ptr(), ctypes.POINTER(ctypes.c_float))
        ggml.ggml_quantize_chunk(
            self.kind, rows, ctypes.c_void_p(self.codes.data_ptr()), 0, self.n, self.k, None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ggml, rows = self.ggml, x.reshape(-1, self.k).contiguous()
        out = torch.empty(len(rows), self.n)
        context = ggml.ggml_init(ggml.ggml_init_params(1 << 20, None, True))
        weight = ggml.ggml_new_tensor_2d(context, self.kind, self.k, self.n)
        given = ggml.ggml_new_tensor_2d(context, ggml.GGML_TYPE_F32, self.k, len(rows))
        product = ggml.ggml_mul_mat(context, weight, given)
        for tensor, memory in ((weight, self.codes), (given, rows), (product, out)):
            tensor.contents.data = memory.data_ptr()
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, product)
        plan = ggml.ggml_graph_plan(graph, torch.get_num_threads(), None)
        work = torch.empty(plan.work_size, dtype=torch.uint8)
        plan.work_data = ctypes.cast(work.data_ptr(), ctypes.POINTER(ctypes.c_uint8))
        status = ggml.ggml_graph_compute(graph, ctypes.byref(plan))
        ggml.ggml_free(context)
        if status:
            raise RuntimeError(f"ggml gave status {status}")
        return (out if self.bias is None else out.add_(self.bias)).view(*x.shape[:-1], self.n)


def _ggml(name: str, work: Path, args: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    module: Any = load_dit(work / "mini")
    for place, linear in list(module.named_modules()):
        if _block_linears(linear, place):
            module.set_submodule(place, GgmlLinear(linear, name.split("-")[1]))
    return _called(module, args, torch.float32)


def _openvino(name: str, work: Path, args: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    import openvino

    hints: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    if name == "openvino-int8":
        hints["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "64"
    compiled = openvino.compile_model(_openvino_model(name, work, args), "CPU", hints)
    values = [part.numpy() for part in args]
    return lambda: torch.from_numpy(compiled(values)[0])


def _openvino_model(name: str, work: Path, args: tuple[torch.Tensor, ...]) -> Path:
    """OpenVINO's file of the model, converted once, since that takes minutes."""
    import openvino

    place = work / f"{name}.xml"
    if place.exists():
        return place

    class Plain(nn.Module):  # without the optional argument, for the tracer
        def __init__(self, dit: nn.Module) -> None:
            super().__init__()
            self.dit = dit

        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
            return self.dit(x, t, cond)

    with torch.no_grad():
        model = openvino.convert_model(Plain(load_dit(work / "mini")), example_input=args)
    if name == "openvino-int8":
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(model, place, compress_to_fp16=False)
    return place


BUILD = {
    "torch": _torch,
    "torchao": _torchao,
    "quanto": _quanto,
    "ggml": _ggml,
    "openvino": _openvino,
}
