"""Planners: from a vitality table to a valid layer map, sizes included."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import complaint
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_checkpoint

from vitapack.cli import main
from vitapack.compressor.packing.compress import compress
from vitapack.compressor.planning import automatic as plan
from vitapack.compressor.planning.files import describe as describe_plan
from vitapack.compressor.planning.files import from_options, load_plan, resolve_plan
from vitapack.compressor.planning.layer_maps import plan_random
from vitapack.compressor.planning.paper import PAPER_MAPS, paper_variant, plan_paper
from vitapack.compressor.planning.sizes import predict_size
from vitapack.compressor.planning.target_size import plan_target_size
from vitapack.compressor.planning.thresholds import plan_thresholds
from vitapack.compressor.vitality.table import BlockVitality, CurvePoint, Vitality, debias, reach
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.families.open import FAMILIES
from vitapack.runtime.format.architecture import architecture_from_json
from vitapack.runtime.format.layermap import LayerMap
from vitapack.runtime.format.schedules import SamplerDefaults

# Table A of the paper (10k points): EMD per double block of Step1X-3D; 7-11 are its floor.
TABLE_A = (0.5116, 0.3152, 0.3270, 0.2136, 0.2970, 0.2170, 0.4822)
TABLE_A += (0.1591, 0.1597, 0.1588, 0.1591, 0.1595)
FLOOR = 0.159
SCALE = 0.45


def table(
    means: dict[str, list[float]],
    *,
    floor: float = FLOOR,
    curve: list[tuple[str, int, float]] | None = None,
    hidden: int = 64,
) -> Vitality:
    """A table with these raw distances; the curve's are debiased."""
    blocks = []
    for kind, values in means.items():
        for index, mean in enumerate(values):
            sigmas = (mean - floor) / 0.001
            blocks.append(
                BlockVitality(
                    kind, index, mean, mean, mean, floor, debias(mean, floor, "emd"), sigmas,
                    sigmas <= 2, mean**2, mean, 0.5, 0, 1000,
                )
            )  # fmt: skip
    points = tuple(
        CurvePoint(kind, index, (far**2 + floor**2) ** 0.5, floor, far, 1000 * far,
                   reach(far, SCALE, "emd"), 0.9, 0)
        for kind, index, far in curve or ()
    )  # fmt: skip
    totals = {kind: len(values) for kind, values in means.items()}
    network = {
        "kind": "double-single-dit", "in_channels": 8, "cond_channels": 32, "hidden": hidden,
        "heads": 4, "mlp_ratio": 4.0, "qkv_bias": True, "guidance_embed": False,
        "double_blocks": list(range(totals.get("double", 0))),
        "single_blocks": list(range(totals.get("single", 0))),
        "time": {"channels": 256, "hidden": hidden, "scale": 1000.0, "max_period": 1000.0,
                 "cos_first": True, "activation": "silu"},
    }  # fmt: skip
    sampler = SamplerDefaults("euler", steps=5, guidance=5.0)
    return Vitality(
        family="hunyuan3d",
        variant="",
        model="model.safetensors",
        source_sha256="0" * 64,
        settings={"metric": "emd", "points": 10_000, "seed": 0, "gap": 0.01, "curve_images": 8,
                  "sampler": sampler.to_json()},
        totals=totals,
        network=architecture_from_json(network),
        rest_bytes=1000,
        blocks=tuple(blocks),
        stability={},
        agreement={},
        scale=SCALE,
        curves={"balanced": points} if points else {},
        images=(),
        rows=(),
    )  # fmt: skip


def step1x() -> Vitality:
    singles = [0.33, 0.24, 0.20, 0.21, 0.22, 0.19, 0.21] + [0.1592] * 17
    return table({"double": list(TABLE_A), "single": singles})


distances = st.floats(0.1, 0.8, allow_nan=False).map(lambda value: round(value, 4))
tables = st.builds(
    lambda double, single: table({"double": double, "single": single}),
    st.lists(distances, min_size=1, max_size=4),
    st.lists(distances, min_size=1, max_size=5),
)


