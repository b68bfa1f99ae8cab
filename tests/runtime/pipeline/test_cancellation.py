"""Cancelling a generation in every phase: it ends at once, and the pipeline is as it was."""

import threading
import time

import numpy as np
import pytest
from tiny_released import chair, tiny_released

from vitapack.compressor.packing.compress import compress
from vitapack.compressor.planning.files import resolve_plan
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.options import GenerateOptions
from vitapack.runtime.pipeline.pipeline import PHASES, Pipeline
from vitapack.runtime.progress import Cancelled, Control, Progress

OPTIONS = GenerateOptions(seed=1, resolution=16)


class Counting(Control):
    """Cancels itself at its `last` check."""

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self.last, self.checks = last, 0

    def check(self) -> None:
        self.checks += 1
        if self.checks == self.last:
            self.cancel()
        super().check()


@pytest.fixture(scope="module", params=["hunyuan3d-2mini", "trellis-ss", "furniture"])
def opened(request, tmp_path_factory):
    """By memory mode, the pipeline of a packed file with everything in it, and its options."""
    folder = tmp_path_factory.mktemp("cancel")
    name = request.param
    model = name if name == "furniture" else tiny_released(name, folder / "model")
    checkpoint = open_checkpoint(model)
    path = folder / "packed.safetensors"
    compress(checkpoint, resolve_plan("int8", checkpoint), path, steps=[3], embed=True)
    options = OPTIONS if name.startswith("hunyuan") else GenerateOptions(seed=1)
    memory = {mode: Pipeline.open(path, device="cpu", memory=mode) for mode in ("resident", "lean")}
    return memory, options


@pytest.mark.parametrize("memory", ["resident", "lean"])
def test_cancelled_anywhere_it_makes_the_same_mesh_afterwards(opened, memory):
    pipelines, options = opened
    pipeline = pipelines[memory]
    whole = Counting()
    expected = pipeline(chair(), options, control=whole)
    assert whole.checks > 20
    resolution, ended = pipeline.decoder.resolution, set()
    last = whole.checks
    for number in sorted({1, 2, last // 8, last // 3, last // 2, 2 * last // 3, last - 1, last}):
        control = Counting(number)
        with pytest.raises(Cancelled):
            pipeline(chair(), options, control=control)
        assert control.checks == number  # not one more
        ended.add(list(pipeline.seconds)[-1] if pipeline.seconds else "condition")
        assert pipeline.decoder.resolution == resolution
        assert not pipeline._turn.locked()
        if memory == "lean":
            assert not any(part.loaded for part in pipeline._components().values())
    assert ended >= {"condition", "decode"}
    mesh = pipeline(chair(), options)
    assert np.array_equal(mesh.vertices, expected.vertices)
    assert np.array_equal(mesh.faces, expected.faces)
    assert mesh.metadata == expected.metadata


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_reports_and_can_be_cancelled_by_what_it_reports(opened, phase):
    pipelines, options = opened
    pipeline, seen = pipelines["resident"], []

    def watch(at: Progress) -> None:
        seen.append(at)
        if at.phase == phase:
            control.cancel()

    control = Control(watch)
    with pytest.raises(Cancelled):
        pipeline(chair(), options, control=control)
    begun = PHASES[: PHASES.index(phase) + 1]
    assert {at.phase for at in seen} == set(begun)
    assert list(pipeline.seconds) == list(begun)
    assert all(at.done <= at.total for at in seen)


def test_another_thread_cancels_and_one_that_waits_for_its_turn_is_cancelled_too(opened):
    pipelines, options = opened
    pipeline, ends = pipelines["resident"], []
    first, second = Control(), Control()

    def run(control: Control) -> None:
        with pytest.raises(Cancelled):
            pipeline(chair(), options, control=control)
        ends.append(control)

    with pipeline._turn:  # somebody's generation
        threads = [threading.Thread(target=run, args=(control,)) for control in (first, second)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        second.cancel()
        threads[1].join(timeout=10)
        assert ends == [second]
        first.cancel()
        threads[0].join(timeout=10)
    assert ends == [second, first]


def test_a_cancelled_control_starts_nothing(opened):
    pipelines, options = opened
    control = Control()
    control.cancel()
    with pytest.raises(Cancelled):
        pipelines["resident"](chair(), options, control=control)
