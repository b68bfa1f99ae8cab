"""`vitapack compress`."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path

from vitapack.compressor.options import CompressOptions
from vitapack.runtime.choices import ENCODER_BITS, MODULATIONS, names
from vitapack.terminal import COUNTS, filled, say, watched

HELP = "write the packed file"
EXAMPLE = "compress furniture --plan int8 -o model.safetensors"


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="original checkpoint: a folder or file, or `furniture`")
    add("--plan", required=True, help="plan.json, or int8, int4, paper")
    add("-o", "--out", type=Path, required=True)
    add("--quantizer")
    add("--modulation", choices=MODULATIONS)
    add("--steps", type=COUNTS, help="step counts of the modulation tables, e.g. 20,30")
    add("--samplers", type=names, help="samplers of the modulation tables, e.g. euler,unipc")
    add(
        "--embed",
        action=BooleanOptionalAction,
        default=None,
        help="put shape decoder and image encoder into the file",
    )
    add(
        "--encoder-bits",
        type=int,
        choices=ENCODER_BITS,
        help="bits of the embedded image encoder's linears",
    )
    add("--dry-run", action="store_true", help="print the sizes and write nothing")


def run(options: Namespace) -> None:
    from vitapack.compressor.packing.compress import compress
    from vitapack.compressor.planning.files import resolve_plan
    from vitapack.runtime.families.open import open_checkpoint

    settings = filled(CompressOptions, options)
    checkpoint = open_checkpoint(options.model)
    layer_map = resolve_plan(options.plan, checkpoint)
    with watched(options.quiet) as control:
        sizes = compress(
            checkpoint, layer_map, options.out, settings, dry_run=options.dry_run, control=control
        )
    say(options, sizes.to_json(), sizes.describe())
