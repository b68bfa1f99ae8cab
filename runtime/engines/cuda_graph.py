"""A network called through CUDA graphs: recorded at the first call of a shape, then replayed.

    network = GraphedNetwork(load_dit("model.safetensors", torch.float16, "cuda"))
    network(x, t, cond)

A call of a packed DiT is hundreds of kernels, each launched from Python; a graph launches them all
at once. A replay reads its inputs at fixed addresses: latents, condition tokens and the modulation
input of the time (a table's row number, or a vector) are copied there first. So one graph serves
all steps. One graph per step would save the tables' look-up, a small copy per block, but needs a
recording and the driver's memory for each step.

Guided steps make two recordings: the pass with the condition tokens and the one with a single
token. They share one memory pool, which lives as long as the GraphedNetwork and is about as large
as the activations of the larger pass. Compiled, not timed: never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vitapack.runtime.errors import UserError
from vitapack.runtime.format.architecture import Architecture
from vitapack.runtime.format.container import one_line
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.modulation import StepModulation
from vitapack.runtime.networks.network import Network

WARM_UPS = 3  # as in torch's notes on CUDA graphs; the first one compiles Triton's kernels
# Largest relative error of a replay. It runs the same kernels as the eager call; only cuBLAS may
# split a sum differently.
CLOSE = 1e-2


def expect_gpu(device: str) -> None:
    """Raises UserError if the device has no CUDA graphs."""
    if torch.device(device).type != "cuda":
        raise UserError(
            f"--cuda-graphs: the device is {device}, and only CUDA GPUs have graphs; leave it out"
        )


class GraphedNetwork(nn.Module):
    """Wraps a network on a GPU and is called like it; without gradients."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self._recordings: dict[tuple[object, ...], Recording] = {}

    @property
    def config(self) -> Architecture:
        return self.network.config

    def step_modulation(
        self, t: Tensor | StepModulation, guidance: Tensor | None = None
    ) -> StepModulation:
        return self.network.step_modulation(t, guidance)

    @torch.inference_mode()
    def forward(
        self,
        x: Tensor,
        t: Tensor | StepModulation,
        cond: Tensor | Condition,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """As the network's forward; records each new combination of shapes, dtypes and repeats.

        Raises UserError if the recording fails.
        """
        step, condition = self.step_modulation(t, guidance), Condition.of(cond)
        field = "vector" if step.rows is None else "rows"
        inputs = (x, condition.tokens, getattr(step, field))
        repeats = condition.repeats
        key = (repeats, field, *((value.shape, value.dtype) for value in inputs))
        if key not in self._recordings:

            def call(x: Tensor, tokens: Tensor, value: Tensor) -> Tensor:
                step = StepModulation(**{field: value})
                return self.network(x, step, Condition(tokens, repeats))

            other = next(iter(self._recordings.values()), None)
            self._recordings[key] = Recording(call, inputs, other)
        return self._recordings[key](*inputs)


class Recording:
    """One call as a CUDA graph with its own input buffers."""

    stream: torch.cuda.Stream

    def __init__(
        self, call: Callable[..., Tensor], inputs: Sequence[Tensor], other: Recording | None
    ) -> None:
        """Captures call(*inputs), which must not synchronise with the host or copy from it.

        Shares the memory pool and the stream of `other`, if given. Raises UserError if recording
        fails or a replay differs from the call.
        """
        self.inputs = [value.clone() for value in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(inputs[0].device):
            current = torch.cuda.current_stream()
            # One stream for all: a pool reuses memory only on the stream that allocated it, and
            # each stream has a cuBLAS workspace of 8 MiB, 32 on sm_90.
            self.stream = torch.cuda.Stream() if other is None else other.stream
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UPS):
                    expected = call(*self.inputs)
                try:
                    # Only errors of this thread count: others may allocate meanwhile.
                    with torch.cuda.graph(
                        self.graph,
                        pool=None if other is None else other.graph.pool(),
                        stream=self.stream,
                        capture_error_mode="thread_local",
                    ):
                        self.output = call(*self.inputs)
                except RuntimeError as error:
                    raise UserError(
                        f"this model's step cannot be recorded as a CUDA graph ({one_line(error)});"
                        " run it without --cuda-graphs"
                    ) from error
            current.wait_stream(self.stream)
        # Kernels launched outside torch's stream are missing from the graph without an error:
        # replays with SageAttention were 80 % off (its pull request 371; `attention.attention`
        # avoids it).
        difference = (self(*inputs) - expected).float().norm()
        far = difference > CLOSE * expected.float().norm()
        if far or (expected.isfinite().all() and not difference.isfinite()):
            raise UserError(
                "a CUDA graph of this model's step differs from the step itself: a kernel in it "
                "was not recorded; run it without --cuda-graphs"
            )

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Replays the call on other inputs; returns a new tensor."""
        for buffer, value in zip(self.inputs, inputs, strict=True):
            buffer.copy_(value)
        self.graph.replay()
        return self.output.clone()
