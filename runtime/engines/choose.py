"""Which executable form of a network runs: readable, CPU engine or Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitapack.runtime.format.architecture import BLOCK_KINDS, FLOW
from vitapack.runtime.format.header import PackedHeader
from vitapack.runtime.format.layermap import BLOCK_FIELDS

if TYPE_CHECKING:
    from vitapack.runtime.networks.dit import DiTConfig
    from vitapack.runtime.networks.flow import FlowConfig
    from vitapack.runtime.networks.kinds import Network


def dit_config(header: PackedHeader) -> DiTConfig | FlowConfig:
    from vitapack.runtime.networks.dit import DiTConfig
    from vitapack.runtime.networks.flow import FlowConfig
    from vitapack.runtime.networks.modulation import TimeEmbedding

    fields = {name: value for name, value in header.network.items() if name != "kind"}
    fields["time"] = TimeEmbedding(**fields["time"])
    for kind in BLOCK_KINDS[header.network["kind"]]:
        fields[BLOCK_FIELDS[kind]] = tuple(fields[BLOCK_FIELDS[kind]])
    return FlowConfig(**fields) if header.network["kind"] == FLOW else DiTConfig(**fields)


def network_of(
    config: DiTConfig | FlowConfig, device_type: str = "cpu", compute: str = "a16"
) -> Network:
    """The network with these hyper-parameters, not yet filled; in its fused form where there is
    one, for "cuda" and for int8 activations on a CPU."""
    from vitapack.runtime.networks.dit import DiT, DiTConfig
    from vitapack.runtime.networks.flow import FlowTransformer

    engine = device_type == "cpu" and compute == "a8"
    if not isinstance(config, DiTConfig):
        if engine:
            from vitapack.runtime.engines.cpu_flow import EngineFlow

            return EngineFlow(config)
        return FlowTransformer(config)
    if device_type == "cuda":
        from vitapack.runtime.engines.gpu_dit import GpuDiT

        return GpuDiT(config)
    if engine:
        from vitapack.runtime.engines.cpu_dit import EngineDiT

        return EngineDiT(config)
    return DiT(config)
