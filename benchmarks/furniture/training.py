"""Shared by the three trainings: two data-parallel processes, EMA, checkpoints, a log.

Each process has one thread, with gloo between them: intra-op threads collapse when the cores are
shared. A checkpoint holds the whole state and is written atomically every few minutes; a run
resumes from it, so an interruption loses minutes. The learning rate is flat and decays over the
last fifth of the time budget, so that a larger budget continues from the flat part of a smaller
one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

DECAY = 0.2  # last share of the time budget, over which the learning rate decays to 2 %


def launch(worker: Callable[..., None], workers: int, *arguments: object) -> None:
    """Runs worker(rank, workers, *arguments) in that many processes of one thread each."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = str(20000 + os.getpid() % 20000)
    mp.spawn(_start, (workers, worker, arguments), nprocs=workers)


def _start(rank: int, workers: int, worker: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    worker(rank, workers, *arguments)
    dist.destroy_process_group()


class Trainer:
    """AdamW, and Muon for `orthogonal` matrices, with warm-up, a flat rate that decays over the
    last fifth of a time budget, clipping, EMA and checkpoints."""

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        *,
        rank: int,
        workers: int,
        minutes: float,
        rate: float,
        ema: float,
        weight_decay: float = 0.01,
        save_every: float = 180.0,
        start: Path | None = None,
        orthogonal: Sequence[nn.Parameter] = (),
    ) -> None:
        self.model, self.folder, self.rank, self.workers = model, folder, rank, workers
        if start is not None:
            copy_weights(model, start)
        self.seconds, self.rate, self.decay = minutes * 60, rate, ema
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # Two optimizers: Muon for the matrices in `orthogonal`, AdamW for all other parameters.
        named = {id(p) for p in orthogonal}
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [p for p in self.parameters if id(p) not in named],
                lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True,
            )
        ]  # fmt: skip
        if orthogonal:
            muon = torch.optim.Muon(
                orthogonal, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self.optimizers.append(muon)
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.step, self.used, self.samples, self.save_every = 0, 0.0, 0, save_every
        self.checkpoint = folder / "checkpoint.pt"
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.average = state["average"]
            self.step, self.used, self.samples = state["step"], state["used"], state["samples"]

    def save(self) -> None:
        if self.rank:
            return
        part = self.checkpoint.with_suffix(".part")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "average": self.average,
                "step": self.step,
                "used": self.used,
                "samples": self.samples,
            },
            part,
        )
        part.replace(self.checkpoint)

    def log(self, **values: float) -> None:
        if self.rank == 0:
            row = {"step": self.step, "hours": round(self.used / 3600, 4), "samples": self.samples}
            row |= {key: round(float(value), 5) for key, value in values.items()}
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)

    def steps(self, evaluate: Callable[[], None], evaluate_every: float) -> Iterator[float]:
        """Yields the learning rate's share of its peak until the time budget is used.

        Calls `evaluate` on all ranks every `evaluate_every` seconds; its time is not counted.
        """
        last_save = last_evaluation = self.used
        while True:
            # All ranks must take the same decision: rank 0's clock counts.
            clock = torch.tensor([self.used])
            dist.broadcast(clock, 0)
            self.used = clock.item()
            share = min(1.0, self.used / self.seconds)
            if share >= 1:
                break
            start = time.perf_counter()
            yield min(1.0, (self.step + 1) / 200, 0.02 + 0.98 * (1 - share) / DECAY)
            # A pause (SIGSTOP) must not use up the budget: no real step takes 20 seconds.
            self.used += min(20.0, time.perf_counter() - start)
            if self.used - last_evaluation > evaluate_every:
                last_evaluation = self.used
                evaluate()
            if self.used - last_save > self.save_every:
                last_save = self.used
                self.save()
        evaluate()
        self.save()

    def update(self, loss: Tensor, share: float, batch: int) -> float:
        """One optimizer step on the mean gradient of all ranks; returns this rank's loss."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = torch.cat([g.flatten() for g in gradients])
        if self.workers > 1:
            dist.all_reduce(flat)
            flat /= self.workers
        norm = flat.norm()
        flat *= torch.clamp(1.0 / (norm + 1e-6), max=1.0)
        for p, g in zip(
            self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True
        ):
            p.grad = g.view_as(p)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * share
            if torch.isfinite(norm):
                optimizer.step()
        self.step += 1
        self.samples += batch * self.workers
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for key, value in self.model.state_dict().items():
                if value.is_floating_point():
                    self.average[key].lerp_(value, 1 - decay)
        return loss.item()

    def averaged(self, blank: nn.Module) -> nn.Module:
        """`blank` with the EMA weights, in evaluation mode."""
        blank.load_state_dict(self.average)
        return blank.eval()


def copy_weights(model: nn.Module, folder: Path) -> None:
    """Copies the averaged weights of another training whose name and shape agree.

    The classifier of an encoder trained on fewer shapes keeps its initial weights.
    """
    average = torch.load(folder / "checkpoint.pt", weights_only=True)["average"]
    state = model.state_dict()
    fitting = {
        key: value
        for key, value in average.items()
        if key in state and state[key].shape == value.shape
    }
    if not fitting:
        raise SystemExit(f"{folder}: no tensor of this checkpoint fits the model")
    model.load_state_dict(state | fitting)
    print(f"start from {folder}: {len(fitting)} of {len(state)} tensors", flush=True)


def grid_iou(logits: Tensor, inside: Tensor) -> Tensor:
    """IoU of logits > 0 with a boolean grid, (B,)."""
    ours = (logits > 0).flatten(1)
    theirs = inside.flatten(1)
    return (ours & theirs).sum(1) / (ours | theirs).sum(1).clamp(min=1)


def load_data(path: Path, body: float, *, images: bool = True) -> dict:
    """The arrays of data.npz, with `entries` parsed and `split` (N,) added.

    Only shapes of which at least the share `body` survives an erosion by two cells; 0: all shapes.
    """
    left_out = {"entries"} if images else {"entries", "images"}
    with np.load(path) as file:
        chosen = file["body"] >= body
        data = {key: file[key][chosen] for key in file.files if key not in left_out}
        entries = json.loads(str(file["entries"]))
    data["entries"] = [entry for entry, keep in zip(entries, chosen, strict=True) if keep]
    data["split"] = np.array([entry["split"] for entry in data["entries"]])
    return data
