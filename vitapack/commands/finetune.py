"""`vitapack finetune`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vitapack.runtime.choices import TRAINED_BLOCKS
from vitapack.terminal import COUNT, SEED, progress, say

HELP = "train the least vital kept blocks to follow the original"
EXAMPLE = "finetune furniture model.safetensors --images photos -o tuned.safetensors"


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="the original that the packed file was made from")
    add("packed", type=Path)
    add("--images", type=Path, required=True, metavar="DIR")
    add("-o", "--out", type=Path, required=True)
    add(
        "--blocks",
        choices=TRAINED_BLOCKS,
        default="min-vital",
        help="the least or most vital kept block of each kind, or all",
    )
    add(
        "--iterations",
        type=COUNT,
        default=1000,
        help="optimizer steps; the paper takes 20,000 to 30,000 (default 1000)",
    )
    add("--batch", type=COUNT, default=16, help="trajectory points per step (default 16)")
    add("--lr", type=float, default=3e-4, help="learning rate of Adam, decayed linearly to 0")
    add("--seed", type=SEED, default=0)
    add(
        "--steps", type=COUNT, help="sampling steps of the teacher (default: as in the packed file)"
    )
    add("--guidance", type=float)
    add("--limit", type=COUNT, help="use only the first so many images")
    add("--device", default="cpu")


def run(options: Namespace) -> None:
    from vitapack.compressor.distill.finetune import finetune
    from vitapack.runtime.condition.images import find_images
    from vitapack.runtime.format.describe import describe_finetuning

    images = find_images([options.images])[: options.limit]
    with progress(options.quiet) as report:
        note = finetune(
            options.model, options.packed, images, options.out, blocks=options.blocks,
            iterations=options.iterations, batch=options.batch, lr=options.lr, seed=options.seed,
            steps=options.steps, guidance=options.guidance, device=options.device, progress=report,
        )  # fmt: skip
    say(options, {"written": str(options.out), **note}, describe_finetuning(note))
