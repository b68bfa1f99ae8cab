"""A picture to condition tokens: the object set on its ground, then DINOv2, as each family does it.

    condition = ImageConditioner(Lazy(...), prepare=hunyuan_framing(512, 518, 0.15))
    tokens = condition(Image.open("chair.png"))      # (1, N, D); the unconditional ones are zeros

What the published pipelines do with OpenCV and torchvision is done with pillow and torch here; a
pixel differs by a grey level or two.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vitapack.runtime.choices import VIEWS
from vitapack.runtime.condition.dinov2 import MEAN, STD, config_of, is_packable, load
from vitapack.runtime.condition.recipes import Prepare
from vitapack.runtime.engines.choose import Execution
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.loading.fill import filled_bytes
from vitapack.runtime.loading.lazy import Lazy
from vitapack.runtime.loading.source import Source
from vitapack.runtime.networks.cancellation import cancellable
from vitapack.runtime.progress import Control

Picture = Image.Image | Mapping[str, Image.Image]


class Conditioner(ABC):
    """First phase: an image, or views of one object, to condition tokens.

    `component` is the image encoder that the pipeline loads for its phase, None for one that is in
    memory from the start. `views`: several views of one object are accepted. `imports`: packages
    that the encoder imports when it is loaded, for memory prediction.
    """

    component: Lazy[nn.Module] | None = None
    views: bool = False
    imports: tuple[str, ...] = ()

    @property
    def working_bytes(self) -> int:
        """Peak memory of a call, excluding weights."""
        return 0

    @abstractmethod
    def __call__(
        self, image: Picture, name: str = "image", control: Control | None = None
    ) -> Tensor:
        """Condition tokens (1, N, D) float32 on the CPU; `name` is the image's in messages.

        Reports the phase "condition". Raises: UserError for an image without an object, Cancelled
        by the `control`.
        """


class ImageConditioner(Conditioner):
    """A DINOv2 on one image, or on each of several views."""

    imports = ("transformers",)

    def __init__(
        self,
        component: Lazy[nn.Module],
        prepare: Prepare,
        *,
        registers: bool = False,
        views: bool = False,
        extra: Tensor | None = None,
    ) -> None:
        """`registers`: keep the encoder's register tokens, which are dropped by default. `extra`
        (1, n, D): tokens appended to the image's."""
        self.component: Lazy[nn.Module] = component
        self.prepare, self.registers = prepare, registers
        self.views, self.extra = views, extra

    @property
    def working_bytes(self) -> int:
        return self.component.working_bytes

    @torch.inference_mode()
    def __call__(
        self, image: Picture, name: str = "image", control: Control | None = None
    ) -> Tensor:
        control = control or Control()
        if not isinstance(image, Mapping):
            image = {VIEWS[0]: image}
        elif not self.views and len(image) != 1:
            raise UserError(f"{name}: this model takes one picture, not {len(image)} views")
        if odd := [view for view in image if view not in VIEWS]:
            raise UserError(f"{name}: no view {odd[0]!r}; choose among {', '.join(VIEWS)}")
        if not image:
            raise UserError(f"{name}: no picture was given")
        tokens: list[Tensor] = []
        for index, view in enumerate(VIEWS):
            if view in image:
                control.step("condition", len(tokens), len(image))
                label = name if len(image) == 1 else f"{name}, {view}"
                found = self._encode(image[view], label, control)
                tokens.append(
                    found + view_embedding(index, found.shape[-1]) if self.views else found
                )
        control.report("condition", len(image), len(image))
        if self.extra is not None:
            tokens.append(self.extra)
        return torch.cat(tokens, dim=1)

    def _encode(self, image: Image.Image, name: str, control: Control) -> Tensor:
        pixels = self.prepare(image, name)
        mean, std = torch.tensor([MEAN, STD], dtype=torch.float32)[..., None, None]
        encoder = self.component()
        device = next(encoder.parameters()).device
        with cancellable(encoder, control):
            tokens = encoder(((pixels - mean) / std)[None].to(device)).last_hidden_state
        registers = getattr(encoder.config, "num_register_tokens", 0)
        if registers and not self.registers:
            tokens = torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], dim=1)
        return tokens.float().cpu()


def view_embedding(index: int, channels: int) -> Tensor:
    """(channels,) [sin | cos] of a view's index, which tells the views of a model apart."""
    half = channels // 2
    angles = index * torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(1e4) / half))
    return torch.cat([angles.sin(), angles.cos()]).float()


def encoder_part(
    source: Source,
    execution: Execution,
    bits: int,
    settings: Mapping[str, Any] | None = None,
    *,
    plain_norm: bool = False,
    pixels: int = 0,
) -> Lazy[nn.Module]:
    """The DINOv2 whose tensors `source` holds, below whatever prefix; bits 8 packs its linears.

    `settings`: the checkpoint's own configuration of it, None where it has none. `plain_norm`: a
    LayerNorm without affine, eps 1e-5, in place of the last one, as TRELLIS has it. `pixels`: a
    side of the pictures, by default those that the position table is for.
    FormatError where the tensors are not those of a DINOv2.
    """
    tail = "embeddings.cls_token"
    starts = [name.removesuffix(tail) for name in source.shapes if name.endswith(tail)]
    if len(starts) != 1:
        raise FormatError(f"{source.label}: the image encoder should be a DINOv2; found no {tail}")
    inner = source.below(starts[0])
    config = config_of(inner.unpacked_shapes(), settings or {}, source.label)

    def loaded() -> nn.Module:
        network = load(inner, config, execution, bits)
        if plain_norm:
            network.layernorm = nn.LayerNorm(config.hidden, eps=1e-5, elementwise_affine=False)
        return network

    packed = bits == 8 or bool(inner.layouts)
    working = config.working_bytes(
        pixels or config.places * config.patch,
        execution.dtype,
        expands=packed and not execution.on_cpu,
    )
    return Lazy(
        loaded, filled_bytes(inner, execution.dtype, is_packable if bits == 8 else None), working
    )