def check(layer_map: LayerMap, vitality: Vitality) -> None:
    """Valid, of this network, at least one block of each kind, in the order in which they run."""
    again = LayerMap.from_json(json.loads(layer_map.dumps()))
    assert again == layer_map
    assert layer_map.totals == vitality.totals
    assert all(layer_map.kept(kind) for kind in vitality.kinds)
    order = [(block.kind, block.index) for block in layer_map.blocks]
    assert order == [key for key in ((b.kind, b.index) for b in vitality.blocks) if key in order]
    for block in layer_map.blocks:
        assert block.vitality == vitality.of(block.kind, block.index).mean


def test_table_a_gives_the_papers_choice() -> None:
    """Doubles 7-11 and singles 7-23 pruned; of the kept doubles, 3 and 5 in 4 bits."""
    vitality = step1x()
    paper = plan_paper("step1x-3d")
    for layer_map in (
        plan.plan_auto(vitality),
        plan_thresholds(
            vitality, {"double": 0.2, "single": 0.17}, {"double": 0.25, "single": 0.25}
        ),
    ):
        check(layer_map, vitality)
        for kind in ("double", "single"):
            assert layer_map.kept(kind) == paper.kept(kind)
            for index in layer_map.kept(kind):
                assert layer_map.bits(kind, index) == paper.bits(kind, index)


def test_auto_stops_before_the_jump() -> None:
    means = {"double": [0.5, 0.4, 0.3], "single": [0.2, 0.19, 0.18, 0.17]}
    curve = [("single", 3, 0.010), ("single", 2, 0.016), ("double", 2, 0.2), ("single", 1, 0.3)]
    layer_map = plan.plan_auto(vitality := table(means, curve=curve))
    check(layer_map, vitality)
    assert layer_map.pruned("single") == (2, 3)
    assert layer_map.pruned("double") == ()
    assert layer_map.notes["pruned output"]["distance"] == 0.016
    border = layer_map.notes["thresholds"]["single"]["prune below"]
    assert 0.18 < border < 0.19
    assert layer_map.notes["thresholds"]["double"]["prune below"] == 0


@pytest.mark.parametrize(
    ("reaches", "pruned"),
    [
        ([0.06, 0.065, 0.09], 3),  # a first step beyond 5 % has no step before it
        ([0.11], 0),
        ([0.01, 0.055, 0.1], 3),
        ([0.01, 0.065], 1),  # the jump
        ([0.06, 0.02, 0.08], 3),  # back and forth within what was reached already
    ],
)
def test_auto_limits(reaches: list[float], pruned: int) -> None:
    curve = [("single", 4 - place, SCALE * reach) for place, reach in enumerate(reaches)]
    vitality = table({"double": [0.5], "single": [0.3, 0.25, 0.22, 0.2, 0.18]}, curve=curve)
    assert len(plan.plan_auto(vitality).pruned("single")) == pruned


def test_auto_stops_where_small_steps_add_up() -> None:
    curve = [("single", index, 0.02 * (5 - index)) for index in (4, 3, 2, 1)]
    vitality = table({"double": [0.5], "single": [0.3, 0.25, 0.22, 0.2, 0.18]}, curve=curve)
    assert plan.plan_auto(vitality).pruned("single") == (3, 4)  # 0.04 of 0.45; 0.06 is over 10 %


def test_auto_stops_at_a_lost_surface() -> None:
    vitality = table({"double": [0.5], "single": [0.3, 0.2]}, curve=[("single", 1, 0.01)])
    lost = replace(vitality.curves["balanced"][0], missing=1)
    vitality = replace(vitality, curves={"balanced": (lost,)})
    assert plan.plan_auto(vitality).pruned("single") == ()


