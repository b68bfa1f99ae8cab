"""Options of `analyze`, `plan`, `compress`, `finetune` and `evaluate`, checked when they are made.

    compress(checkpoint, layer_map, out, CompressOptions(steps=(20, 30)))
    compress(checkpoint, layer_map, out, steps=(20, 30))    # the same

The command line, Python, a server and a node all fill these. A value that cannot work raises a
UserError of one line. Light: the command line takes its defaults from here before anything else is
imported.
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
    """How vitality is measured. steps, guidance: None for the model's own."""

    metric: str = "emd"
    points: int = 10_000  # per cloud; the paper's
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    gap: float = 1e-2  # certified relative gap of each EMD
    curve: bool = True  # also remove blocks one after another
    curve_images: int = 8  # images for which that is done
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
    """How a plan is made: by at most one of these, else automatically. The thresholds `tau` and
    `tau8` are by block kind: blocks with a vitality below `tau` are pruned, those above `tau8` get
    8 bits."""

    target_size: int | None = None  # bytes
    paper: bool = False  # the family's published layer map
    max_distance: float | None = None  # of the automatic plan: largest distance to the original
    tau: Mapping[str, float] = field(default_factory=dict)
    tau8: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ways = {
            "--target-size": self.target_size is not None,
            "--paper": self.paper,
            "--max-distance": self.max_distance is not None,
            "thresholds": bool(self.tau or self.tau8),
        }
        if len(given := [name for name, used in ways.items() if used]) > 1:
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
    (as in the original). Tables serve `schedules`; by default each of `samplers` (else the model's
    own) with each count of `steps` (else its own). embed: shape decoder and image encoder in the
    file; None: if they take at most 64 MiB together.
    """

    quantizer: str = "search"
    modulation: str = "table"
    steps: Sequence[int] | None = None
    samplers: Sequence[str] | None = None
    schedules: Sequence[SamplerDefaults] | None = None
    table_dtype: str = "F16"  # of modulation tables
    rest: str = "F16"  # of unquantized tensors
    embed: bool | None = None
    encoder_bits: int = 8  # of the linears of an embedded DINOv2

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
    """How kept blocks are trained. steps, guidance: of the teacher's sampling trajectories, None
    for the packed file's own, whose modulation tables must serve them."""

    blocks: str = "min-vital"  # of each kind the least or most vital kept one, or all
    iterations: int = 1000
    batch: int = 16  # points per step, and trajectories that are recorded together
    lr: float = 3e-4  # of Adam, decayed linearly to 0
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
    """How pairs of meshes are compared; stored in every result."""

    resolution: int = 64  # voxels along the reference's longest side
    points: int = 10_000  # surface samples of each mesh for Chamfer and F-score
    emd_points: int = 4096  # 0: no EMD
    tau: float = 0.05  # of the F-score, in the frame in which the reference is 2 long
    align: str = "rigid"  # or "similarity" (one scale too), or "none"
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
    """UserError for numbers that no model can be sampled with; None is the model's own."""
    if steps is not None:
        choices.steps(steps, "steps")
    if guidance is not None:
        choices.guidance(guidance, "guidance")
