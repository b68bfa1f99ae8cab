"""`vitapack generate`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitapack.runtime.choices import COMPUTES, MEMORY_MODES, MESH_FORMATS, SAMPLERS, VIEWS
from vitapack.runtime.errors import UserError
from vitapack.runtime.files import destination
from vitapack.terminal import COUNT, SEED, say, watched

HELP = "turn images into meshes"
EXAMPLE = "generate model.safetensors chair.png -o meshes --seed 1"


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("packed", help="a packed file, or an original checkpoint")
    add("images", type=Path, nargs="*", help="images or folders of images")
    for view in VIEWS:
        add(
            f"--{view}",
            type=Path,
            metavar="IMAGE",
            help="one view of an object, for multi-view models",
        )
    add("-o", "--out", type=Path, required=True, metavar="DIR")
    add("--steps", type=COUNT)
    add("--guidance", type=float)
    add("--seed", type=SEED, default=0)
    add("--sampler", choices=SAMPLERS)
    add("--device", default="auto")
    add("--compute", choices=COMPUTES, default="a16")
    add("--parts", metavar="MODEL", help="original checkpoint with image encoder and shape decoder")
    add(
        "--memory",
        choices=MEMORY_MODES,
        default="resident",
        help="lean: evict each network after its phase",
    )
    add(
        "--one-batch",
        action="store_true",
        help="guidance as one batch of two; by default two passes, of which the "
        "unconditional one needs a single token and gives the same result",
    )
    add(
        "--cuda-graphs",
        action="store_true",
        help="on a GPU: capture the network's calls once, then replay them",
    )
    add("--resolution", type=COUNT, help="cells per side of the decoded grid")
    add("--format", choices=MESH_FORMATS, default="glb")


def run(options: Namespace) -> None:
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
    with watched(options.quiet) as control:
        for number, places in enumerate(objects):
            path = next(iter(places.values()))
            control.step("meshes", number, len(objects))
            target = target_of(options, places)
            try:
                images = {view: load_image(place) for view, place in places.items()}
                mesh = pipeline(
                    images.get("", images), name=str(path), seed=options.seed,
                    steps=options.steps, guidance=options.guidance, sampler=options.sampler,
                    one_batch=options.one_batch,
                    progress=lambda done, total: control.report("steps", done, total),
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
                    "queries": pipeline.decoder.queries,
                }
            )
        control.report("meshes", len(objects), len(objects))
    lines = [mesh_line(row) for row in written]
    say(options, {"written": written, "failed": failed}, "\n".join(lines))
    if failed:
        for line in failed:
            print(f"vitapack: {line}", file=sys.stderr)
        raise UserError(f"{len(failed)} of {len(objects)} pictures gave no mesh (named above)")


def target_of(options: Namespace, places: dict[str, Path]) -> Path:
    """The mesh of one object is called as its first picture."""
    return Path(options.out, f"{next(iter(places.values())).stem}.{options.format}")


def pictures_of(options: Namespace) -> list[dict[str, Path]]:
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
