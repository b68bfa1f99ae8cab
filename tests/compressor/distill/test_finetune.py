"""Fine-tuning: what is trained is what the file holds, and nothing else in it changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_released import chair, tiny_released

from vitapack.cli import main
from vitapack.compressor.distill import finetune as tuner
from vitapack.compressor.distill import trainer, trajectories
from vitapack.compressor.distill.finetune import finetune
from vitapack.compressor.distill.trained_linear import TrainedLinear
from vitapack.compressor.packing.compress import compress
from vitapack.compressor.packing.quantizers import QUANTIZERS, rounded
from vitapack.kernels.linear.layouts import W4, W8, WeightLayout
from vitapack.kernels.linear.weights import PackedWeight, dequantize
from vitapack.runtime.engines.cpu_linear import CpuLinear
from vitapack.runtime.errors import UserError
from vitapack.runtime.families.furniture.family import held_out
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.format.describe import describe
from vitapack.runtime.format.header import read_header
from vitapack.runtime.format.layermap import BlockEntry, LayerMap
from vitapack.runtime.format.schedules import SamplerDefaults, evaluation_times, guided_times
from vitapack.runtime.loading.packed import load_packed_dit
from vitapack.runtime.networks.linear import PackedLinear
from vitapack.runtime.progress import Cancelled, Control, Progress
from vitapack.runtime.sampling.guidance import denoise

PICTURES = [picture.image_path for picture in held_out("validation-views")][:3]
MAP = LayerMap(
    "furniture",
    {"double": 8, "single": 16},
    (
        BlockEntry("double", 0, 8, 0.5), BlockEntry("double", 7, 4, 0.1),
        BlockEntry("single", 3, 8, 0.2), BlockEntry("single", 9, 4, 0.3),
    ),
    how="by hand",
)  # fmt: skip


def packed_file(folder: Path, layer_map: LayerMap = MAP, **options) -> Path:
    path = folder / "packed.safetensors"
    compress(open_checkpoint("furniture"), layer_map, path, steps=[3], **options)
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_file(tmp_path_factory.mktemp("packed"))


def tuned(packed: Path, out: Path, **options) -> dict:
    options = {"iterations": 4, "batch": 2, "lr": 1e-3} | options
    return finetune("furniture", packed, PICTURES, out, **options)


@pytest.mark.parametrize("form", [PackedLinear, CpuLinear])
@pytest.mark.parametrize(("layout", "inputs"), [(W8, 40), (W4[0], 40), (W4[2], 200)])
def test_a_trained_linear_begins_as_the_packed_one_and_ends_as_what_it_computes(
    layout: WeightLayout, inputs: int, form: type[PackedLinear]
) -> None:
    original = torch.randn(24, inputs)
    weight = QUANTIZERS["search"]().quantize("x", original, layout)
    packed = form(weight, torch.randn(24))
    x = torch.randn(5, inputs)
    trained = TrainedLinear(packed, original)
    assert torch.equal(trained.weight, original)
    wanted = x @ dequantize(weight).t() + packed.bias
    torch.testing.assert_close(trained(x), wanted, rtol=1e-5, atol=1e-5)

    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-2)
    target = torch.randn(5, 24)
    first = (trained(x) - target).square().mean().item()
    for _ in range(30):
        optimizer.zero_grad()
        (trained(x) - target).square().mean().backward()
        optimizer.step()
    assert (trained(x) - target).square().mean().item() < first / 2

    stored = trained.stored()
    tensors = {part: stored[f"weight.{part}"] for part in layout.names}
    again = PackedLinear(PackedWeight(layout, tensors, inputs), stored["bias"])
    assert torch.equal(again.scale, weight.scale)
    torch.testing.assert_close(trained(x), x @ dequantize(again.packed()).t() + again.bias)
    # And a file that was tuned before begins as it is, though the original rounds elsewhere.
    second = TrainedLinear(again, original)
    assert torch.equal(
        dequantize(rounded(second.weight.detach(), second.grid)), dequantize(again.packed())
    )


def test_only_the_chosen_blocks_change_and_the_file_is_as_big(packed: Path, tmp_path: Path) -> None:
    note = tuned(packed, tmp_path / "out.safetensors")
    before, after = read_header(packed), read_header(tmp_path / "out.safetensors")
    assert note["blocks"] == [["double", 7], ["single", 3]]
    assert note["loss_after"] < note["loss_before"]
    assert after.tensors == before.tensors
    assert after.linears == before.linears
    assert after.layer_map == replace(before.layer_map, notes={"finetuned": note})
    old, new = load_file(packed), load_file(tmp_path / "out.safetensors")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(n.startswith(("model.double_blocks.7.", "model.single_blocks.3.")) for n in changed)
    assert not any(name.endswith((".table", ".group", "weight.scale")) for name in changed)
    assert "double 7, single 3: 4 iterations on 2 images" in describe(after)
    assert not (tmp_path / "out.safetensors.finetune").exists()


def test_what_was_judged_is_what_was_written(packed: Path, tmp_path: Path, monkeypatch) -> None:
    students = []
    real = tuner.load_packed
    monkeypatch.setattr(
        tuner, "load_packed", lambda *a, **k: students.append(real(*a, **k)) or students[0]
    )
    tuned(packed, tmp_path / "out.safetensors")
    written = load_packed_dit(tmp_path / "out.safetensors")
    sampler = SamplerDefaults.from_json(read_header(packed).sampler)
    x, cond = torch.randn(1, 64, 28), torch.randn(1, 50, 192)
    ours, theirs = (denoise(network, sampler, cond, x) for network in (students[0], written))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("how", "first"), [(KeyboardInterrupt, 5), (Cancelled, 6)])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(
    packed: Path, tmp_path: Path, monkeypatch, how: type, first: int
) -> None:
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    tuned(packed, whole, iterations=7)

    def stop(at: Progress) -> None:
        if at == Progress("fine-tune", 5, 7):
            if how is KeyboardInterrupt:
                raise KeyboardInterrupt
            control.cancel()

    control = Control(stop)
    with pytest.raises(how):
        tuned(packed, parts, iterations=7, control=control)
    assert not parts.exists()
    with pytest.raises(UserError, match="other files or settings"):
        tuned(packed, parts, iterations=7, seed=1)
    steps: list[int] = []
    watch = Control(lambda at: at.phase == "fine-tune" and steps.append(at.done))
    tuned(packed, parts, iterations=7, control=watch)
    assert steps[0] == first  # the last state that was saved is not the last one reported
    assert parts.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.safetensors", whole.name]


@pytest.mark.parametrize("phase", ["conditions", "trajectories"])
def test_cancelled_before_the_training_it_goes_on_there(
    packed: Path, tmp_path: Path, phase: str
) -> None:
    out = tmp_path / "out.safetensors"
    control = Control(lambda at: (at.phase, at.done) == (phase, 1) and control.cancel())
    with pytest.raises(Cancelled):
        tuned(packed, out, iterations=2, batch=1, control=control)
    assert not out.exists()
    assert list(tmp_path.rglob("*.npy"))  # the finished conditions, and then a trajectory
    seen: list[Progress] = []
    note = tuned(packed, out, iterations=2, batch=1, control=Control(seen.append))
    assert [at.done for at in seen if at.phase == "fine-tune"] == [1, 2]
    again = tmp_path / "again.safetensors"
    assert tuned(packed, again, iterations=2, batch=1) == note
    assert again.read_bytes() == out.read_bytes()


def test_other_choices(packed: Path, tmp_path: Path) -> None:
    header = read_header(packed)
    assert tuner.blocks_to_train(header, "max-vital") == [("double", 0), ("single", 9)]
    assert len(tuner.blocks_to_train(header, "all")) == 4
    note = tuned(packed, tmp_path / "a.safetensors", blocks="all", iterations=2, batch=1)
    assert len(note["blocks"]) == 4
    # A tuned file can be tuned again, and one picture alone is enough.
    again = finetune(
        "furniture", tmp_path / "a.safetensors", PICTURES[:1], tmp_path / "b.safetensors",
        iterations=20, batch=2, lr=1e-3,
    )  # fmt: skip
    assert (again["pictures"], again["held_out_pictures"]) == (1, 1)


def test_from_the_command_line(packed: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.safetensors"
    words = ["finetune", "furniture", packed, "--images", PICTURES[0].parent, "-o", out]
    words += ["--iterations", 2, "--limit", 2, "--json", "--quiet"]
    main([str(word) for word in words])
    found = json.loads(capsys.readouterr().out)
    assert found.pop("written") == str(out)
    assert found == read_header(out).layer_map.notes["finetuned"]
    assert (found["pictures"], found["held_out_pictures"]) == (1, 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"blocks": "some"}, "no blocks 'some'"),
        ({"lr": float("nan")}, "learning rate nan"),
        ({"steps": 4}, "no modulation table at t="),
        ({"lr": 0.9}, "nothing was written; try a lower --lr"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    packed: Path, tmp_path: Path, monkeypatch, options: dict, expected: str
) -> None:
    monkeypatch.setattr(trainer, "WARM_UP", 1)
    with pytest.raises(UserError) as caught:
        tuned(packed, tmp_path / "out.safetensors", **options)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_files_that_do_not_fit(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images to train on"):
        finetune("furniture", packed, [], tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="name another one"):
        finetune("furniture", packed, PICTURES, packed)
    plain = packed_file(tmp_path, LayerMap.uniform("furniture", MAP.totals, 8))
    with pytest.raises(UserError, match=r"states no vitality.*--blocks all"):
        tuned(plain, tmp_path / "out.safetensors")
    empty = packed_file(tmp_path, replace(MAP, blocks=()))
    with pytest.raises(UserError, match="keeps no blocks"):
        tuned(empty, tmp_path / "out.safetensors")
    other = tiny_released("hunyuan3d-2mini", tmp_path / "other")
    with pytest.raises(UserError, match="was not made from"):
        finetune(other, packed, PICTURES, tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("hunyuan3d-2.0", 2), ("hunyuan3d-2mini-turbo", 1), ("step1x-3d", 2),
        ("trellis-ss", 2),
    ],
)  # fmt: skip
def test_every_family(name: str, terms: int, tmp_path: Path, monkeypatch) -> None:
    model = tiny_released(name, tmp_path / "model")
    checkpoint = open_checkpoint(model)
    totals = {kind: len(kept) for kind, kept in checkpoint.config.blocks_by_kind().items()}
    entries = [
        BlockEntry(kind, i, (4, 8, 16)[i % 3], 1.0 + i)
        for kind, count in totals.items() for i in range(count)
    ]  # fmt: skip
    entries = [entry for entry in entries if entry.index != 1]
    layer_map = LayerMap(checkpoint.family, totals, tuple(entries), how="by hand")
    packed = tmp_path / "packed.safetensors"
    compress(checkpoint, layer_map, packed, steps=[3])
    chair().save(tmp_path / "chair.png")
    samples = []
    real = trajectories.Trajectories.read
    monkeypatch.setattr(
        trajectories.Trajectories,
        "read",
        lambda self, *a: samples.append(real(self, *a)) or samples[-1],
    )
    out = tmp_path / "out.safetensors"
    note = finetune(model, packed, [tmp_path / "chair.png"], out, iterations=6, lr=1e-4)
    assert [tuple(block) for block in note["blocks"]] == [(kind, 0) for kind in totals]
    assert note["loss_after"] < note["loss_before"]
    sampler = SamplerDefaults.from_json(note["sampler"])
    assert sampler.steps == 3
    # Every time the sampler asks at, and what its interval of guidance leaves of the second term.
    times, interval = evaluation_times(sampler), guided_times(sampler)
    asked = {float(t): bool(on) for one in samples for t, on in zip(one.t, one.guided, strict=True)}
    assert asked == {t: terms == 2 and (interval is None or t in interval) for t in times}
    for one in samples:
        assert one.unconditional.flatten(1).any(1).tolist() == one.guided.tolist()
        assert one.conditional.flatten(1).any(1).all()
    assert read_header(out).layer_map.notes["finetuned"] == json.loads(json.dumps(note))
    load_packed_dit(out)
