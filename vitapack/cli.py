"""The command line over both halves: `vitapack COMMAND --help` has an example each.

Progress goes to stderr, results to stdout (`--json` for machines). A user's mistake is one plain
line and exit code 2, an interruption exit code 130; every long command can be started again.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import vitapack
from vitapack.runtime.errors import UserError
from vitapack.runtime.files import atomic_path, destination

VIEWS = ("front", "left", "back", "right")  # as in the conditioner, which imports torch
Report = Callable[[int, int, str], None]  # done, total, what


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


@contextmanager
def progress(quiet: bool = False) -> Iterator[Report]:
    """A bar with ETA on stderr; each new description starts its own bar."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet) as bars:
        tasks: dict[str, Any] = {}

        def report(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def say(options: argparse.Namespace, data: dict[str, Any], text: str) -> None:
    """The result: JSON if asked for, else the text."""
    print(json.dumps(data, indent=1) if options.json else text)


def write_json(path: Path, data: dict[str, Any]) -> None:
    with atomic_path(path) as part:
        part.write_text(json.dumps(data, indent=1) + "\n")


def read_images(paths: Sequence[Path], limit: int | None = None) -> list[tuple[str, Any]]:
    from vitapack.runtime.condition.images import find_images, load_image

    return [(path.stem, load_image(path)) for path in find_images(list(paths))[:limit]]


def demo(options: argparse.Namespace) -> None:
    from vitapack.compressor.report.demo import run_demo

    with progress(options.quiet) as report:
        figures = run_demo(options.out, images=options.images, progress=report)
    say(options, figures.data, figures.text)


def analyze(options: argparse.Namespace) -> None:
    from vitapack.compressor.vitality import analyze as vitality
    from vitapack.compressor.vitality.table import describe as describe_vitality
    from vitapack.runtime.pipeline.pipeline import Pipeline

    destination(options.out)
    images = read_images([options.images], options.limit)
    pipeline = Pipeline.from_model(options.model, device=options.device)
    with progress(options.quiet) as report:
        result = vitality.analyze(
            pipeline, images, options.out, metric=options.metric, points=options.points,
            steps=options.steps, guidance=options.guidance, seed=options.seed,
            resume=options.resume, jobs=options.jobs, progress=report,
        )  # fmt: skip
    say(options, result.to_json(), describe_vitality(result))


def plan(options: argparse.Namespace) -> None:
    from vitapack.compressor.planning.files import describe as describe_plan
    from vitapack.compressor.planning.files import from_options

    layer_map = from_options(
        options.vitality,
        target_size=options.target_size,
        paper=options.paper,
        max_distance=options.max_distance,
        taus={
            name: getattr(options, name)
            for name in ("tau_double", "tau_single", "tau8_double", "tau8_single")
            if getattr(options, name) is not None
        },
    )
    write_json(options.out, layer_map.to_json())
    say(options, layer_map.to_json(), describe_plan(layer_map))


def compress(options: argparse.Namespace) -> None:
    from vitapack.compressor.packing import compress as compressor
    from vitapack.compressor.planning.files import resolve_plan
    from vitapack.runtime.families.open import open_checkpoint

    checkpoint = open_checkpoint(options.model)
    layer_map = resolve_plan(options.plan, checkpoint)
    with progress(options.quiet) as report:
        sizes = compressor.compress(
            checkpoint, layer_map, options.out, quantizer=options.quantizer,
            modulation=options.modulation, steps=options.steps, samplers=options.samplers,
            embed=options.embed, encoder_bits=options.encoder_bits,
            dry_run=options.dry_run, progress=report,
        )  # fmt: skip
    say(options, sizes.to_json(), sizes.describe())


def finetune(options: argparse.Namespace) -> None:
    from vitapack.compressor.distill import finetune as tuner
    from vitapack.runtime.condition.images import find_images
    from vitapack.runtime.format.describe import describe_finetuning

    images = find_images([options.images])[: options.limit]
    with progress(options.quiet) as report:
        note = tuner.finetune(
            options.model, options.packed, images, options.out, blocks=options.blocks,
            iterations=options.iterations, batch=options.batch, lr=options.lr, seed=options.seed,
            steps=options.steps, guidance=options.guidance, device=options.device, progress=report,
        )  # fmt: skip
    say(options, {"written": str(options.out), **note}, describe_finetuning(note))


def generate(options: argparse.Namespace) -> None:
    from vitapack.runtime.condition.images import load_image
    from vitapack.runtime.decode.mesh import report as describe_mesh
    from vitapack.runtime.decode.mesh import save
    from vitapack.runtime.pipeline.pipeline import Pipeline

    objects = pictures_of(options)
    pipeline = Pipeline.open(
        options.packed, device=options.device, compute=options.compute, parts=options.parts,
        memory=options.memory, cuda_graphs=options.cuda_graphs, resolution=options.resolution,
    )  # fmt: skip
    written, failed = [], []
    views = max(map(len, objects))
    if "" not in objects[0]:
        pipeline.check_views(objects[0])
    destination(target_of(options, objects[0]))  # now, not after the first mesh
    if not options.quiet:
        predicted = pipeline.predicted_bytes(views=views, one_batch=options.one_batch)
        print(f"memory: {predicted_line(predicted)}", file=sys.stderr)
    with progress(options.quiet) as report:
        for number, places in enumerate(objects):
            path = next(iter(places.values()))
            report(number, len(objects), "meshes")
            target = target_of(options, places)
            try:
                images = {view: load_image(place) for view, place in places.items()}
                mesh = pipeline(
                    images.get("", images), name=str(path), seed=options.seed,
                    steps=options.steps, guidance=options.guidance, sampler=options.sampler,
                    one_batch=options.one_batch,
                    progress=lambda done, total: report(done, total, "steps"),
                )  # fmt: skip
            except UserError as error:
                # One bad picture must not cost the folder its other meshes.
                if len(objects) == 1:
                    raise
                failed.append(str(error))
                continue
            save(mesh, target)
            written.append(
                {
                    "file": str(target),
                    **mesh.metadata,
                    "mesh": asdict(describe_mesh(mesh)),
                    "seconds": pipeline.seconds,
                    "bytes": pipeline.bytes,
                    "queries": getattr(pipeline.decoder, "queries", None),
                }
            )
        report(len(objects), len(objects), "meshes")
    lines = [mesh_line(row) for row in written]
    say(options, {"written": written, "failed": failed}, "\n".join(lines))
    if failed:
        for line in failed:
            print(f"vitapack: {line}", file=sys.stderr)
        raise UserError(f"{len(failed)} of {len(objects)} pictures gave no mesh (named above)")


def target_of(options: argparse.Namespace, places: dict[str, Path]) -> Path:
    """The mesh of one object is called as its first picture."""
    return Path(options.out, f"{next(iter(places.values())).stem}.{options.format}")


def pictures_of(options: argparse.Namespace) -> list[dict[str, Path]]:
    """What each mesh is made from: {"": picture}, or {"front": picture, "left": picture, ...}."""
    from vitapack.runtime.condition.images import find_images

    views = {view: getattr(options, view) for view in VIEWS if getattr(options, view)}
    if views and options.images:
        raise UserError(
            f"--{next(iter(views))} gives views of one object, {options.images[0]} is a picture of "
            "its own; give one or the other"
        )
    if views:
        for view, path in views.items():
            if path.is_dir():
                raise UserError(f"--{view} {path}: a folder; expected one picture")
        places = [path.resolve() for path in views.values()]
        if len(set(places)) < len(places):
            raise UserError(f"{places[0]}: the same picture for two views; they must differ")
        return [views]
    if not options.images:
        raise UserError(
            f"no picture: name pictures or folders, or views of one object with "
            f"--{', --'.join(VIEWS)}"
        )
    paths = find_images(options.images)
    stems = [path.stem for path in paths]
    if repeated := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise UserError(
            f"two pictures are called {repeated[0]!r}, so one mesh would overwrite the other; "
            "rename one of them"
        )
    return [{"": path} for path in paths]


def mesh_line(row: dict[str, Any]) -> str:
    """One line for people: what the mesh is like, what it took."""
    from vitapack.runtime.pipeline.phases import memory_words

    shape = row["mesh"]
    words = "watertight" if shape["watertight"] else "not watertight"
    most = {
        what: max(part[what] or 0 for part in row["bytes"].values())
        for what in ("peak", "predicted", "reserved")
    }
    return (
        f"{row['file']}  {sum(row['seconds'].values()):.1f} s{memory_words(most)}; "
        f"{shape['faces']} faces, {words}, components {shape['components']}, "
        f"Euler number {shape['euler_number']}, volume {shape['volume']:.3g}"
    )


def predicted_line(predicted: dict[str, int]) -> str:
    """Of the peaks by phase, before the run."""
    parts = (f"{phase} {count / 2**30:.2f} GiB" for phase, count in predicted.items())
    return f"predicted peaks: {', '.join(parts)}"


def evaluate(options: argparse.Namespace) -> None:
    from vitapack.compressor.evaluate import metrics

    if options.out:
        destination(options.out)
    with progress(options.quiet) as report:
        settings = metrics.EvaluateSettings(
            resolution=options.resolution, points=options.points, tau=options.tau,
            align=options.align,
        )  # fmt: skip
        result = metrics.evaluate_folders(
            options.reference, options.candidate, settings, progress=report
        )
    if options.out:
        write_json(options.out, result)
    say(options, result, metrics.describe(result))


def inspect(options: argparse.Namespace) -> None:
    from vitapack.runtime.format.describe import describe
    from vitapack.runtime.format.header import read_header

    header = read_header(options.packed)
    say(options, header.to_json(), describe(header))


def bench(options: argparse.Namespace) -> None:
    from vitapack.runtime.tools import bench as runner

    if options.out:
        destination(options.out)
    result = runner.bench(
        options.model, original=options.original, device=options.device, compute=options.compute,
        repeats=options.repeats, cond_tokens=options.cond_tokens, resolution=options.resolution,
        sampling_steps=options.steps, whole_pass=not options.no_pass,
        cuda_graphs=options.cuda_graphs,
        note=lambda line: None if options.quiet else print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    if options.out:
        write_json(options.out, result)
    say(options, result, runner.describe(result))


def random_checkpoint(options: argparse.Namespace) -> None:
    from vitapack.compressor.tools.random_checkpoint import write

    with progress(options.quiet) as report:
        files = write(
            options.name, options.out, parts=options.parts, seed=options.seed, progress=report
        )
    written = [str(options.out / place) for place in (*files.texts, *files.tensors)]
    say(options, {"written": written, "bytes": files.nbytes}, "\n".join(written))


def doctor(options: argparse.Namespace) -> None:
    from vitapack.runtime.tools.doctor import examine

    report = examine()
    say(options, report, "\n".join(f"{key:12} {value}" for key, value in report.items()))


def tune(options: argparse.Namespace) -> None:
    from vitapack.runtime.tools.tune import describe, tune_packed

    with progress(options.quiet) as report:
        result = tune_packed(
            options.packed, options.tokens, device=options.device, again=options.again,
            progress=report,
        )  # fmt: skip
    say(options, result, describe(result))


def at_least_one(text: str) -> int:
    if not text.isdecimal() or len(text) > 20 or not 1 <= int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def seed_number(text: str) -> int:
    if not text.isdecimal() or len(text) > 20 or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 0 to 2^63 - 1")
    return int(text)


def steps_list(text: str) -> list[int]:
    return [at_least_one(part) for part in text.split(",")]


def size_bytes(text: str) -> int:
    """Bytes from 450MB, 0.45GiB, ..."""
    units = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    for unit in sorted(units, key=len, reverse=True):
        if text.upper().endswith(unit):
            with suppress(ValueError, OverflowError):
                return int(float(text[: -len(unit)]) * units[unit])
            break
    raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 450MB or 0.45GiB")


def build_parser() -> Parser:
    parser = Parser(prog="vitapack", description=vitapack.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=vitapack.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(run: Callable[..., None], words: str, example: str) -> Parser:
        sub = commands.add_parser(
            run.__name__.replace("_", "-"),
            help=words,
            description=words,
            epilog=f"example: vitapack {example}",
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="the result as JSON")
        sub.add_argument("--quiet", action="store_true", help="no progress")
        return sub

    sub = command(demo, "the whole way on the bundled furniture model", "demo --out demo-out")
    sub.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR")
    sub.add_argument("--images", type=at_least_one, default=8, help="pictures in the report")

    sub = command(
        analyze,
        "how vital each block is to the geometry",
        "analyze furniture --images photos -o vitality.json",
    )
    sub.add_argument("model", help="folder or file in released layout, or `furniture`")
    sub.add_argument("--images", type=Path, required=True, metavar="DIR")
    sub.add_argument("-o", "--out", type=Path, required=True)
    sub.add_argument("--metric", choices=("emd", "chamfer"), default="emd")
    sub.add_argument("--points", type=at_least_one, default=10_000)
    sub.add_argument("--steps", type=at_least_one)
    sub.add_argument("--guidance", type=float)
    sub.add_argument("--seed", type=seed_number, default=0)
    sub.add_argument("--limit", type=at_least_one, help="use only so many pictures")
    sub.add_argument("--jobs", type=at_least_one, default=1, help="worker processes (CPU)")
    sub.add_argument("--resume", action="store_true", help="go on after an interruption")
    sub.add_argument("--device", default="cpu")

    sub = command(
        plan,
        "which blocks to keep, in how many bits",
        "plan vitality.json -o plan.json --target-size 6MB",
    )
    sub.add_argument("vitality", type=Path)
    sub.add_argument("-o", "--out", type=Path, required=True)
    sub.add_argument("--auto", action="store_true", help="thresholds from the curve (the default)")
    sub.add_argument("--max-distance", type=float, help="auto: largest EMD to the full output")
    sub.add_argument("--target-size", type=size_bytes, metavar="SIZE",
                     help="of network, tables and header; embedded parts come on top")  # fmt: skip
    sub.add_argument("--paper", action="store_true", help="the family's published layer map")
    for name in ("tau-double", "tau-single", "tau8-double", "tau8-single"):
        sub.add_argument(f"--{name}", type=float)

    sub = command(
        compress,
        "writes the packed file",
        "compress furniture --plan int8 -o model.safetensors",
    )
    sub.add_argument("model")
    sub.add_argument("--plan", required=True, help="plan.json, or int8, int4, paper")
    sub.add_argument("-o", "--out", type=Path, required=True)
    sub.add_argument("--quantizer", default="search")
    sub.add_argument("--modulation", choices=("table", "int8", "both"), default="table")
    sub.add_argument("--steps", type=steps_list, help="step counts of the tables, e.g. 20,30")
    sub.add_argument("--samplers", type=lambda text: text.split(","),
                     help="samplers of the tables, e.g. euler,unipc")  # fmt: skip
    sub.add_argument("--embed", action=argparse.BooleanOptionalAction, default=None,
                     help="decoder and image encoder inside the file")  # fmt: skip
    sub.add_argument("--encoder-bits", type=int, choices=(8, 16), default=8,
                     help="of an embedded DINOv2's linears")  # fmt: skip
    sub.add_argument("--dry-run", action="store_true", help="only the sizes")

    sub = command(
        finetune,
        "the least vital kept blocks learn to follow the original",
        "finetune furniture model.safetensors --images photos -o tuned.safetensors",
    )
    sub.add_argument("model", help="the original that the packed file was made from")
    sub.add_argument("packed", type=Path)
    sub.add_argument("--images", type=Path, required=True, metavar="DIR")
    sub.add_argument("-o", "--out", type=Path, required=True)
    sub.add_argument("--blocks", choices=("min-vital", "max-vital", "all"), default="min-vital",
                     help="one kept block of each kind by its vitality, or all")  # fmt: skip
    sub.add_argument(
        "--iterations",
        type=at_least_one,
        default=1000,
        help="optimizer steps; the paper takes 20,000 to 30,000 (default 1000)",
    )
    sub.add_argument("--batch", type=at_least_one, default=16, help="points of a step (default 16)")
    sub.add_argument("--lr", type=float, default=3e-4, help="of Adam; falls linearly to 0")
    sub.add_argument("--seed", type=seed_number, default=0)
    sub.add_argument("--steps", type=at_least_one, help="of a walk; default: the packed file's")
    sub.add_argument("--guidance", type=float)
    sub.add_argument("--limit", type=at_least_one, help="use only so many pictures")
    sub.add_argument("--device", default="cpu")

    sub = command(
        generate, "pictures to meshes", "generate model.safetensors chair.png -o meshes --seed 1"
    )
    sub.add_argument("packed", help="a packed file, or an original checkpoint")
    sub.add_argument("images", type=Path, nargs="*", help="pictures or folders of pictures")
    for view in VIEWS:
        sub.add_argument(f"--{view}", type=Path, metavar="IMAGE",
                         help="a view of one object, for models of several")  # fmt: skip
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    sub.add_argument("--steps", type=at_least_one)
    sub.add_argument("--guidance", type=float)
    sub.add_argument("--seed", type=seed_number, default=0)
    sub.add_argument("--sampler", choices=("euler", "unipc", "consistency"))
    sub.add_argument("--device", default="auto")
    sub.add_argument("--compute", choices=("a16", "a8"), default="a16")
    sub.add_argument("--parts", metavar="MODEL", help="original that holds encoder and decoder")
    sub.add_argument(
        "--memory",
        choices=("resident", "lean"),
        default="resident",
        help="lean: free each phase's network after it",
    )
    sub.add_argument("--one-batch", action="store_true",
                     help="guidance as one batch of two; without it in two passes, of which the "
                     "unconditional one needs a single token and gives the same")  # fmt: skip
    sub.add_argument("--cuda-graphs", action="store_true",
                     help="on a GPU: record the network's calls, then replay them")  # fmt: skip
    sub.add_argument("--resolution", type=at_least_one, help="cells a side of the decoded grid")
    sub.add_argument("--format", choices=("glb", "obj", "ply", "stl"), default="glb")

    sub = command(
        evaluate,
        "two folders of meshes, compared by name",
        "evaluate originals compressed -o report.json",
    )
    sub.add_argument("reference", type=Path, metavar="REFERENCE_DIR")
    sub.add_argument("candidate", type=Path, metavar="CANDIDATE_DIR")
    sub.add_argument("-o", "--out", type=Path)
    sub.add_argument("--resolution", type=at_least_one, default=64, help="voxels along a side")
    sub.add_argument("--points", type=at_least_one, default=10_000, help="surface samples")
    sub.add_argument("--tau", type=float, default=0.05, help="of the F-score, in [-1, 1]")
    sub.add_argument("--align", choices=("rigid", "similarity", "none"), default="rigid")

    sub = command(inspect, "what a packed file holds (without torch)", "inspect model.safetensors")
    sub.add_argument("packed", type=Path)

    sub = command(
        bench,
        "bytes, operations, seconds and memory, beside the original",
        "bench model.safetensors --original hunyuan3d-dit-v2-mini",
    )
    sub.add_argument("model", help="a packed file, or an original checkpoint")
    sub.add_argument("--original", metavar="MODEL", help="what the packed file was made from")
    sub.add_argument("-o", "--out", type=Path)
    sub.add_argument("--device", default="auto")
    sub.add_argument("--compute", choices=("a16", "a8"), default="a16")
    sub.add_argument("--repeats", type=at_least_one, default=5)
    sub.add_argument("--cond-tokens", type=at_least_one)
    sub.add_argument("--steps", type=at_least_one, help="of the one picture to mesh")
    sub.add_argument("--no-pass", action="store_true", help="time the network's steps alone")
    sub.add_argument("--cuda-graphs", action="store_true", help="on a GPU: steps as CUDA graphs")
    sub.add_argument("--resolution", type=at_least_one, help="cells a side of the decoded grid")

    sub = command(
        random_checkpoint,
        "full-size random weights in a released layout, for tests and benchmarks",
        "random-checkpoint hunyuan3d-2mini -o mini",
    )
    sub.add_argument("name", help="hunyuan3d-2.0, hunyuan3d-2mini, step1x-3d, trellis-ss, ...")
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    sub.add_argument("--parts", type=lambda text: text.split(","),
                     default=["dit", "decoder", "conditioner"],
                     help="some of dit,decoder,conditioner; all by default")  # fmt: skip
    sub.add_argument("--seed", type=seed_number, default=0)

    sub = command(
        tune,
        "measures a file's GEMMs on this GPU, once, and keeps the fastest configurations",
        "tune model.safetensors --tokens 512,1370",
    )
    sub.add_argument("packed", type=Path)
    sub.add_argument("--tokens", type=steps_list, default=[512, 1370],
                     help="lengths of latents and condition, e.g. 512,1370")  # fmt: skip
    sub.add_argument("--device", default="cuda:0")
    sub.add_argument("--again", action="store_true", help="also what was measured before")

    command(doctor, "what this installation can do, and what it lacks", "doctor")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 done, 2 the user's mistake, 130 interrupted."""
    try:
        options = build_parser().parse_args(arguments)
        options.run(options)
    except UserError as error:
        sys.exit(_complain(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(
            _complain(
                "interrupted; nothing half-written has a final name; run it again (analyze with "
                "--resume) to go on",
                130,
            )
        )
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            where = f" ({error.filename})" if error.filename else ""
            sys.exit(_complain(f"{error.strerror}{where}", 2))
        raise


def _complain(line: str, code: int) -> int:
    print(f"vitapack: {' '.join(line.split())}", file=sys.stderr)
    return code
