"""One ablation: a generation without some blocks, and its distance to the original's output.

    with runner(pipeline, settings, cache, jobs=2, control=control) as run:
        for position, record in run([("full", (digest, name, image)), ...]): ...

A record depends on its job alone: noise and clouds have their own seeds, derived from the image and
the removed blocks, so results do not depend on the order of the jobs or the number of processes.
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

BlockId = tuple[str, int]  # kind and original index
# Additional clouds of the original's mesh per image: 24 images then pool 48 degrees of freedom.
FLOOR_DRAWS = 3
POLL_SECONDS = 0.2  # between two checks for cancellation while workers run
# EMD(Y, Y') is measured only if the distance is below this many floors. Above, an error of 20 % in
# the floor changes the debiased distance by less than 4 %.
FLOOR_MATTERS = 2.0


@dataclass(frozen=True)
class Settings:
    """The settings that determine a record, together with the model. The journal's key is a hash of
    both."""

    metric: str
    points: int
    sampler: dict[str, Any]  # the pipeline's own settings with steps and guidance filled in
    seed: int
    gap: float  # certified relative gap of each EMD


@dataclass(frozen=True, eq=False)
class FullOutput:
    """The original's output for one image, which all ablations of that image are compared with."""

    cond: np.ndarray  # (1, N, D)
    noise_seed: int
    latents: np.ndarray  # (1, L, C) float32
    solid: np.ndarray  # (R, R, R) bool
    centre: np.ndarray  # (3,) float64, of the mesh's bounding box
    half: float  # half of its longest side
    cloud: np.ndarray  # (points, 3) float32, in the frame
    floor: float


class Measure:
    """Runs generations and compares them. The public methods are the jobs; a record depends on the
    arguments alone."""

    def __init__(
        self, pipeline: Pipeline, settings: Settings, cache: Path, control: Control
    ) -> None:
        """`control` cancels a running job; progress within a job is not reported."""
        self.pipeline, self.settings, self.cache = pipeline, settings, cache
        self.control = control
        # Jobs are ordered by image, so one entry would do; pair distances need two.
        self._load = functools.lru_cache(maxsize=2)(self._read)

    def full(self, digest: str, name: str, image: Image.Image) -> dict[str, Any]:
        """Generates the original's output, caches it in a file and measures the sampling floor."""
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

    def without(self, digest: str, removed: tuple[BlockId, ...]) -> dict[str, Any]:
        """Generates without the removed blocks and compares with the cached original's output."""
        full = self._load(digest)
        latent_mse, iou, mesh = None, 0.0, None
        try:
            latents = self._latents(
                torch.from_numpy(full.cond),
                full.noise_seed,
                self.pipeline.dit.without(*removed),
            )
            # Channels beyond the decoder's own are anchors, which do not change.
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
        """Distance between the original's outputs for two images, each in its own frame.

        For a == b: distance of that shape to itself collapsed into its centroid.
        """
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

        result = emd(x, y, gap=self.settings.gap, threads=1)
        return {"distance": float(result.distance), "gap": float(result.gap)}

    def _read(self, digest: str) -> FullOutput:
        with np.load(self.cache / f"{digest}.npz") as saved:
            shape = tuple(saved["shape"])
            solid = np.unpackbits(saved["solid"], count=int(np.prod(shape))).reshape(shape)
            return FullOutput(
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
    """Chamfer², the paper's CD (Table A): the sum of both mean squared nearest-neighbour distances.

    x, y: (points, 3).
    """
    from scipy.spatial import cKDTree

    x_to_y, y_to_x = cKDTree(y).query(x)[0], cKDTree(x).query(y)[0]
    return float(np.square(x_to_y).mean() + np.square(y_to_x).mean())


def _collapsed(cloud: np.ndarray) -> np.ndarray:
    return np.tile(cloud.mean(0, dtype=np.float64).astype(np.float32), (len(cloud), 1))


def _seed(seed: int, digest: str, label: str) -> int:
    """A separate seed for every use, independent of order and process."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{digest}|{label}".encode()).digest()[:6], "big")


Job = tuple[str, tuple[Any, ...]]  # a method of Measure and its arguments
RunJobs = Callable[[Sequence[Job]], Iterator[tuple[int, dict[str, Any]]]]

_worker: Measure | None = None


def _start(pipeline: Pipeline, settings: Settings, cache: Path, flag: Flag, threads: int) -> None:
    global _worker
    # Ctrl-C reaches every process of a terminal; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _worker = Measure(pipeline, settings, cache, Control(flag=flag))


def _do(job: Job) -> dict[str, Any]:
    assert _worker is not None
    return getattr(_worker, job[0])(*job[1])


@contextlib.contextmanager
def runner(
    pipeline: Pipeline, settings: Settings, cache: Path, jobs: int, control: Control
) -> Iterator[RunJobs]:
    """Yields a function that runs jobs and yields (position, record) as each job finishes.

    jobs: number of worker processes; 1 runs in this process. The function raises Cancelled after
    `control.cancel()`, and running jobs stop early. Raises UserError if a worker was killed.
    """
    if jobs == 1:
        measure = Measure(pipeline, settings, cache, control.quiet())

        def run_here(batch: Sequence[Job]) -> Iterator[tuple[int, dict[str, Any]]]:
            for position, (method, arguments) in enumerate(batch):
                control.check()
                yield position, getattr(measure, method)(*arguments)

        yield run_here
        return

    import multiprocessing
    from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool

    # "spawn", because a fork after torch has started its threads can hang.
    context = multiprocessing.get_context("spawn")
    flag = context.Event()
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=context,
        initializer=_start,
        initargs=(pipeline, settings, cache, flag, torch.get_num_threads()),
    )

    def run_in_workers(batch: Sequence[Job]) -> Iterator[tuple[int, dict[str, Any]]]:
        position = {pool.submit(_do, job): i for i, job in enumerate(batch)}
        pending = set(position)
        while pending:
            control.check()
            done, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
            for future in done:
                yield position[future], future.result()

    try:
        yield run_in_workers
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory; continue with --resume and "
            "fewer --jobs"
        ) from error
    finally:
        if control.cancelled:
            flag.set()
        pool.shutdown(wait=True, cancel_futures=True)
