"""Turns an image into a mesh: the pipeline of all three phases.

    pipeline = Pipeline.from_packed("model.safetensors")
    mesh = pipeline(Image.open("chair.png"), seed=0)

Phases: condition (image encoder), denoise (DiT under a sampler), decode (shape decoder, marching
cubes). Images are processed one at a time, each with noise of its own seed, so a mesh never depends
on other images of a batch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vitapack
from vitapack.runtime.choices import VIEWS
from vitapack.runtime.condition.conditioner import Conditioner, Picture
from vitapack.runtime.decode.decoders import Decoder
from vitapack.runtime.decode.mesh import Mesh, clean, surface_from_grid
from vitapack.runtime.engines.choose import Execution, choose, form_of
from vitapack.runtime.engines.cuda_graph import GraphedNetwork, expect_gpu
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.families.family import Family
from vitapack.runtime.families.open import BUNDLED, family_of, open_checkpoint
from vitapack.runtime.format.architecture import Architecture
from vitapack.runtime.format.header import read_header
from vitapack.runtime.format.reader import VERIFY_BELOW, verify
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.loading import packed
from vitapack.runtime.loading.checkpoint_files import is_packed
from vitapack.runtime.loading.lazy import Lazy
from vitapack.runtime.loading.memory import return_large_blocks
from vitapack.runtime.loading.source import packed_component
from vitapack.runtime.networks.network import Network
from vitapack.runtime.options import GenerateOptions, PipelineOptions, merged
from vitapack.runtime.pipeline.load import dit_of, expect_floats, original_of
from vitapack.runtime.pipeline.phases import PhaseMeter, peaks
from vitapack.runtime.pipeline.predict import base_bytes, imported_bytes, late_imported_bytes
from vitapack.runtime.pipeline.result import Generated
from vitapack.runtime.progress import Control
from vitapack.runtime.sampling.guidance import denoise

PHASES = ("condition", "denoise", "decode")


@dataclass(frozen=True)
class Origin:
    """The model that a pipeline runs."""

    family: str
    source: str  # path of the packed file or of the original's weights
    sha256: str  # of its contents
    variant: str = ""  # the released model's name


class Pipeline:
    """DiT, sampler defaults, conditioner and shape decoder of one model."""

    def __init__(
        self,
        dit: Network | Lazy[Network],
        sampler: SamplerDefaults,
        conditioner: Conditioner,
        decoder: Decoder,
        origin: Origin,
        options: PipelineOptions | None = None,
        step_bytes: Callable[[int, int], int] | None = None,
    ) -> None:
        """A `dit` passed as a `Lazy`, like the conditioner's and the decoder's component, is loaded
        when its phase starts (on GPUs one phase earlier where memory allows) and freed after it if
        the memory mode is "lean". `options`: the options it was opened with and an available device
        (default "cpu"). `step_bytes` predicts the working memory of one network evaluation from the
        number of views and the batch size. Raises UserError for CUDA graphs without a GPU."""
        options = options or PipelineOptions(device="cpu")
        device = options.device
        if options.cuda_graphs:
            expect_gpu(device)
        if options.memory == "lean":
            return_large_blocks()
        self._dit, self.sampler = dit, sampler
        self.conditioner, self.decoder = conditioner, decoder
        self.family, self.variant = origin.family, origin.variant
        self.source, self.source_sha256 = origin.source, origin.sha256
        self.memory, self.device, self.cuda_graphs = options.memory, device, options.cuda_graphs
        self._step_bytes = step_bytes
        self._graphs: GraphedNetwork | None = None
        self._ahead = torch.device(device).type == "cuda"  # on a CPU loads and phases share cores
        self._base = base_bytes(device, options.cuda_graphs)
        if device == "cpu":
            self._base += imported_bytes(conditioner.imports)
        self._turn = threading.Lock()
        self.seconds: dict[str, float] = {}  # of the last generation, by phase
        self.bytes: dict[str, dict[str, int | None]] = {}  # likewise, see PhaseMeter

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: a lock cannot be pickled."""
        return vars(self) | {"_turn": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_turn": threading.Lock()})

    @property
    def dit(self) -> Network:
        return self._dit() if isinstance(self._dit, Lazy) else self._dit

    @dit.setter
    def dit(self, network: Network) -> None:
        self._dit = network

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        options: PipelineOptions | None = None,
        **changes: Any,
    ) -> Pipeline:
        """Opens a packed file, an original checkpoint (folder or file) or a bundled model by name.

        `changes` are fields of the options, as in open(path, device="cuda", memory="lean").
        Raises UserError if "a8" or `parts` is given for an original, or a resolution for a model
        with a fixed grid.
        """
        options = merged(PipelineOptions, options, changes)
        parts, memory, cuda_graphs = options.parts, options.memory, options.cuda_graphs
        file = Path(path)
        if str(path) not in BUNDLED and is_packed(file):
            pipeline = cls.from_packed(
                file, options.device, options.compute, parts=parts, memory=memory,
                cuda_graphs=cuda_graphs,
            )  # fmt: skip
        else:
            expect_floats(path, options.compute)
            if parts is not None:
                raise UserError(
                    f"{path} is an original and has its own components: leave --parts out"
                )
            pipeline = cls.from_model(path, options.device, memory=memory, cuda_graphs=cuda_graphs)
        if options.resolution is not None:
            pipeline.expect_resolution()
            pipeline.decoder.resolution = options.resolution
        return pipeline

    @classmethod
    def from_packed(
        cls,
        path: str | os.PathLike[str],
        device: str = "auto",
        compute: str = "a16",
        *,
        parts: str | os.PathLike[str] | None = None,
        memory: str = "resident",
        encoder_bits: int = 8,
        cuda_graphs: bool = False,
        absent: bool = False,
    ) -> Pipeline:
        """Opens a packed file; the fp16 network is never in memory.

        `parts` is the original checkpoint of a file that refers to its image encoder and shape
        decoder: only these are read from it, the encoder's linears in 8 bits (`encoder_bits` 16:
        unquantized). `cuda_graphs`: network evaluations are captured and replayed (cuda_graph.py).
        `absent`: `device` need not exist on this machine; only `predicted_bytes` may then be used.

        Raises UserError if `parts` is not the packed file's original, or for `cuda_graphs` without
        a GPU.
        """
        header = read_header(path)
        if header.size <= VERIFY_BELOW:  # fail now, not when the network is loaded
            verify(path)
        options = PipelineOptions(device, compute, parts, memory, cuda_graphs)
        execution = choose(device, compute, present=not absent)
        if cuda_graphs:
            expect_gpu(execution.device)  # before the original is opened
        config = header.network
        family = _family(header.family, config, str(path))
        original = None if parts is None else original_of(header, parts).component
        conditioner = packed_component(header, "conditioner", original)
        around = replace(execution, compute="a16")  # for image encoder and shape decoder
        decoder = family.shape_decoder(packed_component(header, "shape_decoder", original), around)
        return cls(
            Lazy(
                lambda: packed.load_packed(path, execution, verify_content=False),
                packed.loaded_bytes(header, execution.dtype),
            ),
            SamplerDefaults.from_json(header.sampler),
            family.conditioner(conditioner, around, encoder_bits),
            decoder,
            Origin(header.family, str(path), header.sha256, header.variant),
            replace(options, device=execution.device),
            partial(
                _run_bytes,
                config,
                decoder.latent_shape,
                execution,
                family.condition_tokens(header.variant),
            ),
        )

    @classmethod
    def from_model(
        cls,
        model: str | os.PathLike[str],
        device: str = "auto",
        *,
        memory: str = "resident",
        encoder_bits: int = 16,
        cuda_graphs: bool = False,
    ) -> Pipeline:
        """Opens an original checkpoint: float32 on CPUs, fp16 elsewhere."""
        checkpoint = open_checkpoint(model)
        family = _family(checkpoint.family, checkpoint.config, str(model))
        options = PipelineOptions(device, memory=memory, cuda_graphs=cuda_graphs)
        execution = choose(device, packed=False)
        dtype = execution.dtype
        if cuda_graphs:
            expect_gpu(execution.device)  # before the checkpoint is hashed
        digest = checkpoint.source(hashed=True)["sha256"]
        conditioner = checkpoint.component("conditioner")
        around = choose(device, packed=encoder_bits == 8)  # for image encoder and shape decoder
        decoder = family.shape_decoder(checkpoint.component("shape_decoder"), around)
        return cls(
            Lazy(
                lambda: dit_of(checkpoint, dtype=dtype, device=execution.device),
                checkpoint.parameters() * dtype.itemsize,
            ),
            checkpoint.sampler,
            family.conditioner(conditioner, around, encoder_bits),
            decoder,
            Origin(checkpoint.family, str(checkpoint.path), digest, checkpoint.variant),
            replace(options, device=execution.device),
            partial(
                _run_bytes,
                checkpoint.config,
                decoder.latent_shape,
                execution,
                family.condition_tokens(checkpoint.variant),
            ),
        )

    def load(self) -> None:
        """Loads all networks now, instead of each when its phase starts. Raises UserError."""
        for component in self._components().values():
            component()

    def predicted_bytes(self, *, views: int = 1, one_batch: bool = False) -> dict[str, int]:
        """Peak memory of each phase in bytes, predicted before anything is loaded: weights,
        activations and the decoder's grid; on a CPU of the whole process, on a GPU of torch's
        allocations."""
        return self._peaks(views, one_batch)[0]

    def _peaks(self, views: int, one_batch: bool) -> tuple[dict[str, int], set[str]]:
        weights = dict.fromkeys(PHASES, 0)
        weights |= {phase: lazy.nbytes for phase, lazy in self._components().items()}
        working = {
            "condition": self.conditioner.working_bytes,
            "denoise": self._denoise_bytes(views, one_batch),
            "decode": self.decoder.working_bytes,
        }
        lean, imports = self.memory == "lean", self.conditioner.imports
        late = late_imported_bytes(imports) if self.device == "cpu" else 0
        predicted, prefetching = peaks(
            self._base - late, weights, working, lean=lean, ahead=self._ahead
        )
        kept = 0 if lean else sum(weights.values())
        surface = self._base + kept + self.decoder.surface_bytes
        return predicted | {"decode": max(predicted["decode"], surface)}, prefetching

    def _components(self) -> dict[str, Lazy[Any]]:
        """The networks that are loaded lazily, by phase."""
        networks = self.conditioner.component, self._dit, self.decoder.component
        by_phase = zip(PHASES, networks, strict=True)
        return {phase: network for phase, network in by_phase if isinstance(network, Lazy)}

    def _denoise_bytes(self, views: int, one_batch: bool) -> int:
        if self._step_bytes is None:
            return 0
        return self._step_bytes(views, 2 if one_batch else 1)

    def free(self, phase: str) -> None:
        """Evicts a phase's network if `memory` is "lean"; does nothing otherwise."""
        if self.memory == "lean" and phase in (components := self._components()):
            if phase == "denoise":
                self._graphs = None  # they hold addresses of the network's weights
            components[phase].free()

    @contextmanager
    def _phases(
        self, views: int, options: GenerateOptions, control: Control
    ) -> Iterator[Callable[[str], Any]]:
        """Waits for exclusive use, then yields a function that measures each phase of one image."""
        while not self._turn.acquire(timeout=0.2):
            control.check()
        default = self.decoder.resolution
        try:
            if options.resolution is not None:
                self.expect_resolution()
                self.decoder.resolution = options.resolution
            predicted, prefetching = self._peaks(views, options.one_batch)
            components = self._components()
            meter = PhaseMeter(predicted, self.device)
            self.seconds, self.bytes = meter.seconds, meter.bytes  # filled as phases end

            @contextmanager
            def phase(name: str) -> Iterator[None]:
                control.check()
                following = dict(pairwise(PHASES)).get(name)
                with meter(name):
                    if name in prefetching and following in components:
                        components[following].prefetch(self.device)
                    yield

            try:
                yield phase
            except BaseException:
                for name in PHASES:  # a prefetched network would add to the next image's memory
                    self.free(name)
                raise
        finally:
            self.decoder.resolution = default
            self._turn.release()

    def _stepper(self) -> Network | GraphedNetwork:
        """The network as the sampler calls it: itself, or with its evaluations as CUDA graphs."""
        network = self.dit
        if not self.cuda_graphs:
            return network
        if self._graphs is None or self._graphs.network is not network:
            self._graphs = GraphedNetwork(network)
        return self._graphs

    # The schedule (and so the modulation tables' rows) never depends on the image or the seed.
    def settings(
        self, steps: int | None, guidance: float | None, sampler: str | None
    ) -> SamplerDefaults:
        """The model's sampler settings with these values; None keeps the default. Raises UserError
        if they are invalid."""
        return self.sampler.with_values(name=sampler, steps=steps, guidance=guidance)

    def expect_resolution(self) -> None:
        """Raises UserError unless the grid's resolution can be chosen."""
        if self.decoder.resolution is None:
            raise UserError(f"--resolution: the shapes of {self.family} have one grid only")

    def check_views(self, views: Collection[str]) -> None:
        """Raises UserError unless this model accepts views of these names together."""
        several = self.conditioner.views
        known = VIEWS if several else VIEWS[:1]
        if odd := [view for view in views if view not in known]:
            takes = f"views {', '.join(VIEWS)}" if several else "one image, no views"
            raise UserError(f"view {odd[0]!r}: {self.variant or self.family} takes {takes}")
        if not views:
            raise UserError("no image was given")

    def condition(
        self, image: Picture, name: str = "image", control: Control | None = None
    ) -> Tensor:
        """Condition tokens (1, N, D) of an image, or of views by name ("front", "left", ...)."""
        return self.conditioner(image, name, control)

    def noise(self, seed: int) -> Tensor:
        """Initial latents (1, L, C), for TRELLIS (1, C, R, R, R), float32 on the CPU: the same for
        the same seed on every device."""
        generator = torch.Generator().manual_seed(seed)
        shape = (1, *self.decoder.latent_shape)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        anchors = self.decoder.anchors
        return noise if anchors is None else torch.cat([noise, anchors[None]], dim=-1)

    @torch.inference_mode()
    def latents(
        self,
        cond: Tensor,
        noise: Tensor,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        dit: Network | None = None,
        one_batch: bool = False,
        control: Control | None = None,
    ) -> Tensor:
        """Denoised latents, float32 on the CPU, of the noise's shape.

        `dit` replaces the model's own network, for example by one with a block left out.
        `one_batch`: guidance as one batch of two, as the reference implementations compute it; see
        `denoise`. Raises UserError for a step count that the packed file has no tables for,
        FormatError for NaN or infinite latents.
        """
        settings = self.settings(steps, guidance, sampler)
        out = denoise(
            self._stepper() if dit is None else dit,
            settings,
            cond,
            noise,
            one_batch=one_batch,
            control=control,
        )
        if not torch.isfinite(out).all():
            raise self._not_finite("network")
        return out.cpu()

    def grid(self, latents: Tensor, control: Control | None = None) -> np.ndarray:
        """Logits (R, R, R) float32, positive inside. Raises FormatError if any is not finite."""
        grid = self.decoder(latents, control)
        if not np.isfinite(grid).all():
            raise self._not_finite("shape decoder")
        return grid

    def _not_finite(self, component: str) -> FormatError:
        narrow = "" if self.device == "cpu" else ", or fp16 is too narrow for it: try --device cpu"
        return FormatError(
            f"{self.source}: the {component} gave NaN or infinite values; the file is "
            f"damaged{narrow}"
        )

    def surface(self, grid: np.ndarray) -> Mesh:
        """The cleaned zero level of a grid. Raises UserError if there is none."""
        return clean(surface_from_grid(grid, self.decoder.bounds))

    def __call__(
        self,
        image: Picture,
        options: GenerateOptions | None = None,
        *,
        name: str = "image",
        control: Control | None = None,
        **changes: Any,
    ) -> Mesh:
        """The mesh of `generate`."""
        return self.generate(image, options, name=name, control=control, **changes).mesh

    def generate(
        self,
        image: Picture,
        options: GenerateOptions | None = None,
        *,
        name: str = "image",
        control: Control | None = None,
        **changes: Any,
    ) -> Generated:
        """Makes a mesh with `metadata` and returns it with its settings, seconds and memory.

        `image`: an image, or views by name ("front", "left", "back", "right") for a multi-view
        model; `name` stands for it in messages. `changes` are fields of the options, as in
        generate(image, seed=1, steps=20). Calls from several threads run one at a time. `control`
        reports the phases and cancels within one step, which leaves the pipeline usable.

        Raises UserError for an image without an object, a step count that the packed file has no
        tables for, or an empty shape; Cancelled by the `control`.
        """
        options = merged(GenerateOptions, options, changes)
        control = control or Control()
        settings = self.settings(options.steps, options.guidance, options.sampler)
        views = 1
        if isinstance(image, Mapping):
            self.check_views(image)
            views = len(image)
            if not self.conditioner.views:
                image = image[VIEWS[0]]
        with self._phases(views, options, control) as phase:
            with phase("condition"):
                cond = self.condition(image, name, control)
                self.free("condition")
            with phase("denoise"):
                latents = self.latents(
                    cond,
                    self.noise(options.seed),
                    steps=options.steps,
                    guidance=options.guidance,
                    sampler=options.sampler,
                    one_batch=options.one_batch,
                    control=control,
                )
                self.free("denoise")
            with phase("decode"):
                grid = self.grid(latents, control)
                self.free("decode")
                control.check()
                mesh = self.surface(grid)
            mesh = replace(mesh, metadata=self.metadata(options))
            queries = self.decoder.queries
            return Generated(mesh, options.seed, settings, self.seconds, self.bytes, queries)

    def metadata(self, options: GenerateOptions) -> dict[str, Any]:
        """The metadata of a mesh made with these options."""
        settings = self.settings(options.steps, options.guidance, options.sampler)
        metadata: dict[str, Any] = {
            "generator": f"vitapack {vitapack.__version__}",
            "family": self.family,
            "variant": self.variant,
            "model": Path(self.source).name,
            "sha256": self.source_sha256,
            "seed": options.seed,
            "sampler": settings.name,
            "steps": settings.steps,
            "guidance": settings.guidance,
        }
        if options.resolution is not None:
            metadata["resolution"] = options.resolution
        return metadata


def _run_bytes(
    config: Architecture,
    latents: tuple[int, ...],
    execution: Execution,
    tokens: int,
    views: int,
    batch: int,
) -> int:
    """Predicted working memory of denoising, with `tokens` condition tokens per view."""
    call = execution.call(latents, tokens * views, batch)
    return form_of(config, execution).run_bytes(config, call)


def _family(name: str, config: Architecture, source: str) -> Family:
    """The model's family. Raises: UserError: if it is unknown, or the model makes no mesh."""
    family = family_of(name, source)
    if not config.has_edges:
        raise UserError(f"{source} is {family.blocks_only}")
    return family
