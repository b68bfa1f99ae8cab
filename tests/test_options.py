"""Options: the same checks for a command line, Python, a server and a node."""

import dataclasses

import pytest

from vitapack.compressor.options import (
    AnalyzeOptions,
    CompressOptions,
    EvaluateSettings,
    FinetuneOptions,
    PlanOptions,
)
from vitapack.runtime.errors import UserError
from vitapack.runtime.options import BenchOptions, GenerateOptions, PipelineOptions, merged

KINDS = (
    AnalyzeOptions, BenchOptions, CompressOptions, EvaluateSettings, FinetuneOptions,
    GenerateOptions, PipelineOptions, PlanOptions,
)  # fmt: skip
NUMBERS = {
    "points", "seed", "jobs", "curve_images", "iterations", "batch", "emd_points", "repeats",
    "cond_tokens", "target_size", "encoder_bits", "resolution",
}  # fmt: skip
WORDS = {
    "metric", "quantizer", "modulation", "table_dtype", "rest", "blocks", "align", "device",
    "compute", "memory", "sampler", "format",
}  # fmt: skip
FLAGS = {"curve", "resume", "paper", "embed", "one_batch", "cuda_graphs", "whole_pass"}
FLOATS = {"guidance", "gap", "max_distance", "lr", "tau"}
BAD = {
    **dict.fromkeys(NUMBERS, (-1, 1.5, "many", True, 10**30)),
    **dict.fromkeys(WORDS, ("", "magic", 8)),
    **dict.fromkeys(FLAGS, ("false", 1, 0.5)),
    **dict.fromkeys(FLOATS, (-1.0, float("nan"), float("inf"), "0.1", True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_checked_in_one_line(kind):
    made = kind()
    for field in dataclasses.fields(kind):
        values = BAD.get(field.name, ())
        if field.name == "steps":
            values = [[bad] for bad in (0, -1, 1001, "x", True)]
            values = values if kind is CompressOptions else [bad for (bad,) in values]
        if field.name in ("tau", "tau8") and kind is PlanOptions:
            values = [{"double": bad} for bad in BAD["tau"]]
        if field.name in ("parts", "original", "schedules"):
            continue  # paths and objects, checked when they are opened
        if field.name == "samplers":
            values = [["magic"]]
        assert values, f"{kind.__name__}.{field.name}: no bad values are known here"
        for value in values:
            with pytest.raises(UserError) as caught:
                dataclasses.replace(made, **{field.name: value})
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_frozen_and_have_defaults(kind):
    field = dataclasses.fields(kind)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), field, None)
    assert kind() == kind()


def test_a_query_s_digits_are_numbers():
    options = GenerateOptions(seed="17", steps="20", resolution="128")
    assert (options.seed, options.steps, options.resolution) == (17, 20, 128)
    assert options == GenerateOptions(seed=17, steps=20, resolution=128)


def test_changes_are_merged():
    options = GenerateOptions(seed=1, steps=5)
    assert merged(GenerateOptions, options, {"steps": 6}) == GenerateOptions(seed=1, steps=6)
    assert merged(GenerateOptions, None, {"steps": 6}) == GenerateOptions(steps=6)
    assert merged(GenerateOptions, None, {}) == GenerateOptions()
    with pytest.raises(UserError, match="steps 0"):
        merged(GenerateOptions, options, {"steps": 0})
    with pytest.raises(TypeError, match="colour"):
        merged(GenerateOptions, options, {"colour": "red"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (lambda: GenerateOptions(seed=-1), "seed -1: expected a whole number, 0 to 2^63 - 1"),
        (lambda: GenerateOptions(seed=2**63), "expected a whole number, 0 to 2^63 - 1"),
        (lambda: GenerateOptions(steps=0), "steps 0: expected a whole number from 1 to 1000"),
        (lambda: GenerateOptions(guidance=-1.0), "guidance -1.0: expected a number of at least 0"),
        (lambda: GenerateOptions(sampler="ddim"), "no sampler 'ddim': choose one of euler,"),
        (lambda: GenerateOptions(resolution=4096), "grid resolution 4096: expected a whole"),
        (lambda: GenerateOptions(format="fbx"), "no mesh format 'fbx': choose one of glb, obj,"),
        (lambda: GenerateOptions(one_batch="no"), "one_batch 'no': expected true or false"),
        (lambda: PipelineOptions(device="tpu"), "no device 'tpu': expected auto, cpu, cuda or"),
        (lambda: PipelineOptions(memory="tiny"), "no memory mode 'tiny': choose one of resident,"),
        (lambda: AnalyzeOptions(points=3), "3 points: choose 16 to 1000000"),
        (lambda: FinetuneOptions(lr=2.0), "learning rate 2.0: expected a number between 0 and 1"),
        (lambda: CompressOptions(rest="F8"), "no rest 'F8': choose one of F16, F32"),
        (
            lambda: PlanOptions(paper=True, tau={"block": 0.1}),
            "--paper and thresholds exclude each other; choose one",
        ),
    ],
)
def test_messages(options, words):
    with pytest.raises(UserError) as caught:
        options()
    assert words in str(caught.value)