def test_auto_ignores_steps_that_sampling_cannot_see() -> None:
    """A debiased distance near the floor is noise: its square root makes little look like much."""
    vitality = table({"double": [0.5], "single": [0.3, 0.2]}, curve=[("single", 1, 0.05)])
    noise = replace(vitality.curves["balanced"][0], sigmas=1.5)
    assert plan.plan_auto(vitality).pruned("single") == ()
    vitality = replace(vitality, curves={"balanced": (noise,)})
    assert plan.plan_auto(vitality).pruned("single") == (1,)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 0.4), min_size=1, max_size=8),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
)
def test_auto_prunes_more_for_more_distance(
    distances: list[float], first: float, second: float
) -> None:
    singles = [0.9 - 0.02 * index for index in range(len(distances) + 1)]
    curve = [("single", len(distances) - place, far) for place, far in enumerate(distances)]
    vitality = table({"double": [0.5, 0.6], "single": singles}, curve=curve)
    few, many = (
        plan.plan_auto(vitality, max_distance=distance) for distance in sorted((first, second))
    )
    check(few, vitality)
    check(many, vitality)
    assert set(few.pruned("single")) <= set(many.pruned("single"))


def test_equal_vitalities_all_get_8_bits() -> None:
    vitality = table({"double": [0.3, 0.31, 0.305], "single": [0.29, 0.3]})
    assert {block.bits for block in plan.plan_auto(vitality).blocks} == {8}


@settings(max_examples=40, deadline=None)
@given(tables, distances, distances, distances, distances)
def test_thresholds(vitality: Vitality, a: float, b: float, c: float, d: float) -> None:
    taus = {"tau": {"double": a, "single": b}, "tau8": {"double": c, "single": d}}
    most = {kind: vitality.ranked(kind)[-1].mean for kind in vitality.kinds}
    if a > most["double"] or b > most["single"]:
        with pytest.raises(UserError, match="prunes all"):
            plan_thresholds(vitality, **taus)
        return
    layer_map = plan_thresholds(vitality, **taus)
    check(layer_map, vitality)
    for block in vitality.blocks:
        kept = block.index in layer_map.kept(block.kind)
        assert kept == (block.mean >= taus["tau"][block.kind])
        if kept:
            eight = layer_map.bits(block.kind, block.index) == 8
            assert eight == (block.mean > taus["tau8"][block.kind])


