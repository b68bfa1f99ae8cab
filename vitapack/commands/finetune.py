"""`vitapack finetune`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vitapack.compressor.options import FinetuneOptions
from vitapack.runtime.choices import TRAINED_BLOCKS
from vitapack.terminal import COUNT, SEED, filled, say, watched

HELP = "train the least vital kept blocks to follow the original"
EXAMPLE = "finetune furniture model.safetensors --images photos -o tuned.safetensors"


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="the packed file's original")
    add("packed", type=Path)
    add("--images", type=Path, required=True, metavar="DIR")
    add("-o", "--out", type=Path, required=True)
    add(
        "--blocks",
        choices=TRAINED_BLOCKS,
        help="the least or most vital kept block of each kind, or all",
    )
    add(
        "--iterations",
        type=COUNT,
        help="optimizer steps; the paper uses 20,000 to 30,000 (default 1000)",
    )
    add("--batch", type=COUNT, help="trajectory points per step (default 16)")
    add("--lr", type=float, help="learning rate of Adam, decayed linearly to 0")
    add("--seed", type=SEED)
    add(
        "--steps", type=COUNT, help="sampling steps of the teacher (default: as in the packed file)"
    )
    add("--guidance", type=float)
    add("--limit", type=COUNT, help="use only the first N images")
    add("--device")


def run(options: Namespace) -> None:
    from vitapack.compressor.distill.finetune import finetune
    from vitapack.runtime.condition.images import find_images
    from vitapack.runtime.format.describe import describe_finetuning

    settings = filled(FinetuneOptions, options)
    images = find_images([options.images])[: options.limit]
    with watched(options.quiet) as control:
        note = finetune(
            options.model, options.packed, images, options.out, settings, control=control
        )
    say(options, {"written": str(options.out), **note}, describe_finetuning(note))
