"""Recorded trajectories equal those of a generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_pipeline import pictures, tiny_pipeline

from vitapack.compressor.distill.trajectories import Trajectories
from vitapack.runtime.format.schedules import SamplerDefaults, evaluation_times
from vitapack.runtime.sampling import solvers
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
    trajectories = Trajectories.record(
        pipeline, places, seeds, pipeline.sampler, tmp_path, 2, reports.append
    )
    return pipeline, trajectories, seeds, reports


def test_points_lie_on_the_trajectory_and_velocities_are_the_network_s(recorded, tmp_path):
    pipeline, trajectories, seeds, reports = recorded
    assert reports == [0, 2, 3]
    times = evaluation_times(pipeline.sampler)
    assert len(trajectories) == 3 * len(times)
    everything = trajectories.read(range(len(trajectories)), "cpu")
    assert everything.guided.all()
    network = pipeline.dit
    when = network.step_modulation(everything.t, None)
    nothing = torch.zeros_like(everything.cond)
    for stored, cond in (
        (everything.conditional, everything.cond),
        (everything.unconditional, nothing),
    ):
        found = network(everything.x, when, cond)
        torch.testing.assert_close(stored, found, rtol=5e-3, atol=5e-3)  # kept in float16
    last = trajectories.read([len(times) - 1 + len(times)], "cpu")  # of the second trajectory
    velocity = velocity_of(network, pipeline.sampler, last.cond)
    xs = list(solvers.trajectory(velocity, pipeline.noise(seeds[1]), pipeline.sampler))
    near = [(x - last.x).abs().max() for x in xs]
    assert min(near) < 5e-3
    assert float(last.t) in times


def test_what_is_there_stays(recorded, tmp_path, monkeypatch):
    pipeline, trajectories, seeds, _ = recorded
    before = [file.read_bytes() for file in trajectories.files]
    trajectories.files[2].unlink()  # sampled alone, as before
    sampled = []
    real = Trajectories.sample
    monkeypatch.setattr(
        Trajectories, "sample", lambda self, *a: sampled.append(len(a[3])) or real(self, *a)
    )
    again = Trajectories.record(
        pipeline, trajectories.conditions, seeds, pipeline.sampler, tmp_path, 2, lambda done: None
    )
    assert sampled == [1]
    assert [file.read_bytes() for file in again.files] == before


def test_without_guidance_there_is_one_velocity(recorded, tmp_path):
    pipeline, trajectories, seeds, _ = recorded
    alone = SamplerDefaults("euler", steps=3, guidance=1.0)
    found = Trajectories.record(
        pipeline, trajectories.conditions, seeds, alone, tmp_path, 3, lambda done: None
    ).read([0, 1], "cpu")
    assert not found.guided.any()
    assert not found.unconditional.any()
    assert found.conditional.any()
