"""A network that is loaded while the phase before computes."""

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from tiny_released import chair, tiny_released
from torch import nn

from vitapack.compressor.packing.compress import compress
from vitapack.compressor.planning.files import resolve_plan
from vitapack.runtime.condition.conditioner import Conditioner
from vitapack.runtime.errors import UserError
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.loading.lazy import Lazy
from vitapack.runtime.loading.prefetch import prefetch
from vitapack.runtime.pipeline.pipeline import Pipeline


def test_it_begins_at_once_and_is_waited_for():
    go, began = threading.Event(), threading.Event()

    def load():
        began.set()
        go.wait(10)
        return threading.current_thread().name

    result = prefetch(load)
    assert began.wait(10)
    go.set()
    assert result().startswith("vitapack-prefetch")
    assert result() == result()


def test_what_this_thread_does_meanwhile_is_not_seen_there():
    go = threading.Event()

    def load():
        go.wait(10)
        return nn.Linear(2, 2).weight.device.type

    result = prefetch(load)
    with torch.device("meta"):
        go.set()
        assert result() == "cpu"


def test_an_error_is_raised_where_the_network_is_wanted():
    def load():
        raise UserError("cut off")

    lazy = Lazy(load, 0)
    lazy.prefetch("cpu")
    time.sleep(0.05)
    for _ in range(2):  # the second time it is loaded, and fails, here
        with pytest.raises(UserError, match="cut off"):
            lazy()
    lazy.prefetch("cpu")
    lazy.free()  # whatever came of it
    assert not lazy.loaded


def test_a_lazy_network_is_loaded_once():
    count = []
    lazy = Lazy(lambda: count.append(1) or len(count), 0)
    lazy.prefetch("cpu")
    lazy.prefetch("cpu")
    assert lazy() == lazy() == 1
    lazy.prefetch("cpu")
    assert len(count) == 1
    lazy.free()
    lazy.prefetch("cpu")
    assert pickle.loads(pickle.dumps(lazy))() == 2
    lazy.free()
    assert lazy() == 3


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefetch")
    checkpoint = open_checkpoint(tiny_released("hunyuan3d-2mini", folder / "model"))
    path = folder / "packed.safetensors"
    compress(checkpoint, resolve_plan("int8", checkpoint), path, steps=[3], embed=True)
    return path


def opened(path, memory, where=None):
    """The pipeline, and by lazy the thread that loaded it, again and again."""
    pipeline = Pipeline.from_packed(path, "cpu", memory=memory)
    pipeline.decoder.resolution = 16
    if where is not None:
        pipeline._ahead = True  # as on a GPU
        parts = (pipeline.conditioner.component, pipeline._dit, pipeline.decoder.component)
        for name, lazy in zip(("condition", "denoise", "decode"), parts, strict=True):

            def load(name=name, inner=lazy._load):
                where.append((name, threading.current_thread() is not threading.main_thread()))
                return inner()

            lazy._load = load
    return pipeline


@pytest.mark.parametrize("memory", ["lean", "resident"])
def test_a_run_s_networks_come_early_where_memory_allows(packed_file, memory):
    expected = opened(packed_file, memory)(chair(), seed=1)
    where = []
    pipeline = opened(packed_file, memory, where)
    early = pipeline._peaks(1, False)[1]
    assert early  # on so small a model libraries are nearly all of each peak
    meshes = [pipeline(chair(), seed=1) for _ in range(2)]
    for mesh in meshes:
        assert (mesh.vertices == expected.vertices).all()
    once = [
        ("condition", False),
        ("denoise", "condition" in early),
        ("decode", "denoise" in early),
    ]
    assert sorted(where) == sorted(once * (2 if memory == "lean" else 1))
    assert pipeline._dit.loaded == (memory == "resident")


def test_networks_are_loaded_when_asked_for(packed_file):
    where = []
    pipeline = opened(packed_file, "resident", where)
    pipeline.load()
    assert sorted(where) == [(name, False) for name in ("condition", "decode", "denoise")]
    pipeline(chair(), seed=1)
    assert len(where) == 3


def test_a_picture_without_an_object_leaves_nothing_behind(packed_file):
    pipeline = opened(packed_file, "lean", [])
    with pytest.raises(UserError, match="empty"):
        pipeline(Image.new("RGBA", (32, 32)), name="empty")
    assert not pipeline._dit.loaded
    assert pipeline._dit._pending is None
    assert len(pipeline(chair(), seed=1).faces)


def test_threads_take_turns(packed_file):
    pipeline = opened(packed_file, "lean", [])
    inside, most = [], []
    condition = pipeline.conditioner

    class Watched(Conditioner):
        component = condition.component

        def __call__(self, image, name, control):
            inside.append(name)
            most.append(len(inside))
            time.sleep(0.02)
            inside.remove(name)
            return condition(image, name, control)

    pipeline.conditioner = Watched()
    with ThreadPoolExecutor(3) as threads:
        meshes = list(threads.map(lambda seed: pipeline(chair(), seed=seed), (1, 1, 2)))
    assert most == [1, 1, 1]
    assert (meshes[0].vertices == meshes[1].vertices).all()


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["lean", "resident"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_on_a_gpu_copies_come_on_a_stream_of_their_own(packed_file, memory, cuda_graphs):
    def made(early):
        pipeline = Pipeline.from_packed(packed_file, "cuda", memory=memory, cuda_graphs=cuda_graphs)
        pipeline.decoder.resolution = 16
        pipeline._ahead = early
        return pipeline, [pipeline(chair(), seed=seed) for seed in (1, 2, 1)]

    (_, expected), (pipeline, found) = made(False), made(True)
    for mesh, other in zip(found, expected, strict=True):
        assert (mesh.vertices == other.vertices).all()
    for phase, row in pipeline.bytes.items():
        assert 0 < row["peak"] <= row["predicted"] + (8 << 20), phase


@pytest.mark.gpu
def test_on_a_gpu_copies_wait_for_no_kernel_but_for_those_before():
    source = torch.arange(1 << 20, dtype=torch.float32)
    prefetch(
        lambda: source.to("cuda").clone(), "cuda"
    )()  # loading a kernel's code waits for the GPU
    before = torch.zeros(1 << 20, device="cuda")
    torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
    before += 1
    result = prefetch(lambda: (before.clone(), source.to("cuda")), "cuda")
    torch.cuda._sleep(2_000_000_000)
    event = torch.cuda.Event()
    event.record()
    seen, copied = result()
    assert not event.query()  # what was asked for later still computes
    assert (seen == 1).all()
    assert torch.equal(copied.cpu(), source)