@settings(max_examples=12, deadline=None)
@given(tables, st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_target_size(vitality: Vitality, wanted: list[float]) -> None:
    """Respected, used well, and monotone: less room never keeps what more room gave up."""
    whole = predict_size(vitality, plan_thresholds(vitality)).total
    with pytest.raises(UserError, match="cannot be reached") as error:
        plan_target_size(vitality, 1)
    least = int(str(error.value).split(" bytes (")[-2].split()[-1])
    sizes = sorted(int(least + share * (whole - least)) for share in wanted)
    small, large = (plan_target_size(vitality, size) for size in sizes)
    for layer_map, size in ((small, sizes[0]), (large, sizes[1])):
        check(layer_map, vitality)
        assert predict_size(vitality, layer_map).total <= size
    for kind in vitality.kinds:
        assert set(small.kept(kind)) <= set(large.kept(kind))
        for index in small.kept(kind):
            assert small.bits(kind, index) <= large.bits(kind, index)
        assert vitality.ranked(kind)[-1].index in small.kept(kind)
    assert plan_target_size(vitality, least).blocks
    with pytest.raises(UserError, match="cannot be reached"):
        plan_target_size(vitality, least - 1)


def test_target_size_gives_up_the_least_vital_first() -> None:
    vitality = step1x()
    sizes = [
        predict_size(vitality, layer_map).total
        for layer_map in (plan_thresholds(vitality), plan.plan_auto(vitality))
    ]
    layer_map = plan_target_size(vitality, sizes[1])
    assert not set(layer_map.kept("single")) & set(range(7, 24))
    assert not set(layer_map.kept("double")) & set(range(7, 12))
    assert sizes[0] > sizes[1]


@settings(max_examples=40, deadline=None)
@given(tables, st.integers(0, 2**32 - 1), st.integers(0, 100))
def test_random(vitality: Vitality, seed: int, share: int) -> None:
    tau = {k: vitality.ranked(k)[len(vitality.ranked(k)) // 2].mean for k in vitality.kinds}
    like = plan_thresholds(vitality, tau, {"single": share / 100})
    layer_map = plan_random(seed, like)
    assert LayerMap.from_json(json.loads(layer_map.dumps())) == layer_map
    assert plan_random(seed, like) == layer_map
    for kind in vitality.kinds:
        assert len(layer_map.kept(kind)) == len(like.kept(kind))
        bits = [sorted(m.bits(kind, i) for i in m.kept(kind)) for m in (layer_map, like)]
        assert bits[0] == bits[1]


def test_random_draws_differ() -> None:
    like = plan_paper("hunyuan3d-2mini")
    assert len({plan_random(seed, like).kept("single") for seed in range(8)}) > 4


@pytest.mark.parametrize(
    ("variant", "pruned", "eight", "four"),
    [
        ("hunyuan3d-2.0", (5, 5), (7, 20), (4, 7)),
        ("hunyuan3d-2mini", (0, 3), (7, 9), (1, 4)),
        ("step1x-3d", (5, 17), (5, 1), (2, 6)),
        ("trellis-ss", (6,), (9,), (9,)),
    ],
)
def test_paper_maps(variant: str, pruned: tuple, eight: tuple, four: tuple) -> None:
    layer_map = plan_paper(variant)
    kinds = list(layer_map.totals)
    bits = {
        width: tuple(sum((b.kind, b.bits) == (k, width) for b in layer_map.blocks) for k in kinds)
        for width in (8, 4)
    }
    assert tuple(len(layer_map.pruned(kind)) for kind in kinds) == pruned
    assert bits == {8: eight, 4: four}
    assert LayerMap.from_json(json.loads(layer_map.dumps())) == layer_map
    assert "assumed" in describe_plan(layer_map)


def test_papers_fine_tuned_blocks_are_the_last_kept() -> None:
    """Section A.2: the least vital kept blocks that the paper trains."""
    for variant, double, single in (
        ("hunyuan3d-2.0", 11, 26),
        ("hunyuan3d-2mini", 4, 12),
        ("step1x-3d", 3, 2),
    ):
        layer_map = plan_paper(variant)
        assert layer_map.bits("double", double) == 4
        assert layer_map.bits("single", single) == 4


def test_paper_has_no_map_for_others() -> None:
    with pytest.raises(UserError, match="no layer map for furniture"):
        paper_variant("furniture", {"double": 8, "single": 16})
    with pytest.raises(UserError, match="no published layer map"):
        plan_paper("hunyuan3d-3.0")
    with pytest.raises(UserError, match="no layer map for step1x3d-next with 12 double"):
        paper_variant("step1x3d-next", {"double": 12, "single": 24})
    assert paper_variant("step1x3d", {"double": 12, "single": 24}) == "step1x-3d"
    assert paper_variant("hunyuan3d", {"double": 8, "single": 16}) in PAPER_MAPS
    assert {paper.family for paper in PAPER_MAPS.values()} < FAMILIES.keys()


@pytest.mark.parametrize("modulation", ["table", "both", "int8"])
def test_predicted_network_is_the_compressors(tmp_path: Path, modulation: str) -> None:
    """Exact for the network; the header is never under-estimated, so a target size holds."""
    checkpoint, _ = tiny_checkpoint(tmp_path / "model")
    vitality = table({"double": [0.2, 0.4], "single": [0.3, 0.2, 0.4]})
    vitality = replace(vitality, network=checkpoint.config)
    layer_map = plan_thresholds(vitality, {"double": 0.3}, {"single": 0.25})
    schedules = [replace(checkpoint.sampler, steps=steps) for steps in (4, 9)]
    predicted = predict_size(vitality, layer_map, schedules=schedules, modulation=modulation)
    made = compress(
        checkpoint, resolve_plan(layer_map, checkpoint), tmp_path / "x.safetensors",
        modulation=modulation, schedules=schedules, embed=False, dry_run=True,
    )  # fmt: skip
    assert predicted.dit == made.dit
    header = made.parts["header"]
    assert header <= predicted.parts["header"] <= header + 4096


def test_plans_by_name(tmp_path: Path) -> None:
    checkpoint, _ = tiny_checkpoint(tmp_path / "model")
    assert {b.bits for b in resolve_plan("int4", checkpoint).blocks} == {4}
    assert resolve_plan("int8", checkpoint).totals == {"double": 2, "single": 3}
    with pytest.raises(UserError, match="no plan 'int7'"):
        resolve_plan("int7", checkpoint)
    with pytest.raises(UserError, match="no layer map for hunyuan3d with 2 double"):
        resolve_plan("paper", checkpoint)
    file = tmp_path / "plan.json"
    file.write_text(LayerMap.uniform("furniture", {"double": 2, "single": 3}, 8).dumps())
    with pytest.raises(UserError, match="the plan is for furniture"):
        resolve_plan(str(file), checkpoint)
    file.write_text("[1")
    with pytest.raises(FormatError, match=r"plan\.json: not a plan"):
        resolve_plan(str(file), checkpoint)


def test_options(tmp_path: Path) -> None:
    file = tmp_path / "vitality.json"
    vitality = step1x()
    vitality.save(file)
    auto = from_options(file)
    assert auto.blocks == plan.plan_auto(vitality).blocks
    assert auto.notes["predicted bytes"] == predict_size(vitality, auto).total
    taus = from_options(file, tau={"double": 0.2})
    assert taus.pruned("double") == (7, 8, 9, 10, 11)
    size = auto.notes["predicted bytes"]
    assert from_options(file, target_size=size).notes["predicted bytes"] <= size
    with pytest.raises(UserError, match="exclude each other"):
        from_options(file, target_size=size, max_distance=0.1)
    with pytest.raises(UserError, match="no layer map"):
        from_options(file, paper=True)
    text = describe_plan(auto)
    assert "pruned   7-11" in text
    assert f"{size:,} bytes" in text


@pytest.mark.parametrize(
    ("taus", "words"),
    [
        ({"tau": {"double": -1.0}}, "--tau-double -1.0: expected a distance of at least 0"),
        (
            {"tau8": {"single": float("nan")}},
            "--tau8-single nan: expected a distance of at least 0",
        ),
        (
            {"tau": {"block": 0.1}},
            "--tau-block: this network has no block blocks; use --tau-double and --tau-single",
        ),
        (
            {"tau8": {"block": 0.1}},
            "--tau8-block: this network has no block blocks; use --tau8-double and --tau8-single",
        ),
        (
            {"tau": {"single": 0.9}},
            "--tau-single 0.9 prunes all 24 single blocks; the most vital one has 0.33",
        ),
    ],
)
def test_bad_thresholds(taus: dict[str, dict[str, float]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_thresholds(step1x(), **taus)


def trellis() -> Vitality:
    """A network of one block kind."""
    values = table({"block": [0.5, 0.12, 0.31, 0.22]})
    network = {
        "kind": "flow-transformer", "resolution": 4, "in_channels": 8, "patch": 1,
        "cond_channels": 32, "hidden": 32, "heads": 4, "blocks": [0, 1, 2, 3], "mlp_ratio": 4.0,
        "time": {"channels": 256, "hidden": 32, "scale": 1.0, "max_period": 10_000.0,
                 "cos_first": True, "activation": "silu"},
    }  # fmt: skip
    return replace(values, family="trellis", network=architecture_from_json(network))


def test_thresholds_of_a_network_of_one_block_kind(tmp_path: Path, capsys) -> None:
    file, out = tmp_path / "vitality.json", tmp_path / "plan.json"
    trellis().save(file)
    main(["plan", str(file), "-o", str(out), "--tau-block", "0.2", "--tau8-block", "0.3"])
    assert "pruned   1" in capsys.readouterr().out
    layer_map = load_plan(out)
    assert {block.index: block.bits for block in layer_map.blocks} == {0: 8, 2: 8, 3: 4}
    assert layer_map.notes["thresholds"] == {"block": {"prune below": 0.2, "8 bits above": 0.3}}
    line = complaint(capsys, "plan", file, "-o", out, "--tau8-double", "0.3")
    assert line == "vitapack: --tau8-double: this network has no double blocks; use --tau8-block"
    line = complaint(capsys, "plan", file, "-o", out, "--tau-block", "0.2", "--target-size", "1MB")
    assert line == "vitapack: --target-size and thresholds exclude each other; choose one"


def test_bad_max_distance() -> None:
    with pytest.raises(UserError, match="at least 0"):
        plan.plan_auto(step1x(), max_distance=-0.1)


def test_vitality_file(tmp_path: Path) -> None:
    file = tmp_path / "vitality.json"
    vitality = table({"double": [0.5], "single": [0.3, 0.2]}, curve=[("single", 1, 0.01)])
    vitality.save(file)
    assert Vitality.load(file) == vitality
    good = json.loads(file.read_text())
    changes = [
        ({"format": "other"}, "expected an object"),
        ({"version": 2}, "version 2"),
        ({"surprise": 1}, "unknown fields surprise"),
        ({"totals": {"double": 1, "single": 3}}, "do not match totals"),
        ({"scale": 0}, "scale 0"),
        ({"scale": float("nan")}, "NaN is not a JSON number"),
        ({"scale": 10**30}, "finite"),
        ({"totals": {"double": 10**9}}, "expected counts"),
        ({"totals": {}, "blocks": []}, "no blocks"),
        ({"rows": [{"distance": 1}]}, "missing 'image'"),
        ({"network": {"kind": "double-single-dit"}}, "network: missing cond_channels"),
        ({"blocks": [{"kind": "double"}]}, "missing 10|required"),
        ({"settings": {"metric": "emd2"}}, "metric"),
        ({"blocks": None}, "not a vitality file"),
    ]
    for change, words in changes:
        file.write_text(json.dumps(good | change))
        with pytest.raises(FormatError, match=words):
            Vitality.load(file)
    for text in ("", "{", "[]", "null", '"x"'):
        file.write_text(text)
        with pytest.raises(FormatError, match=r"vitality\.json"):
            Vitality.load(file)
    with pytest.raises(UserError, match=r"none\.json"):
        Vitality.load(tmp_path / "none.json")
    for missing in good:
        if missing not in ("format", "version"):
            file.write_text(json.dumps({k: v for k, v in good.items() if k != missing}))
            with pytest.raises(FormatError, match=missing):
                Vitality.load(file)


def paths(value: object, at: tuple = ()) -> Iterator[tuple]:
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*at, key)
            yield from paths(inner, (*at, key))


ODD = (None, [], {}, "x", -1, 0, True, 1.5, 8.0, 10**9, 10**30, 1e308, [1], {"a": [1]}, "9" * 5000)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_files_edited_by_hand_are_one_line_or_a_plan(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("edited")
    vitality = table({"double": [0.5, 0.4], "single": [0.3, 0.2]}, curve=[("single", 1, 0.01)])
    whole = vitality.to_json() | {"rows": [{"image": "a", "removed": []}]}
    whole = data.draw(st.sampled_from([whole, plan.plan_auto(vitality).to_json()]))
    made = json.loads(json.dumps(whole))
    *parents, last = data.draw(st.sampled_from(list(paths(made))))
    place = made
    for key in parents:
        place = place[key]
    if data.draw(st.integers(0, 9)):
        place[last] = data.draw(st.sampled_from(ODD))
    else:
        del place[last]
    file = folder / "edited.json"
    file.write_text(json.dumps(made))
    target = data.draw(st.sampled_from([None, 10**9]))
    line, found = "", None
    try:
        analysed = "network" in whole
        found = from_options(file, target_size=target) if analysed else load_plan(file)
    except UserError as error:
        line = str(error)
    if found is None:
        assert str(file) in line
        assert "\n" not in line
        assert len(line) < 600
    else:
        assert LayerMap.from_json(json.loads(found.dumps())) == found


def test_ranking_is_least_vital_first() -> None:
    vitality = step1x()
    means = [block.mean for block in vitality.ranked()]
    assert all(a <= b for a, b in itertools.pairwise(means))
    assert vitality.ranked("single")[0].index == 23  # of equal ones the deepest
