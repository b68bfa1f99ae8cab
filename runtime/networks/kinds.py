"""All kinds of networks."""

from __future__ import annotations

from vitapack.runtime.networks.dit import DiT
from vitapack.runtime.networks.flow import FlowTransformer

Network = DiT | FlowTransformer  # what a packed file or an original checkpoint holds
