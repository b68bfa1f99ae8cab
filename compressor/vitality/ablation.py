"""One ablation: a picture generated without some blocks, and how far that is from the full model's.

    with runner(pipeline, settings, cache, jobs=2) as run:
        for position, record in run([("full", (digest, name, image)), ...]): ...

Every record depends on its task alone: noise and clouds have seeds of their own, made from the
picture and the removed blocks, so neither order nor processes show in the results.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vitapack.compressor.evaluate.metrics import grid_iou
from vitapack.compressor.vitality.table import debias
from vitapack.runtime.decode.mesh import Mesh
from vitapack.runtime.errors import UserError
from vitapack.runtime.files import atomic_path
from vitapack.runtime.progress import Control, Flag

if TYPE_CHECKING:
    from vitapack.runtime.networks.network import Network
    from vitapack.runtime.pipeline.pipeline import Pipeline

Block = tuple[str, int]  # kind and original index
# Three more clouds of the full mesh an image: 24 images then pool 48 degrees of freedom.
FLOOR_DRAWS = 3
POLL_SECONDS = 0.2  # between two looks at whether a run with worker processes was cancelled
# EMD(Y, Y') is measured only where the distance is below this many floors. Beyond it, a floor that
# is wrong by 20 % moves the debiased distance by less than 4 %.
FLOOR_MATTERS = 2.0


@dataclass(frozen=True)
class Settings:
    """What, with the model, a record depends on: the journal's key is their hash."""

    metric: str
    points: int
    sampler: dict[str, Any]  # the pipeline's own settings with steps and guidance filled in
    seed: int
    gap: float  # certified relative gap of each EMD


@dataclass(frozen=True, eq=False)
class Full:
    """The full model's output for one picture, as all its ablations need it."""

    cond: np.ndarray  # (1, N, D)
    noise_seed: int
    latents: np.ndarray  # (1, L, C) float32
    solid: np.ndarray  # (R, R, R) bool
    centre: np.ndarray  # (3,) float64, of the mesh's bounding box
    half: float  # of its longest side
    cloud: np.ndarray  # (points, 3) in the frame
    floor: float


