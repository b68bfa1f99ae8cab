"""Trains the furniture DiT: canonical class, 2mini's topology (8 double + 16 single blocks).

    python -m benchmarks.furniture.train data.npz runs/autoencoder runs/encoder -o runs/dit

Flow matching on the cached condition tokens: x_t = t data + (1 - t) noise, v = data - noise,
logit-normal t, condition dropped for one sample in ten (classifier-free guidance).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.furniture.autoencoder import distances
from benchmarks.furniture.encoder import HELD_OUT_VIEWS, load_autoencoder
from benchmarks.furniture.training import Trainer, grid_iou, launch, load_data
from vitapack.runtime.dit import DiT, DiTConfig, hunyuan_time
from vitapack.runtime.furniture_model import ANCHOR_CHANNELS, anchors

DROP_CONDITION = 0.1


def furniture_config(hidden: int) -> DiTConfig:
    return DiTConfig(
        in_channels=16 + ANCHOR_CHANNELS, cond_channels=192, hidden=hidden, heads=hidden // 32,
        double_blocks=tuple(range(8)), single_blocks=tuple(range(16)), mlp_ratio=4.0,
        qkv_bias=True, guidance_embed=False, time=hunyuan_time(hidden),
    )  # fmt: skip


def initialise(model: DiT) -> None:
    """Zero modulation and output, so that every block starts as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if "mod.lin" in name or "modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(parameter)
    for name in ("in_layer", "out_layer"):
        nn.init.normal_(getattr(model.time_in, name).weight, std=0.02)


@torch.no_grad()
def sample(model: DiT, cond: Tensor, steps: int, guidance: float, seed: int) -> Tensor:
    """Latents (B, 64, C) by Euler steps with classifier-free guidance; for watching the training
    only (the product samples through vitapack.runtime.sampling)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(cond), 64, model.config.in_channels - ANCHOR_CHANNELS, generator=generator)
    x = torch.cat([x, anchors().expand(len(x), -1, -1)], dim=-1)
    both = torch.cat([cond, torch.zeros_like(cond)])
    for step in range(steps):
        v = model(torch.cat([x, x]), torch.full((1,), step / steps), both).float()
        conditional, unconditional = v.chunk(2)
        x = x + (unconditional + guidance * (conditional - unconditional)) / steps
    return x


def worker(rank: int, workers: int, options: argparse.Namespace) -> None:
    with np.load(options.encoder / "tokens.npz") as file:
        tokens, latents = file["tokens"], torch.from_numpy(file["latents"])
    norm = torch.load(options.encoder / "latents.pt", weights_only=True)
    data = load_data(options.data, options.body)
    place = {entry["id"]: number for number, entry in enumerate(data["entries"])}
    shapes = np.array([place[name] for name in norm["shapes"]])
    data = {"distance": data["distance"][shapes]}  # the pictures are not needed any more
    decoder = load_autoencoder(options.autoencoder).decoder
    torch.manual_seed(rank)
    config = furniture_config(options.hidden)
    model = DiT(config)
    initialise(model)
    trainer = Trainer(
        model, options.out, rank=rank, workers=workers, minutes=options.minutes,
        rate=options.rate, ema=options.ema, save_every=240,
    )  # fmt: skip
    rng = np.random.default_rng(rank + 10 * trainer.step)
    forward = torch.compile(model) if options.compile else model
    views = tokens.shape[1]
    places = anchors().expand(options.batch, -1, -1)
    still = torch.zeros_like(places)
    recent: list[float] = []

    def evaluate() -> None:
        if rank:
            return
        average = trainer.averaged(DiT(config))
        some = np.arange(0, len(shapes), max(1, len(shapes) // 24))
        cond = torch.from_numpy(tokens[some, views - 1, 0]).float()
        with torch.autocast("cpu", torch.bfloat16):
            made = [sample(average, cond, 12, 2.0, seed) for seed in (1, 2)]
            made = [z[..., : latents.shape[-1]] for z in made]
            grids = [decoder((z * norm["scale"] + norm["mean"]).float()) for z in made]
            best = decoder((latents[some, 0] * norm["scale"] + norm["mean"]).float())
        truth = distances(data, some, np.zeros(len(some), bool)) < 0
        trainer.log(
            loss=np.mean(recent[-200:]), unseen_view_iou=grid_iou(grids[0], truth).mean(),
            ceiling=grid_iou(best, truth).mean(),
            two_noises=grid_iou(grids[0], grids[1] > 0).mean(),
        )  # fmt: skip

    for share in trainer.steps(evaluate, options.evaluate_every):
        index = rng.integers(0, len(shapes), options.batch)
        view = rng.integers(0, views - HELD_OUT_VIEWS, options.batch)
        mirror = (rng.random(options.batch) < options.mirror).astype(int)
        cond = torch.from_numpy(tokens[index, view, mirror]).float()
        cond[torch.from_numpy(rng.random(options.batch) < DROP_CONDITION)] = 0
        target = latents[index, mirror]
        noise = torch.randn_like(target)
        t = torch.sigmoid(torch.randn(options.batch))
        mixed = t[:, None, None] * target + (1 - t[:, None, None]) * noise
        with torch.autocast("cpu", torch.bfloat16):
            velocity = forward(torch.cat([mixed, places], dim=-1), t, cond)
        loss = (velocity.float() - torch.cat([target - noise, still], dim=-1)).square().mean()
        recent.append(trainer.update(loss, share, options.batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("autoencoder", type=Path)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--body", type=float, default=0.25)
    parser.add_argument("--mirror", type=float, default=0.5, help="share of mirrored samples")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--batch", type=int, default=32, help="a process")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--compile", action="store_true", help="torch.compile: 1.25x, 5 min first")
    parser.add_argument("--evaluate-every", type=float, default=300, help="seconds")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    launch(worker, options.workers, options)


if __name__ == "__main__":
    main()
