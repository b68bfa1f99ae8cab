"""Options of `analyze`, `plan`, `compress`, `finetune` and `evaluate`, checked when created.

    compress(checkpoint, layer_map, out, CompressOptions(steps=(20, 30)))
    compress(checkpoint, layer_map, out, steps=(20, 30))    # the same

The command line, Python, a server and a node all fill these. An invalid value raises a UserError of
one line. This module imports little, because the command line takes its defaults from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vitapack.runtime import choices
from vitapack.runtime.choices import check_choice
from vitapack.runtime.errors import UserError

if TYPE_CHECKING:
    from vitapack.runtime.format.schedules import SamplerDefaults


@dataclass(frozen=True)
class AnalyzeOptions:
    """How vitality is measured. steps, guidance: None for the model's own values."""

    metric: str = "emd"
    points: int = 10_000  # per cloud, as in the paper
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    gap: float = 1e-2  # certified relative gap of each EMD
    curve: bool = True  # also measure pruning curves
    curve_images: int = 8  # images for the pruning curves
    jobs: int = 1  # worker processes, on CPUs
    resume: bool = False

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, choices.METRICS)
        if not choices.is_whole(self.points, 16, 1_000_000):
            raise UserError(f"{self.points} points: choose 16 to 1000000 (10000 is the paper's)")
        check_sampling(self.steps, self.guidance)
        choices.seed(self.seed, "seed")
        if not (choices.is_number(self.gap) and 0 < self.gap <= 0.1):
            raise UserError(f"gap {self.gap}: choose a relative gap above 0 and at most 0.1")
        if not (choices.is_whole(self.jobs, 1) and choices.is_whole(self.curve_images, 1)):
            raise UserError("jobs and curve images must be at least 1")
        choices.flag(self.curve, "curve")
        choices.flag(self.resume, "resume")


@dataclass(frozen=True)
class PlanOptions:
    """How a plan is made: by one of these options, or automatically if none is given.

    tau, tau8: thresholds by block kind. Blocks with a vitality below `tau` are pruned, those above
    `tau8` get 8 bits. Both together count as one option.
    """

    target_size: int | None = None  # bytes
    paper: bool = False  # the family's published layer map
    max_distance: float | None = None  # largest distance of the automatic plan to the original
    tau: Mapping[str, float] = field(default_factory=dict)
    tau8: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choice = {
            "--target-size": self.target_size is not None,
            "--paper": self.paper,
            "--max-distance": self.max_distance is not None,
            "thresholds": bool(self.tau or self.tau8),
        }
        if len(given := [name for name, used in choice.items() if used]) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other; choose one")
        if self.target_size is not None:
            choices.at_least_one(self.target_size, "target size")
        choices.flag(self.paper, "paper")
        if self.max_distance is not None:
            choices.distance(self.max_distance, "--max-distance")
        for name, values in (("tau", self.tau), ("tau8", self.tau8)):
            for kind, value in values.items():
                choices.distance(value, f"--{name}-{kind}")


@dataclass(frozen=True)
class CompressOptions:
    """How a checkpoint is packed.

    modulation: "table" (exact, at the schedules' times only), "int8" (any time), "both", or "kept"
    (unchanged from the original). Tables cover `schedules`; by default every one of `samplers`
    (default: the model's) with every count of `steps` (default: the model's). embed: stores shape
    decoder and image encoder in the file; None: if they take at most 64 MiB together.
    """

    quantizer: str = "search"
    modulation: str = "table"
    steps: Sequence[int] | None = None
    samplers: Sequence[str] | None = None
    schedules: Sequence[SamplerDefaults] | None = None
    table_dtype: str = "F16"  # of modulation tables
    rest: str = "F16"  # of unquantized tensors
    embed: bool | None = None
    encoder_bits: int = 8  # bits of the embedded image encoder's linears (DINOv2)

    def __post_init__(self) -> None:
        check_choice("quantizer", self.quantizer, choices.QUANTIZERS)
        check_choice("modulation", self.modulation, choices.MODULATIONS)
        check_choice("rest", self.rest, choices.FLOATS)
        check_choice("table dtype", self.table_dtype, choices.FLOATS)
        check_choice("encoder bits", self.encoder_bits, choices.ENCODER_BITS)
        if self.embed is not None:
            choices.flag(self.embed, "embed")
        for count in self.steps or ():
            choices.steps(count, "steps")
        for name in self.samplers or ():
            check_choice("sampler", name, choices.SAMPLERS)


@dataclass(frozen=True)
class FinetuneOptions:
    """How kept blocks are trained.

    steps, guidance: of the teacher's sampling trajectories; None for the packed file's own values.
    The packed file's modulation tables must cover them.
    """

    blocks: str = "min-vital"  # the least or most vital kept block of each kind, or all
    iterations: int = 1000
    batch: int = 16  # points per iteration, and trajectories recorded together
    lr: float = 3e-4  # learning rate of Adam, decayed linearly to 0
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_choice("blocks", self.blocks, choices.TRAINED_BLOCKS)
        if not (choices.is_whole(self.iterations, 1) and choices.is_whole(self.batch, 1)):
            raise UserError("iterations and batch must be at least 1")
        if not (choices.is_number(self.lr) and 0 < self.lr < 1):
            raise UserError(f"learning rate {self.lr}: expected a number between 0 and 1")
        choices.seed(self.seed, "seed")
        check_sampling(self.steps, self.guidance)
        choices.device(self.device)


@dataclass(frozen=True)
class EvaluateSettings:
    """How pairs of meshes are compared. Stored in every result."""

    resolution: int = 64  # voxels along the reference's longest side
    points: int = 10_000  # surface samples of each mesh for Chamfer and F-score
    emd_points: int = 4096  # 0: no EMD
    tau: float = 0.05  # of the F-score, in the frame in which the reference's longest side is 2
    align: str = "rigid"  # or "similarity" (with one scale), or "none"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("alignment", self.align, choices.ALIGNMENTS)
        counts = ((self.resolution, 8), (self.points, 100), (self.emd_points, 0))
        whole = all(choices.is_whole(value, least) for value, least in counts)
        if not (whole and choices.is_number(self.tau) and self.tau > 0):
            raise UserError(
                f"resolution {self.resolution}, points {self.points}, emd_points "
                f"{self.emd_points}, tau {self.tau}; expected >= 8, >= 100, >= 0 and > 0"
            )
        choices.seed(self.seed, "seed")


def check_sampling(steps: int | None, guidance: float | None) -> None:
    """Raises UserError if no model can be sampled with these values. None: the model's own."""
    if steps is not None:
        choices.steps(steps, "steps")
    if guidance is not None:
        choices.guidance(guidance, "guidance")