class Measure:
    """Runs generations and compares them. Its results depend on the task alone."""

    def __init__(
        self, pipeline: Pipeline, settings: Settings, cache: Path, control: Control
    ) -> None:
        """`control` cancels a task at work; its progress is not reported."""
        self.pipeline, self.settings, self.cache = pipeline, settings, cache
        self.control = control
        # Tasks come image by image; a second one is for the pair distances.
        self._load = functools.lru_cache(maxsize=2)(self._read)

    def full(self, digest: str, name: str, image: Image.Image) -> dict[str, Any]:
        noise_seed = _seed(self.settings.seed, digest, "noise") % 2**31
        try:
            cond = self.pipeline.condition(image, name, self.control)
            latents = self._latents(cond, noise_seed)
            grid = self.pipeline.grid(latents, self.control)
            mesh = self.pipeline.surface(grid)
        except UserError as error:
            return {"skipped": str(error)}
        low, high = mesh.vertices.min(0).astype(float), mesh.vertices.max(0).astype(float)
        centre, half = (low + high) / 2, float((high - low).max() / 2)
        cloud = self._sample(mesh, centre, half, digest, "full")
        draws = [
            self._distance(cloud, self._sample(mesh, centre, half, digest, f"floor {i}"))[
                "distance"
            ]
            for i in range(FLOOR_DRAWS)
        ]
        arrays = {
            "cond": cond.float().cpu().numpy(),
            "latents": latents.numpy(),
            "solid": np.packbits(grid > 0),
            "shape": np.array(grid.shape),
            "centre": centre,
            "half": np.array(half),
            "cloud": cloud,
            "floor": np.array(np.mean(draws)),
            "noise_seed": np.array(noise_seed),
        }
        with atomic_path(self.cache / f"{digest}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
        return {"noise_seed": noise_seed, "floors": draws}

    def without(self, digest: str, removed: tuple[Block, ...]) -> dict[str, Any]:
        full = self._load(digest)
        latent_mse, iou, mesh = None, 0.0, None
        try:
            latents = self._latents(
                torch.from_numpy(full.cond),
                full.noise_seed,
                self.pipeline.dit.without(*removed),
            )
            # Channels beyond the decoder's own are fixed places that some families carry along.
            own = slice(self.pipeline.decoder.latent_shape[-1])
            both = (full.latents, latents.numpy())
            before, after = (z[..., own].astype(np.float64) for z in both)
            latent_mse = float(np.square(after - before).sum() / np.square(before).sum())
            grid = self.pipeline.grid(latents, self.control)
            iou = grid_iou(grid, full.solid)
            mesh = self.pipeline.surface(grid)
        except UserError:  # NaN latents, or a grid without a surface
            pass
        label = json.dumps(removed)
        if mesh is None:
            cloud = _collapsed(full.cloud)
        else:
            cloud = self._sample(mesh, full.centre, full.half, digest, label)
        record = self._distance(full.cloud, cloud)
        floor, other = full.floor, None
        if mesh is not None and record["distance"] < FLOOR_MATTERS * full.floor:
            again = self._sample(mesh, full.centre, full.half, digest, f"{label} again")
            other = self._distance(cloud, again)["distance"]
            floor = (floor + other) / 2
        return record | {
            "floor": floor,
            "floor_without": other,
            "debiased": debias(record["distance"], floor, self.settings.metric),
            "chamfer": chamfer(full.cloud, cloud),
            "latent_mse": latent_mse,
            "iou": iou,
            "surface": mesh is not None,
        }

    def pair(self, a: str, b: str) -> dict[str, Any]:
        """The distance between the full outputs of two pictures, each in its own frame; of one
        picture from itself: to that shape collapsed into its centroid."""
        x, y = self._load(a).cloud, self._load(b).cloud
        return self._distance(x, _collapsed(x) if a == b else y)

    def _latents(
        self, cond: torch.Tensor, noise_seed: int, dit: Network | None = None
    ) -> torch.Tensor:
        sampler = self.settings.sampler
        return self.pipeline.latents(
            cond,
            self.pipeline.noise(noise_seed),
            steps=sampler["steps"],
            guidance=sampler["guidance"],
            dit=dit,
            control=self.control,
        )

    def _sample(
        self, mesh: Mesh, centre: np.ndarray, half: float, digest: str, label: str
    ) -> np.ndarray:
        from vitapack.kernels.emd.solve import sample_surface

        vertices = (mesh.vertices.astype(np.float64) - centre) / half
        seed = _seed(self.settings.seed, digest, label)
        cloud = sample_surface(vertices, mesh.faces, self.settings.points, seed=seed)
        return np.ascontiguousarray(cloud, dtype=np.float32)

    def _distance(self, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
        if self.settings.metric == "chamfer":
            return {"distance": chamfer(x, y), "gap": 0.0}
        from vitapack.kernels.emd.solve import emd

        found = emd(x, y, gap=self.settings.gap, threads=1)
        return {"distance": float(found.distance), "gap": float(found.gap)}

    def _read(self, digest: str) -> Full:
        with np.load(self.cache / f"{digest}.npz") as saved:
            shape = tuple(saved["shape"])
            solid = np.unpackbits(saved["solid"], count=int(np.prod(shape))).reshape(shape)
            return Full(
                cond=saved["cond"],
                noise_seed=int(saved["noise_seed"]),
                latents=saved["latents"],
                solid=solid.astype(bool),
                centre=saved["centre"],
                half=float(saved["half"]),
                cloud=saved["cloud"],
                floor=float(saved["floor"]),
            )


def chamfer(x: np.ndarray, y: np.ndarray) -> float:
    """Sum of the two mean squared nearest-neighbour distances: the paper's CD (Table A)."""
    from scipy.spatial import cKDTree

    there, back = cKDTree(y).query(x)[0], cKDTree(x).query(y)[0]
    return float(np.square(there).mean() + np.square(back).mean())


def _collapsed(cloud: np.ndarray) -> np.ndarray:
    return np.tile(cloud.mean(0, dtype=np.float64).astype(np.float32), (len(cloud), 1))


def _seed(seed: int, digest: str, label: str) -> int:
    """A seed of its own for every use, the same in whatever order or process it is asked for."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{digest}|{label}".encode()).digest()[:6], "big")


Task = tuple[str, tuple[Any, ...]]  # a method of Measure and its arguments
Run = Callable[[Sequence[Task]], Iterator[tuple[int, dict[str, Any]]]]

_worker: Measure | None = None


def _start(pipeline: Pipeline, settings: Settings, cache: Path, flag: Flag, threads: int) -> None:
    global _worker
    # Ctrl-C reaches every process of a terminal: the parent alone acts on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _worker = Measure(pipeline, settings, cache, Control(flag=flag))


def _do(task: Task) -> dict[str, Any]:
    assert _worker is not None
    return getattr(_worker, task[0])(*task[1])


@contextlib.contextmanager
def runner(
    pipeline: Pipeline, settings: Settings, cache: Path, jobs: int, control: Control
) -> Iterator[Run]:
    """Yields a function from tasks to (position, record) in the order in which they finish.

    That function raises Cancelled after `control.cancel()`, and tasks at work end early.
    """
    if jobs == 1:
        measure = Measure(pipeline, settings, cache, control.quiet())

        def here(tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
            for position, (method, arguments) in enumerate(tasks):
                control.check()
                yield position, getattr(measure, method)(*arguments)

        yield here
        return

    import multiprocessing
    from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool

    # "spawn": a fork after torch has started its threads can hang.
    context = multiprocessing.get_context("spawn")
    flag = context.Event()
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=context,
        initializer=_start,
        initargs=(pipeline, settings, cache, flag, torch.get_num_threads()),
    )

    def there(tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
        position = {pool.submit(_do, task): i for i, task in enumerate(tasks)}
        waiting = set(position)
        while waiting:
            control.check()
            done, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
            for future in done:
                yield position[future], future.result()

    try:
        yield there
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory; go on with --resume and "
            "fewer jobs"
        ) from error
    finally:
        if control.cancelled:
            flag.set()
        pool.shutdown(wait=True, cancel_futures=True)
