"""Writes the trained networks as one checkpoint in the Hunyuan3D family's released layout.

    python -m benchmarks.furniture.export data.npz runs/autoencoder runs/encoder runs/dit \\
        -o runtime/bundled/furniture

Writes `config.yaml`, `model.fp16.safetensors` (model.*, vae.*, conditioner.*), the attribution of
every shape, and held-out images with their true shapes: unseen views of training shapes and, for
the final table only, unseen shapes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from benchmarks.furniture.autoencoder import Autoencoder, distances
from benchmarks.furniture.encoder import load_autoencoder
from benchmarks.furniture.page import SAMPLING, TRAINING
from benchmarks.furniture.train import furniture_config
from benchmarks.furniture.training import grid_iou, load_data

HELD_OUT = {"unseen-views": 48, "validation-views": 32}  # of training shapes; disjoint
SEED_OF_SETS = 0
# Until benchmarks.furniture.sampling has run on this model: export, run it, export again.
FIRST_CHOICE = {"guidance": 3.0, "steps": 20}


def weights(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """All tensors in fp16; the decoder's first layer includes the latents' normalisation."""
    norm = torch.load(options.encoder / "latents.pt", weights_only=True)
    decoder = load_autoencoder(options.autoencoder).decoder.state_dict()
    first = decoder["post_kl.weight"]
    decoder["position"] = decoder["position"] + norm["mean"] @ first.T
    decoder["post_kl.weight"] = first * norm["scale"]
    dit = torch.load(options.dit / "checkpoint.pt", weights_only=True)["average"]
    encoder = torch.load(options.encoder / "checkpoint.pt", weights_only=True)["average"]
    networks = {
        "model": dit,
        "vae": decoder,
        "conditioner": {
            key.removeprefix("encoder."): value
            for key, value in encoder.items()
            if key.startswith("encoder.")
        },
    }
    return {
        f"{prefix}.{key}": value.half().contiguous()
        for prefix, tensors in networks.items()
        for key, value in tensors.items()
    }


def config(hidden: int) -> dict:
    dit = furniture_config(hidden)
    chosen = FIRST_CHOICE
    if SAMPLING.exists():
        chosen = json.loads(SAMPLING.read_text())["chosen"]
    return {
        "model": {
            "target": "vitapack.furniture.FurnitureDiT",
            "params": {
                "in_channels": dit.in_channels,
                "context_in_dim": dit.cond_channels,
                "hidden_size": dit.hidden,
                "mlp_ratio": dit.mlp_ratio,
                "num_heads": dit.heads,
                "depth": len(dit.double_blocks),
                "depth_single_blocks": len(dit.single_blocks),
                "qkv_bias": dit.qkv_bias,
                "guidance_embed": dit.embeds_guidance,
            },
        },
        "vae": {
            "target": "vitapack.furniture.FurnitureDecoder",
            "params": {
                "latent_channels": 16,
                "width": 192,
                "heads": 4,
                "layers": 2,
                "scale_factor": 1.0,
            },
        },
        "conditioner": {
            "target": "vitapack.furniture.FurnitureEncoder",
            "params": {"width": 192, "heads": 4, "layers": 4},
        },
        "scheduler": {
            "target": "vitapack.furniture.FlowMatchEulerDiscreteScheduler",
            "params": {"num_train_timesteps": 1000, "shift": 1.0},
        },
        "pipeline": {
            "num_inference_steps": chosen["steps"],
            "guidance_scale": chosen["guidance"],
        },
    }


def held_out(data: dict, shapes: list[str], out: Path, autoencoder: Autoencoder) -> None:
    """Writes four disjoint sets of PNG images with alpha, and their true signed distances.

    Each shape is labelled with two IoUs: the autoencoder's, which no DiT can exceed, and that of
    the nearest training shape, chosen by the true shape, which a model must exceed to generalise.
    """
    position = {entry["id"]: number for number, entry in enumerate(data["entries"])}
    last = data["images"].shape[1] - 1
    trained = [position[name] for name in shapes]
    # A set's images are spread over all shapes; the unseen view is each shape's last.
    order = [trained[i] for i in np.random.default_rng(SEED_OF_SETS).permutation(len(trained))]
    sets, start = {}, 0
    for name, count in HELD_OUT.items():
        sets[name] = order[start : start + count]
        start += count
    for name in ("validation", "test"):
        sets[f"{name}-shapes"] = np.where(data["split"] == name)[0]
    shutil.rmtree(out / "held-out", ignore_errors=True)
    known = data["distance"][trained] < 0
    known = np.concatenate([known, known[:, ::-1]]).reshape(2 * len(trained), -1)
    for name, index in sets.items():
        folder = out / "held-out" / name
        folder.mkdir(parents=True, exist_ok=True)
        index = [int(i) for i in index]
        exact = distances(data, np.array(index), np.zeros(len(index), bool))
        with torch.no_grad():
            decoded = torch.cat(
                [autoencoder.decoder(autoencoder.encoder(batch)[0]) for batch in exact.split(8)]
            )
        ceiling = grid_iou(decoded, exact < 0)
        clipped, labels = [], {}
        for number, i in enumerate(index):
            entry = data["entries"][i]
            words = "".join(c if c.isalnum() else "-" for c in entry["name"].lower())
            stem = f"{number:02d}-{words}"
            grey = data["images"][i, last]
            alpha = np.where(grey == 255, 0, 255).astype(np.uint8)
            Image.fromarray(np.dstack([grey, alpha]), "LA").save(
                folder / f"{stem}.png", optimize=True
            )
            clipped.append(np.clip(data["distance"][i], -64, 64))
            truth = (data["distance"][i] < 0).reshape(-1)
            nearest = (known & truth).sum(1) / (known | truth).sum(1)
            labels[stem] = {
                "id": entry["id"],
                "category": entry["category"],
                "autoencoder_iou": round(float(ceiling[number]), 4),
                "nearest_training_iou": round(float(nearest.max()), 4),
            }
        np.savez_compressed(folder / "distances.npz", **dict(zip(labels, clipped, strict=True)))
        (folder / "labels.json").write_text(json.dumps(labels, indent=1) + "\n")


def attribution(data: dict, shapes: list[str]) -> str:
    """One line per shape with the attribution that its licence requires."""
    keys = ("id", "name", "creator", "library", "licence")
    lines = ["\t".join([*keys, "used for"])]
    for entry in data["entries"]:
        use = "autoencoder and DiT" if entry["id"] in shapes else "autoencoder"
        use = use if entry["split"] == "train" else f"{entry['split']} only"
        lines.append("\t".join([*(str(entry[key]) for key in keys), use]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("autoencoder", type=Path)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("dit", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--body", type=float, default=0.0)
    parser.add_argument("--hidden", type=int, default=128)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = load_data(options.data, options.body)
    shapes = torch.load(options.encoder / "latents.pt", weights_only=True)["shapes"]
    tensors = weights(options)
    save_file(tensors, options.out / "model.fp16.safetensors", metadata={"format": "pt"})
    text = yaml.safe_dump(config(options.hidden), sort_keys=False)
    (options.out / "config.yaml").write_text(text)
    (options.out / "ATTRIBUTION.tsv").write_text(attribution(data, shapes))
    logs = {
        name: [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for name, folder in (
            ("autoencoder", options.autoencoder),
            ("image encoder", options.encoder),
            ("DiT", options.dit),
        )
    }
    TRAINING.write_text(json.dumps(logs, indent=1) + "\n")
    held_out(data, shapes, options.out, load_autoencoder(options.autoencoder))
    for prefix in ("model", "vae", "conditioner"):
        size = sum(v.numel() for k, v in tensors.items() if k.startswith(prefix + "."))
        print(f"{prefix}: {size / 1e6:.2f} M parameters, {2 * size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
