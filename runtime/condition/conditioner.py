"""Turns an image into condition tokens: frames the object as each family does, then runs DINOv2.

    condition = ImageConditioner(Lazy(...), prepare=hunyuan_framing(512, 518, 0.15))
    tokens = condition(Image.open("chair.png"))      # (1, N, D); the null condition is zeros

Uses pillow and torch for operations that the published pipelines do with OpenCV and torchvision;
pixels differ by a grey level or two.
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

    `component`: the image encoder that the pipeline loads for its phase, None if it is in memory
    from the start. `views`: whether several views of one object are accepted. `imports`: packages
    that loading the encoder imports, for memory prediction.
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
        """Condition tokens (1, N, D) float32 on the CPU; `name` stands for the image in messages.

        Reports the phase "condition". Raises: UserError for an image without an object, Cancelled
        by the `control`.
        """


class ImageConditioner(Conditioner):
    """Runs a DINOv2 on one image, or on each of several views."""

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
        """`registers`: keep the encoder's register tokens instead of dropping them. `extra`
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
            raise UserError(f"{name}: this model takes one image, not {len(image)} views")
        if odd := [view for view in image if view not in VIEWS]:
            raise UserError(f"{name}: no view {odd[0]!r}; choose among {', '.join(VIEWS)}")
        if not image:
            raise UserError(f"{name}: no image was given")
        tokens: list[Tensor] = []
        for index, view in enumerate(VIEWS):
            if view in image:
                control.step("condition", len(tokens), len(image))
                label = name if len(image) == 1 else f"{name}, {view}"
                encoded = self._encode(image[view], label, control)
                if self.views:
                    encoded = encoded + view_embedding(index, encoded.shape[-1])
                tokens.append(encoded)
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
    """Embedding (channels,) of a view's index, [sin | cos], added to the view's tokens."""
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
    """A lazily loaded DINOv2 from the tensors of `source`, under any prefix; bits 8 packs its
    linears.

    `settings`: the encoder's configuration in the checkpoint, None if it has none. `plain_norm`:
    replace the last LayerNorm by one without affine, eps 1e-5, as in TRELLIS. `pixels`: side of the
    framed image, by default that of the position table.

    Raises FormatError if the tensors are not a DINOv2's.
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
