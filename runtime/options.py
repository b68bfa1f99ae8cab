"""Options for opening a model, for a generation and for `bench`, checked on construction.

    pipeline.generate(image, GenerateOptions(seed=1, steps=20))
    pipeline.generate(image, seed=1, steps=20)    # the same

Used by the command line, Python code, servers and nodes alike. An invalid value raises a UserError
of one line. Imports nothing heavy: the command line reads its defaults from here first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from vitapack.runtime import choices
from vitapack.runtime.choices import check_choice

Options = TypeVar("Options")


@dataclass(frozen=True)
class PipelineOptions:
    """Settings for opening a model."""

    device: str = "auto"
    compute: str = "a16"
    parts: str | os.PathLike[str] | None = None  # original, for referenced components
    memory: str = "resident"
    cuda_graphs: bool = False
    resolution: int | None = None  # cells per side of the decoded grid; None: the model's default

    def __post_init__(self) -> None:
        choices.device(self.device)
        check_choice("compute mode", self.compute, choices.COMPUTES)
        check_choice("memory mode", self.memory, choices.MEMORY_MODES)
        choices.flag(self.cuda_graphs, "cuda_graphs")
        if self.resolution is not None:
            choices.resolution(self.resolution, "grid resolution")


@dataclass(frozen=True)
class GenerateOptions:
    """Settings of a generation. steps, guidance, sampler, resolution: None for the model's default.
    Seed and counts may be strings of digits, as in a URL query."""

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    one_batch: bool = False  # guidance as one batch of two instead of two passes
    resolution: int | None = None  # cells per side of the decoded grid
    format: str = "glb"  # mesh file format

    def __post_init__(self) -> None:
        numbers = {"seed": choices.seed(self.seed, "seed")}
        if self.steps is not None:
            numbers["steps"] = choices.steps(self.steps, "steps")
        if self.resolution is not None:
            numbers["resolution"] = choices.resolution(self.resolution, "grid resolution")
        for name, number in numbers.items():
            object.__setattr__(self, name, number)
        if self.guidance is not None:
            choices.guidance(self.guidance, "guidance")
        if self.sampler is not None:
            check_choice("sampler", self.sampler, choices.SAMPLERS)
        choices.flag(self.one_batch, "one_batch")
        check_choice("mesh format", self.format, choices.MESH_FORMATS)


@dataclass(frozen=True)
class BenchOptions:
    """Settings of a benchmark. cond_tokens, resolution, steps: None for the model's default."""

    original: str | os.PathLike[str] | None = None  # the packed file's original, compared with it
    device: str = "auto"
    compute: str = "a16"
    repeats: int = 5  # timed steps of each network
    cond_tokens: int | None = None
    resolution: int | None = None  # cells per side of the decoded grid
    steps: int | None = None  # denoising steps of the generations
    whole_pass: bool = True  # also time a generation with each network
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        choices.device(self.device)
        check_choice("compute mode", self.compute, choices.COMPUTES)
        choices.at_least_one(self.repeats, "repeats")
        if self.cond_tokens is not None:
            choices.at_least_one(self.cond_tokens, "cond_tokens")
        if self.resolution is not None:
            choices.resolution(self.resolution, "grid resolution")
        if self.steps is not None:
            choices.steps(self.steps, "steps")
        choices.flag(self.whole_pass, "whole_pass")
        choices.flag(self.cuda_graphs, "cuda_graphs")


def merged(kind: type[Options], options: Options | None, changes: Mapping[str, Any]) -> Options:
    """`options` (None: the defaults of `kind`) with `changes` to some fields. Raises UserError if a
    value is invalid."""
    return kind(**changes) if options is None else replace(options, **changes)  # type: ignore
