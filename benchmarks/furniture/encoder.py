"""Trains the image encoder against the autoencoder's latents, then writes the DiT's training set.

    python -m benchmarks.furniture.encoder data.npz runs/autoencoder -o runs/encoder --minutes 12
    python -m benchmarks.furniture.encoder ... --cache     # runs/encoder/tokens.npz for the DiT

With a weak image encoder, the main failure of the first model, the DiT generates another, perfectly
sharp, training shape. So the encoder is trained first and then frozen, as the published models do
with DINOv2. A head of 64 queries regresses the latents, and the summary token classifies the shape.
The regression alone identified 1.5 % of unseen views after 34,000 images: most of a latent's
variance is detail, which is a weak signal.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.furniture.autoencoder import Autoencoder, distances
from benchmarks.furniture.training import Trainer, grid_iou, launch, load_data
from vitapack.runtime.families.furniture.networks import (
    LATENT_TOKENS,
    Attention,
    Block,
    FurnitureEncoder,
    FurnitureEncoderConfig,
    FurnitureVAEConfig,
)

IDENTITY = 0.3  # weight of the shape classification, relative to the latents' squared error
HELD_OUT_VIEWS = 4  # the last views of every shape are not trained on


class LatentHead(nn.Module):
    """From condition tokens (B, 50, width) to latents (B, 64, C); discarded after this training."""

    def __init__(self, config: FurnitureEncoderConfig, channels: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(LATENT_TOKENS, config.width) * 0.02)
        self.cross = nn.ModuleList(Attention(config.width, config.heads) for _ in range(2))
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(2))
        self.out = nn.Linear(config.width, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.query.expand(len(tokens), -1, -1)
        for cross, block in zip(self.cross, self.blocks, strict=True):
            x = block(x + cross(x, tokens))
        return self.out(x)


class Regressor(nn.Module):
    """From images (B, 112, 112) to latents (B, 64, C) and shape scores (B, shapes)."""

    def __init__(self, config: FurnitureEncoderConfig, channels: int, shapes: int) -> None:
        super().__init__()
        self.encoder = FurnitureEncoder(config)
        self.head = LatentHead(config, channels)
        self.which = nn.Linear(config.width, shapes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.encoder(images)
        return self.head(tokens), self.which(tokens[:, 0])


def chosen_shapes(data: dict, count: int) -> np.ndarray:
    """Indices of the first `count` training shapes in the order of their ids' hashes.

    A larger selection thus contains every smaller one.
    """
    train = np.where(data["split"] == "train")[0]
    order = sorted(train, key=lambda i: hash_order(data["entries"][i]["id"]))
    return np.array(order[:count])


def hash_order(name: str) -> str:
    import hashlib

    return hashlib.sha256(name.encode()).hexdigest()[16:32]


def load_autoencoder(folder: Path) -> Autoencoder:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    model = Autoencoder(FurnitureVAEConfig())
    model.load_state_dict(state["average"])
    return model.eval()


@torch.no_grad()
def all_latents(model: Autoencoder, data: dict, index: np.ndarray) -> Tensor:
    """(N, 2, 64, C): the mean latents of each shape, unchanged and mirrored in x."""
    out = []
    for mirrored in (False, True):
        parts = [
            model.encoder(distances(data, part, np.full(len(part), mirrored)))[0]
            for part in np.array_split(index, max(1, len(index) // 16))
        ]
        out.append(torch.cat(parts))
    return torch.stack(out, dim=1)


def images_of(data: dict, shape: np.ndarray, view: np.ndarray, mirror: np.ndarray) -> Tensor:
    """Images (B, 112, 112) in 0..1; those with `mirror` set are mirrored in x."""
    batch = data["images"][shape, view].astype(np.float32) / 255
    batch[mirror] = batch[mirror][:, :, ::-1]
    return torch.from_numpy(batch)


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Random small shifts, and gains of the object's grey, against sensitivity to exposure."""
    count = len(images)
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (count, 1, 1)).astype(np.float32))
    images = torch.where(images < 0.999, (images * gain).clamp(0, 0.995), images)
    shift = rng.integers(-3, 4, (count, 2))
    return torch.stack(
        [image.roll(tuple(map(int, s)), (0, 1)) for image, s in zip(images, shift, strict=True)]
    )


