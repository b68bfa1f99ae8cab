"""Trains the shape autoencoder: 64^3 signed distances <-> 64 latent tokens x 16 channels.

    python -m benchmarks.furniture.autoencoder data.npz -o runs/autoencoder --minutes 20

The target is occupancy, softened by the signed distance over one cell to either side, so that the
zero level of the logits is a smooth surface (hard occupancy left stripes).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.furniture.training import Trainer, grid_iou, launch, load_data
from vitapack.runtime.families.furniture.networks import Block, FurnitureDecoder, FurnitureVAEConfig

KL = 1e-4


class ShapeEncoder(nn.Module):
    """Distances (B, 64, 64, 64) in cells, clipped to +-4, to mean and log-variance (B, 64, C)."""

    def __init__(self, config: FurnitureVAEConfig) -> None:
        super().__init__()
        self.stem = nn.Conv3d(8, 32, 3, padding=1)
        self.down16 = nn.Conv3d(32, 64, 3, stride=2, padding=1)
        self.down8 = nn.Conv3d(64, 128, 3, stride=2, padding=1)
        self.down4 = nn.Conv3d(128, config.width, 3, stride=2, padding=1)
        self.block = Block(config.width, config.heads)
        self.out = nn.Linear(config.width, 2 * config.latent_channels)

    def forward(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        x = (
            torch.tanh(distance / 2)
            .unflatten(1, (32, 2))
            .unflatten(3, (32, 2))
            .unflatten(5, (32, 2))
        )
        x = x.permute(0, 2, 4, 6, 1, 3, 5).flatten(1, 3)
        x = F.silu(self.stem(x))
        x = F.silu(self.down16(x))
        x = F.silu(self.down8(x))
        x = self.down4(x).flatten(2).transpose(1, 2)
        mean, log_variance = self.out(self.block(x)).chunk(2, dim=-1)
        return mean, log_variance.clamp(-12, 4)


class Autoencoder(nn.Module):
    def __init__(self, config: FurnitureVAEConfig) -> None:
        super().__init__()
        self.encoder = ShapeEncoder(config)
        self.decoder = FurnitureDecoder(config)

    def forward(self, distance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(distance)
        noisy = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(noisy), mean, log_variance


def reconstruction_loss(logits: Tensor, distance: Tensor) -> Tensor:
    """Cross-entropy to the softened occupancy; cells within two cells of the surface weigh 5x."""
    target = (0.5 - distance / 2).clamp(0, 1)
    weight = 1 + 4 * (distance.abs() < 2)
    loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    return (loss * weight).mean()


def distances(data: dict, index: np.ndarray, mirror: np.ndarray) -> Tensor:
    """(B, 64, 64, 64) float32 distances in cells; those with `mirror` set are mirrored in x."""
    batch = data["distance"][index].astype(np.float32) / 32
    batch[mirror] = batch[mirror][:, ::-1]
    return torch.from_numpy(batch)


def worker(rank: int, workers: int, options: argparse.Namespace) -> None:
    data = load_data(options.data, options.body, images=False)
    train, unseen = (np.where(data["split"] == name)[0] for name in ("train", "validation"))
    torch.manual_seed(rank)
    rng = np.random.default_rng(rank + 1000 * int(options.minutes))
    config = FurnitureVAEConfig()
    model = Autoencoder(config)
    trainer = Trainer(
        model, options.out, rank=rank, workers=workers, minutes=options.minutes,
        rate=options.rate, ema=0.998, save_every=120,
    )  # fmt: skip
    recent: list[float] = []

    def evaluate() -> None:
        if rank:
            return
        average = trainer.averaged(Autoencoder(config))
        scores = {}
        for name, index in (("train", train[:40]), ("unseen", unseen)):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                found = [
                    grid_iou(average.decoder(average.encoder(d)[0]), d < 0)
                    for d in distances(data, index, np.zeros(len(index), bool)).split(8)
                ]
            scores[name] = torch.cat(found).mean()
        trainer.log(loss=np.mean(recent[-100:]), **scores)

    for share in trainer.steps(evaluate, options.evaluate_every):
        index = rng.choice(train, options.batch)
        distance = distances(data, index, rng.random(options.batch) < 0.5)
        with torch.autocast("cpu", torch.bfloat16):
            logits, mean, log_variance = model(distance)
        kl = (
            0.5 * (mean.float() ** 2 + log_variance.float().exp() - 1 - log_variance.float()).mean()
        )
        loss = reconstruction_loss(logits, distance) + KL * kl
        recent.append(trainer.update(loss, share, options.batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument(
        "--body", type=float, default=0.0, help="lowest share of cells that survive erosion"
    )
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=8, help="per process")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--evaluate-every", type=float, default=120, help="seconds")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    launch(worker, options.workers, options)


if __name__ == "__main__":
    main()
