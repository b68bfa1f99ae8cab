"""Measures the image encoders at full size, with random weights: error in 8 bits, and memory.

    python -m benchmarks.published.encoders run --work /tmp/encoders  # minutes; 3.5 GB of disk
    python -m benchmarks.published.encoders page  # docs/published.md from the JSON

DINOv2-giant of Hunyuan3D, and DINOv2-large with registers of Step1X-3D and TRELLIS, each in its
family's conditioner, including image preparation. Every form runs in a fresh process in lean mode;
its peak is the kernel's high-water mark.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.published import run as published
from benchmarks.published.page import ENCODERS
from vitapack.compressor.tools.random_checkpoint import write
from vitapack.runtime.engines.choose import choose
from vitapack.runtime.families import hunyuan3d, step1x3d
from vitapack.runtime.families.furniture import family as furniture
from vitapack.runtime.loading.checkpoint_files import open_weights
from vitapack.runtime.loading.memory import resident, return_large_blocks
from vitapack.runtime.loading.source import Source

# Form -> dtype of activations, bits of the linears. The others are compared with the first.
FORMS = {"fp32": (torch.float32, 16), "fp16": (torch.float16, 16), "int8": (torch.float32, 8)}

CHILD = """
import sys
import torch
torch.set_num_threads(int(sys.argv[1]))
from vitapack.runtime.loading.memory import resident
base = resident(peak=True)
from benchmarks.published.encoders import one
one(base, *sys.argv[2:])
"""


def source_of(name: str, folder: Path) -> Source:
    """The conditioner of a checkpoint in released layout that contains nothing else."""
    if name.startswith("hunyuan3d"):
        sections = yaml.safe_load((folder / "config.yaml").read_text())
        config = sections["conditioner"]["params"]
        config |= {"image_processor": sections["image_processor"]["params"]}
        weights = open_weights(folder / "model.fp16.safetensors")
    else:
        place = folder / "visual_encoder"
        config = json.loads((place / "config.json").read_text())
        weights = open_weights(place / "diffusion_pytorch_model.safetensors")
    shapes = {tensor: weights.shape(tensor) for tensor in weights}
    return Source(str(folder), config, shapes, weights.read)


def one(base: int, name: str, folder: str, form: str, images: str, out: str) -> None:
    """Writes the images' condition tokens into the file `out`, and prints the figures."""
    return_large_blocks()
    dtype, bits = FORMS[form]
    family = hunyuan3d if name.startswith("hunyuan3d") else step1x3d
    conditioner = family.conditioner(
        source_of(name, Path(folder)), choose("cpu", dtype=dtype), bits
    )
    start = time.perf_counter()
    conditioner.component()
    loaded = time.perf_counter()
    tokens = {
        sample.name: conditioner(Image.open(sample.image_path), sample.name)
        for sample in islice(furniture.held_out("unseen-views"), int(images))
    }
    done = time.perf_counter()
    figures = {
        "base": base,
        "peak": resident(peak=True),
        "predicted": conditioner.component.nbytes,
        "load_seconds": loaded - start,
        "image_seconds": (done - loaded) / len(tokens),
        "transformers": getattr(sys.modules.get("transformers"), "__version__", None),
    }
    save_file(tokens, out)
    print(json.dumps(figures))


def compared(found: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Cosine of each token with the plain one, and the relative error of all."""
    cosine = torch.cat(
        [F.cosine_similarity(found[name], plain[name], dim=-1).flatten() for name in plain]
    )
    error = sum(float((found[name] - plain[name]).square().sum()) for name in plain)
    norm = sum(float(plain[name].square().sum()) for name in plain)
    return {
        "tokens": cosine.numel(),
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "relative_error": (error / norm) ** 0.5,
    }


def run(work: Path, names: list[str], forms: list[str], images: int, keep: bool) -> None:
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    for name in names:
        folder = work / f"{name}-encoder"
        if not folder.exists():
            write(name, folder, parts=("conditioner",))
        figures: dict[str, Any] = {"images": images, "forms": {}}
        features: dict[str, dict[str, torch.Tensor]] = {}
        for form in forms:
            out = work / f"{name}-{form}.safetensors"
            arguments = (threads, name, str(folder), form, str(images), str(out))
            done = subprocess.run(
                [sys.executable, "-c", CHILD, *arguments],
                capture_output=True, text=True, cwd=published.ROOT, check=False,
            )  # fmt: skip
            if done.returncode:
                sys.exit(f"{name} in {form}: {done.stderr[-2000:]}")
            features[form] = load_file(out)
            out.unlink()
            row = json.loads(done.stdout.strip().splitlines()[-1])
            if form != forms[0] and forms[0] == "fp32":
                row |= compared(features[form], features["fp32"])
            figures["forms"][form] = row
            print(name, form, json.dumps(row), flush=True)
            published.save("encoders", name, figures)
        if not keep:
            shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("run", "page"))
    parser.add_argument("--work", type=Path, default=Path("published-work"))
    parser.add_argument("--models", nargs="+", choices=tuple(ENCODERS), default=list(ENCODERS))
    parser.add_argument("--forms", nargs="+", choices=tuple(FORMS), default=list(FORMS))
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the random checkpoint")
    options = parser.parse_args()
    if options.action == "run":
        run(options.work, options.models, options.forms, options.images, options.keep)
    published.page()


if __name__ == "__main__":
    main()