def worker(rank: int, workers: int, options: argparse.Namespace) -> None:
    data = load_data(options.data, options.body)
    shapes = chosen_shapes(data, options.shapes)
    autoencoder = load_autoencoder(options.autoencoder)
    latents = all_latents(autoencoder, data, shapes)
    mean = latents.mean((0, 1))
    scale = (latents - mean).std((0, 1, 2))
    latents = (latents - mean) / scale
    torch.manual_seed(rank)
    rng = np.random.default_rng(rank + 77)
    config = FurnitureEncoderConfig()
    model = Regressor(config, latents.shape[-1], len(shapes))
    trainer = Trainer(
        model, options.out, rank=rank, workers=workers, minutes=options.minutes,
        rate=options.rate, ema=0.998, weight_decay=0.05, save_every=120, start=options.start,
    )  # fmt: skip
    if rank == 0:
        names = [data["entries"][i]["id"] for i in shapes]
        torch.save({"mean": mean, "scale": scale, "shapes": names}, options.out / "latents.pt")
    views = data["images"].shape[1]
    recent: list[float] = []

    def evaluate() -> None:
        if rank:
            return
        average = trainer.averaged(Regressor(config, latents.shape[-1], len(shapes)))
        shape = np.repeat(np.arange(len(shapes)), 2)
        view = np.tile([views - 1, views - 2], len(shapes))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            unseen = images_of(data, shapes[shape], view, np.zeros(len(shape), bool))
            outputs = [average(batch) for batch in unseen.split(64)]
            guess, scores = (torch.cat(parts).float() for parts in zip(*outputs, strict=True))
            error = (guess - latents[shape, 0]).square().mean()
            right = (scores.argmax(1).numpy() == shape).mean()
            sampled = np.linspace(0, len(shape) - 1, 48).astype(int)
            grids = autoencoder.decoder(guess[sampled] * scale + mean)
        truth = distances(data, shapes[shape[sampled]], np.zeros(len(sampled), bool)) < 0
        trainer.log(
            loss=np.mean(recent[-100:]), unseen_view_error=error, retrieval=right,
            unseen_view_iou=grid_iou(grids, truth).mean(),
        )  # fmt: skip

    for share in trainer.steps(evaluate, options.evaluate_every):
        index = rng.integers(0, len(shapes), options.batch)
        view = rng.integers(0, views - HELD_OUT_VIEWS, options.batch)
        mirror = rng.random(options.batch) < 0.5
        images = augment(images_of(data, shapes[index], view, mirror), rng)
        with torch.autocast("cpu", torch.bfloat16):
            guess, scores = model(images)
        loss = (guess.float() - latents[index, mirror.astype(int)]).square().mean()
        known = F.cross_entropy(scores.float(), torch.from_numpy(index), label_smoothing=0.05)
        loss = loss + IDENTITY * known
        recent.append(trainer.update(loss, share, options.batch))


def cache(options: argparse.Namespace) -> None:
    """Writes tokens.npz: condition tokens (shapes, views, 50, width) float16, normalised latents
    (shapes, 64, C), and the tokens of one view of every validation shape."""
    data = load_data(options.data, options.body)
    norm = torch.load(options.out / "latents.pt", weights_only=True)
    position = {entry["id"]: number for number, entry in enumerate(data["entries"])}
    shapes = np.array([position[name] for name in norm["shapes"]])
    latents = all_latents(load_autoencoder(options.autoencoder), data, shapes)[:, 0]
    state = torch.load(options.out / "checkpoint.pt", weights_only=True)
    model = Regressor(FurnitureEncoderConfig(), latents.shape[-1], len(shapes))
    model.load_state_dict(state["average"])
    model.eval()
    validation = np.where(data["split"] == "validation")[0]
    views = np.arange(data["images"].shape[1])

    def encode(shape: int, view: np.ndarray) -> np.ndarray:
        batch = images_of(data, np.full(len(view), shape), view, np.zeros(len(view), bool))
        with torch.no_grad():
            return model.encoder(batch).half().numpy()

    np.savez(
        options.out / "tokens.npz",
        tokens=np.stack([encode(shape, views) for shape in shapes]),
        latents=((latents - norm["mean"]) / norm["scale"]).numpy(),
        validation=validation,
        validation_tokens=np.stack([encode(shape, views[-1:])[0] for shape in validation]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("autoencoder", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="folder of a training to start from")
    parser.add_argument("--body", type=float, default=0.0)
    parser.add_argument("--shapes", type=int, default=10_000, help="at most")
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--batch", type=int, default=48, help="per process")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--evaluate-every", type=float, default=90, help="seconds")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", action="store_true", help="only write tokens.npz")
    options = parser.parse_args()
    if options.cache:
        cache(options)
    else:
        launch(worker, options.workers, options)


if __name__ == "__main__":
    main()
