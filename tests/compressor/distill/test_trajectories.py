"""The original's paths: what was recorded is what the network gives on the way to a mesh."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_pipeline import pictures, tiny_pipeline

from vitapack.compressor.distill.trajectories import Paths
from vitapack.runtime.format.schedules import SamplerDefaults, evaluation_times
from vitapack.runtime.sampling import solvers as sampling
from vitapack.runtime.sampling.guidance import velocity_of


@pytest.fixture
def recorded(tmp_path):
    pipeline = tiny_pipeline()
    places = []
    for number, (name, image) in enumerate(pictures(3)):
        places.append(tmp_path / f"{number}.npy")
        np.save(places[-1], pipeline.condition(image, name).numpy())
    seeds = [4, 5, 6]
    reports: list[int] = []
    paths = Paths.record(pipeline, places, seeds, pipeline.sampler, tmp_path, 2, reports.append)
    return pipeline, paths, seeds, reports


def test_points_lie_on_the_path_and_velocities_are_the_network_s(recorded, tmp_path):
    pipeline, paths, seeds, reports = recorded
    assert reports == [0, 2, 3]
    times = evaluation_times(pipeline.sampler)
    assert len(paths) == 3 * len(times)
    everything = paths.read(range(len(paths)), "cpu")
    assert everything.guided.all()
    network = pipeline.dit
    when = network.step_modulation(everything.t, None)
    nothing = torch.zeros_like(everything.cond)
    for stored, cond in ((everything.with_image, everything.cond), (everything.without, nothing)):
        found = network(everything.x, when, cond)
        torch.testing.assert_close(stored, found, rtol=5e-3, atol=5e-3)  # kept in float16
    last = paths.read([len(times) - 1 + len(times)], "cpu")  # of the second path
    velocity = velocity_of(network, pipeline.sampler, last.cond)
    walk = list(sampling.trajectory(velocity, pipeline.noise(seeds[1]), pipeline.sampler))
    near = [(x - last.x).abs().max() for x in walk]
    assert min(near) < 5e-3
    assert float(last.t) in times


def test_what_is_there_stays(recorded, tmp_path, monkeypatch):
    pipeline, paths, seeds, _ = recorded
    before = [file.read_bytes() for file in paths.files]
    paths.files[2].unlink()  # walks alone, as it did
    walked = []
    real = Paths.walk
    monkeypatch.setattr(Paths, "walk", lambda self, *a: walked.append(len(a[3])) or real(self, *a))
    again = Paths.record(
        pipeline, paths.conditions, seeds, pipeline.sampler, tmp_path, 2, lambda done: None
    )
    assert walked == [1]
    assert [file.read_bytes() for file in again.files] == before


def test_without_guidance_there_is_one_velocity(recorded, tmp_path):
    pipeline, paths, seeds, _ = recorded
    alone = SamplerDefaults("euler", steps=3, guidance=1.0)
    found = Paths.record(
        pipeline, paths.conditions, seeds, alone, tmp_path, 3, lambda done: None
    ).read([0, 1], "cpu")
    assert not found.guided.any()
    assert not found.without.any()
    assert found.with_image.any()
