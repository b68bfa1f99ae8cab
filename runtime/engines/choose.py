"""Decides once how networks compute: device, dtype, arithmetic and executable form.

    execution = choose("auto", "a8")         # the kernels log the choice
    network = network_of(config, execution)  # on the current device, not yet filled

Everything that loads, predicts or measures a network takes the `Execution` from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vitapack.kernels.linear.support import cpu_engine, gpu_kernels
from vitapack.runtime.choices import COMPUTES, check_choice
from vitapack.runtime.engines.device import chosen_device
from vitapack.runtime.format.architecture import Architecture, DiTConfig, FlowConfig
from vitapack.runtime.networks.dit import DiT
from vitapack.runtime.networks.flow import FlowTransformer
from vitapack.runtime.networks.network import CallShape, Network


@dataclass(frozen=True)
class Execution:
    """How a network computes.

    path: "plain" (readable PyTorch), "cpu-int8" (the int8 engine) or "triton" (GPU kernels for
    packed linears).
    """

    device: str  # "cpu", "cuda" or "cuda:N"
    dtype: torch.dtype  # of activations and of weights that are not packed
    compute: str = "a16"
    path: str = "plain"

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    def call(self, latents: tuple[int, ...], cond_tokens: int, batch: int) -> CallShape:
        """Sizes and execution of one network evaluation, for memory predictions."""
        packed = self.path == "triton"
        return CallShape(latents, cond_tokens, batch, self.dtype, self.compute, packed)


PLAIN = Execution("cpu", torch.float32)

# The readable form of each architecture, and its fused forms by path and compute mode.
READABLE: Mapping[type[Architecture], type[Network]] = {DiTConfig: DiT, FlowConfig: FlowTransformer}


def fused_forms(execution: Execution) -> Mapping[type[Architecture], type[Network]]:
    """Networks with fused blocks in this execution, by architecture; others run unfused."""
    if execution.path == "triton":
        from vitapack.runtime.engines.gpu_dit import GpuDiT

        return {DiTConfig: GpuDiT}
    if execution.path == "cpu-int8" and execution.compute == "a8":
        from vitapack.runtime.engines.cpu_dit import CpuDiT
        from vitapack.runtime.engines.cpu_flow import CpuFlow

        return {DiTConfig: CpuDiT, FlowConfig: CpuFlow}
    return {}


def choose(
    device: str | torch.device = "auto",
    compute: str = "a16",
    *,
    dtype: torch.dtype | None = None,
    packed: bool = True,
    present: bool = True,
) -> Execution:
    """Chooses the execution on a device.

    dtype: float32 on CPUs and float16 elsewhere by default. packed: whether the linears are packed
    (an original's are not). present: False for predictions about a device that this machine may
    lack. Raises UserError for an unknown or missing device, or an unknown compute mode.
    """
    check_choice("compute mode", compute, COMPUTES)
    name = str(device)
    name = chosen_device(name) if present else name
    dtype = dtype or (torch.float32 if name == "cpu" else torch.float16)
    path = "plain"
    if packed and name == "cpu":
        path = "cpu-int8" if cpu_engine(f"int8 {compute} linears") else "plain"
    elif packed and name != "meta":
        supported = not present or gpu_kernels("packed linears", torch.device(name))
        path = "triton" if supported else "plain"
    return Execution(name, dtype, compute, path)


def form_of(config: Architecture, execution: Execution = PLAIN) -> type[Network]:
    """The class for an architecture: its fused form if there is one, else its readable form."""
    return fused_forms(execution).get(type(config), READABLE[type(config)])


def network_of(config: Any, execution: Execution = PLAIN) -> Any:
    """Makes the network of an architecture, not yet filled, on torch's current device."""
    return form_of(config, execution)(config)
