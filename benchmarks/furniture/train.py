"""Trains the furniture DiT: the runtime's DiT in 2mini's structure (8 double, 16 single blocks).

    python -m benchmarks.furniture.train data.npz runs/autoencoder runs/encoder -o runs/dit

Flow matching on the cached condition tokens: x_t = t data + (1 - t) noise, v = data - noise,
logit-normal t, condition dropped for one sample in ten (classifier-free guidance). Blocks are left
out at random (stochastic depth, per batch, which also saves time): a network of 24 blocks that has
always had all of them has no redundancy for pruning to find.
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
from vitapack.runtime.families.furniture.networks import ANCHOR_CHANNELS, anchors
from vitapack.runtime.format.architecture import DiTConfig
from vitapack.runtime.networks.dit import DiT, hunyuan_time

DROP_CONDITION = 0.1
LEAVE_OUT = {"double": 0.05, "single": 0.15}  # probability per block and step
EVALUATED = 24  # shapes of each set in the curves
STEPS, GUIDANCE = 12, 3.0  # of the generations in the curves


def furniture_config(hidden: int) -> DiTConfig:
    return DiTConfig(
        in_channels=16 + ANCHOR_CHANNELS, cond_channels=192, hidden=hidden, heads=hidden // 32,
        double_blocks=tuple(range(8)), single_blocks=tuple(range(16)), mlp_ratio=4.0,
        qkv_bias=True, guidance_embed=False, time=hunyuan_time(hidden),
    )  # fmt: skip


def initialise(model: DiT) -> None:
    """Zeroes modulation and output, so that every block starts as the identity."""
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
    """Latents (B, 64, C) by Euler steps with classifier-free guidance, for the curves only; the
    product uses vitapack.runtime.sampling."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(cond), 64, model.config.in_channels - ANCHOR_CHANNELS, generator=generator)
    x = torch.cat([x, anchors().expand(len(x), -1, -1)], dim=-1)
    both = torch.cat([cond, torch.zeros_like(cond)])
    for step in range(steps):
        v = model(torch.cat([x, x]), torch.full((1,), step / steps), both).float()
        conditional, unconditional = v.chunk(2)
        x = x + (unconditional + guidance * (conditional - unconditional)) / steps
    return x


def left_out(config: DiTConfig, rng: np.random.Generator, scale: float) -> list[tuple[str, int]]:
    return [
        (kind, index)
        for kind, indices in (("double", config.double_blocks), ("single", config.single_blocks))
        for index in indices
        if rng.random() < scale * LEAVE_OUT[kind]
    ]


def worker(rank: int, workers: int, options: argparse.Namespace) -> None:
    with np.load(options.encoder / "tokens.npz") as file:
        tokens, latents = file["tokens"], torch.from_numpy(file["latents"])
        validation, validation_tokens = file["validation"], file["validation_tokens"]
    norm = torch.load(options.encoder / "latents.pt", weights_only=True)
    data = load_data(options.data, options.body, images=False)
    position = {entry["id"]: number for number, entry in enumerate(data["entries"])}
    shapes = np.array([position[name] for name in norm["shapes"]])
    decoder = load_autoencoder(options.autoencoder).decoder
    torch.manual_seed(rank)
    config = furniture_config(options.hidden)
    model = DiT(config)
    initialise(model)
    # Muon for the blocks' linears, not for the modulation: from the same checkpoint on the same
    # batches its loss was 0.207 after 9,600 samples, AdamW's 0.221 (Muon takes 16 % more time).
    linears = [
        parameter
        for name, parameter in model.named_parameters()
        if "_blocks." in name and parameter.ndim == 2 and ".lin." not in name
    ]
    trainer = Trainer(
        model, options.out, rank=rank, workers=workers, minutes=options.minutes,
        rate=options.rate, ema=options.ema, save_every=240, start=options.start, orthogonal=linears,
    )  # fmt: skip
    torch.manual_seed(rank + 1000 * trainer.step)
    rng = np.random.default_rng(rank + 10 * trainer.step)
    if options.compile:
        for block in [*model.double_blocks.values(), *model.single_blocks.values()]:
            block.compile()
    views = tokens.shape[1]
    positions = anchors().expand(options.batch, -1, -1)
    still = torch.zeros_like(positions)  # anchors have no velocity
    recent: list[float] = []
    sampled = np.linspace(0, len(shapes) - 1, EVALUATED).astype(int)
    sets = {
        "train": (shapes[sampled], tokens[sampled, 0]),
        "unseen_view": (shapes[sampled], tokens[sampled, views - 1]),
        "unseen_shape": (validation[:EVALUATED], validation_tokens[:EVALUATED]),
    }

    def evaluate() -> None:
        if rank:
            return
        average = trainer.averaged(DiT(config))
        scores = {}

        def grids(tokens: np.ndarray, seed: int) -> Tensor:
            cond = torch.from_numpy(tokens).float()
            with torch.autocast("cpu", torch.bfloat16):
                z = sample(average, cond, STEPS, GUIDANCE, seed)[..., : latents.shape[-1]]
                return decoder((z * norm["scale"] + norm["mean"]).float())

        for name, (index, tokens) in sets.items():
            truth = distances(data, index, np.zeros(len(index), bool)) < 0
            first = grids(tokens, 1)
            scores[f"{name}_iou"] = grid_iou(first, truth).mean()
            if name == "unseen_view":
                scores["two_seeds"] = grid_iou(first, grids(tokens, 2) > 0).mean()
                with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                    best = decoder((latents[sampled] * norm["scale"] + norm["mean"]).float())
                scores["ceiling"] = grid_iou(best, truth).mean()
        trainer.log(loss=np.mean(recent[-200:]), **scores)

    for share in trainer.steps(evaluate, options.evaluate_every):
        index = rng.integers(0, len(shapes), options.batch)
        view = rng.integers(0, views - HELD_OUT_VIEWS, options.batch)
        cond = torch.from_numpy(tokens[index, view]).float()
        cond[torch.from_numpy(rng.random(options.batch) < DROP_CONDITION)] = 0
        target = latents[index]
        noise = torch.randn_like(target)
        t = torch.sigmoid(torch.randn(options.batch))
        mixed = t[:, None, None] * target + (1 - t[:, None, None]) * noise
        with torch.autocast("cpu", torch.bfloat16):
            thinned = model.without(*left_out(config, rng, options.leave_out))
            velocity = thinned(torch.cat([mixed, positions], dim=-1), t, cond)
        loss = (velocity.float() - torch.cat([target - noise, still], dim=-1)).square().mean()
        recent.append(trainer.update(loss, share, options.batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("autoencoder", type=Path)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="folder of a training to start from")
    parser.add_argument("--body", type=float, default=0.0)
    parser.add_argument("--leave-out", type=float, default=1.0, help="scale of LEAVE_OUT")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--batch", type=int, default=32, help="per process")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    parser.add_argument("--evaluate-every", type=float, default=600, help="seconds")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    launch(worker, options.workers, options)


if __name__ == "__main__":
    main()
