"""The base class of all networks: calling, pruning, memory prediction."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitapack.runtime.format.layermap import BLOCK_FIELDS
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.modulation import StepModulation, TimeNodes

Net = TypeVar("Net", bound="Network")


@dataclass(frozen=True)
class CallShape:
    """Sizes and execution of one network evaluation, from which its memory is predicted."""

    latents: tuple[int, ...]  # without the batch dimension
    cond_tokens: int
    batch: int
    dtype: torch.dtype
    compute: str = "a16"
    packed: bool = False  # Triton path, which may expand packed weights to floats or int8


class Network(nn.Module):
    """A velocity network: network(x, t, cond, guidance=None) has x's shape.

    Subclasses implement `evaluate` and keep blocks in a ModuleDict per block kind, under the names
    of `BLOCK_FIELDS` and keyed by original index.
    """

    time_in: nn.Module
    guidance_in: nn.Module  # only in networks that embed their guidance

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def step_modulation(
        self, t: Tensor | StepModulation, guidance: Tensor | None = None
    ) -> StepModulation:
        """The step's modulation input; a StepModulation is returned unchanged.

        t (B,) or (1,), guidance (B,) or None. With modulation tables this reads t on the host.
        Raises ValueError if guidance is missing, or given to a network without guidance embedding;
        MissingTime if the tables lack a time.
        """
        if isinstance(t, StepModulation):
            return t
        embeds = self.config.embeds_guidance
        if embeds and guidance is None:
            raise ValueError("this model embeds its guidance: pass guidance as a (B,) tensor")
        if guidance is not None and not embeds:
            raise ValueError("this model does not embed its guidance: leave guidance out")
        if isinstance(self.time_in, TimeNodes):
            return StepModulation(rows=self.time_in(t, guidance))
        vector = self.time_in(t)
        if embeds:
            vector = vector + self.guidance_in(guidance)
        return StepModulation(vector=F.silu(vector))

    def forward(
        self,
        x: Tensor,
        t: Tensor | StepModulation,
        cond: Tensor | Condition,
        guidance: Tensor | None = None,
    ) -> Tensor:
        return self.evaluate(x, self.step_modulation(t, guidance), Condition.of(cond))

    def evaluate(self, x: Tensor, step: StepModulation, condition: Condition) -> Tensor:
        """The velocity at a step's modulation input, with x's shape."""
        raise NotImplementedError

    def without(self: Net, *blocks: tuple[str, int]) -> Net:
        """The same network, weights shared, without the given (kind, original index)."""
        removed, pruned = set(blocks), copy.copy(self)
        pruned._modules = dict(self._modules)
        kept = {
            kind: tuple(index for index in indices if (kind, index) not in removed)
            for kind, indices in self.config.blocks_by_kind().items()
        }
        for kind, indices in kept.items():
            field = BLOCK_FIELDS[kind]
            ours = getattr(self, field)
            pruned._modules[field] = nn.ModuleDict({str(i): ours[str(i)] for i in indices})
        pruned.config = self.config.with_blocks(kept)
        return pruned

    @classmethod
    def step_bytes(cls, config: Any, call: CallShape) -> int:
        """Predicted working memory of one network evaluation, in bytes, without weights.

        Adds up the tensors that are alive at the peak of `forward`; tests compare with the memory
        of running networks. Attention is a fused kernel everywhere, so nothing grows with
        the square of the token count.
        """
        raise NotImplementedError

    @classmethod
    def run_bytes(cls, config: Any, call: CallShape) -> int:
        """Predicted working memory of sampling, in bytes; guidance in one batch or two passes."""
        return cls.step_bytes(config, replace(call, batch=1) if config.embeds_guidance else call)
