"""Picture to mesh for every family, original and packed, on tiny models in the released layouts."""

import pytest
import torch
from tiny_released import chair, tiny_released

from vitapack.compressor.packing.compress import compress
from vitapack.compressor.planning.files import resolve_plan
from vitapack.compressor.tools.random_checkpoint import MODELS, files_of
from vitapack.runtime.decode.mesh import report
from vitapack.runtime.errors import UserError
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.format.header import read_header
from vitapack.runtime.pipeline.pipeline import Pipeline

NAMES = [name for name in MODELS if name != "trellis-slat"]


def resolution(pipeline, side=16):
    if pipeline.decoder.resolution is not None:
        pipeline.decoder.resolution = side
    return pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name) -> a tiny released folder, made once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tiny_released(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.mark.parametrize("name", NAMES)
def test_picture_to_mesh(name, folders, relative, tmp_path):
    """The packed model, parts beside it and lean, draws what the original draws."""
    folder = folders(name)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.variant.startswith(name.split("-")[0])
    original = resolution(Pipeline.from_model(folder, device="cpu"))
    picture = {"front": chair(), "left": chair()} if name.endswith("mv") else chair()
    cond = original.condition(picture)
    steps = 3
    latents = original.latents(cond, original.noise(1), steps=steps)
    out = tmp_path / "m.safetensors"
    plan = resolve_plan("int8", checkpoint)
    compress(checkpoint, plan, out, steps=[steps], embed=False)
    packed = resolution(Pipeline.from_packed(out, "cpu", parts=folder, memory="lean"))
    again = packed.latents(packed.condition(picture), packed.noise(1))
    assert relative(again, latents) < 0.1
    views = len(picture) if isinstance(picture, dict) else 1
    predicted = packed.predicted_bytes(views=views)
    mesh = packed(picture, seed=1)
    assert len(mesh.faces)
    assert mesh.metadata["variant"] == checkpoint.variant
    assert report(mesh).components >= 1
    assert set(packed.bytes) == {"condition", "denoise", "decode"} == set(packed.seconds)
    assert {phase: row["predicted"] for phase, row in packed.bytes.items()} == predicted
    assert not packed._dit.loaded  # every phase's network is gone again
    held = sum(t.nbytes for t in packed.dit.state_dict().values())
    assert packed._dit.nbytes == pytest.approx(held, rel=0.02)
    full = resolution(Pipeline.from_packed(out, "cpu", parts=folder, memory="resident"))
    beyond = full.predicted_bytes()["decode"] - full._base
    assert beyond > predicted["decode"] - packed._base  # nothing is given back there


@pytest.mark.parametrize("name", ["hunyuan3d-2mini", "step1x-3d-label", "trellis-ss"])
def test_guidance_in_two_passes_is_one_batch(name, folders):
    pipeline = Pipeline.from_model(folders(name), device="cpu")
    cond, noise = pipeline.condition(chair()), pipeline.noise(0)
    one, two = (pipeline.latents(cond, noise, steps=3, one_batch=b) for b in (True, False))
    assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(pipeline.latents(cond, noise, steps=3, guidance=1.0), one)


@pytest.mark.parametrize("name", ["hunyuan3d-2mini", "step1x-3d-label", "trellis-ss"])
def test_torch_s_default_dtype_changes_nothing(name, folders, default_bfloat16):
    def made():
        pipeline = resolution(Pipeline.from_model(folders(name), device="cpu"))
        cond = pipeline.condition(chair())
        return cond, pipeline.latents(cond, pipeline.noise(0), steps=2), pipeline(chair(), steps=2)

    expected = made()
    with default_bfloat16():
        found = made()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert (found[2].vertices == expected[2].vertices).all()


def test_label_tokens_follow_the_picture_s(folders):
    plain, label = (
        Pipeline.from_model(folders(name), device="cpu").condition(chair())
        for name in ("step1x-3d", "step1x-3d-label")
    )
    assert plain.shape == (1, 1370, 64)
    assert label.shape == (1, 1373, 64)


def test_trellis_keeps_registers(folders):
    pipeline = Pipeline.from_model(folders("trellis-ss"), device="cpu")
    cond = pipeline.condition(chair())
    assert cond.shape == (1, 1374, 64)
    assert torch.allclose(cond.mean(-1), torch.zeros(1, 1374), atol=1e-5)
    assert pipeline.noise(0).shape == (1, 8, 4, 4, 4)


def test_embedded_parts_need_no_original(folders, relative, tmp_path):
    folder = folders("hunyuan3d-2mini")
    out = tmp_path / "m.safetensors"
    checkpoint = open_checkpoint(folder)
    compress(checkpoint, resolve_plan("int8", checkpoint), out, steps=[3], embed=True)
    alone = resolution(Pipeline.from_packed(out, "cpu"))
    beside = Pipeline.from_packed(out, "cpu", parts=folder)
    a, b = alone.condition(chair()), beside.condition(chair())
    assert torch.nn.functional.cosine_similarity(a, b, dim=-1).min() > 0.999
    held = {name for name in read_header(out).tensors if name.startswith("conditioner.")}
    assert sum(name.endswith(".q8") for name in held) == 12  # 6 linears a layer
    assert len(alone(chair(), seed=1).faces)


def test_parts_that_are_missing_or_another_model_s(folders, tmp_path):
    folder = folders("hunyuan3d-2mini")
    out = tmp_path / "m.safetensors"
    checkpoint = open_checkpoint(folder)
    compress(checkpoint, resolve_plan("int8", checkpoint), out, steps=[3], embed=False)
    with pytest.raises(UserError, match="does not hold the conditioner; give the folder"):
        Pipeline.from_packed(out, "cpu")
    with pytest.raises(UserError, match="is not the original of"):
        Pipeline.from_packed(out, "cpu", parts=folders("step1x-3d"))
    with pytest.raises(UserError, match="no memory mode 'tiny'"):
        Pipeline.from_packed(out, "cpu", parts=folder, memory="tiny")
    bare = tiny_released("trellis-ss", tmp_path / "trellis")
    (bare / "dinov2_vitl14_reg4_pretrain.safetensors").unlink()
    with pytest.raises(UserError, match="holds no conditioner"):
        Pipeline.from_model(bare, device="cpu")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("hunyuan3d-2.0", 4_928_151_562),
        ("hunyuan3d-2mini", 3_819_958_234),
        ("trellis-ss", None),
        ("trellis-slat", 1_203_755_136),
    ],
)
def test_full_size_files_have_the_released_sizes(name, size):
    """To within the header: 0.01 % (the weights are not drawn here)."""
    files = files_of(name)
    if name == "trellis-ss":
        for place, expected in (("ss_flow", 1_130_770_840), ("ss_dec", 147_591_972)):
            specs = next(s for p, s in files.tensors.items() if place in p)
            found = sum(torch.Size(s).numel() * {"F16": 2, "F32": 4}[d] for d, s in specs.values())
            assert found == pytest.approx(expected, rel=2e-4)
    else:
        assert files.nbytes == pytest.approx(size, rel=2e-4)


def test_unknown_names_and_parts():
    with pytest.raises(UserError, match="no model 'hunyuan': choose one of"):
        files_of("hunyuan")
    with pytest.raises(UserError, match="no part 'vae': choose among"):
        files_of("step1x-3d", ["vae"])


def test_the_same_seed_gives_the_same_bytes_and_parts_stand_alone(tmp_path):
    from tiny_released import SIZES

    from vitapack.compressor.tools.random_checkpoint import write

    sizes = SIZES["step1x"]
    for place, parts in (("a", ("dit", "decoder")), ("b", ("dit",))):
        write("step1x-3d", tmp_path / place, parts=parts, sizes=sizes)
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert not (tmp_path / "b" / "vae").exists()
    write("step1x-3d", tmp_path / "c", parts=("dit",), sizes=sizes, seed=1)
    assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()
    with pytest.raises(UserError, match="holds no conditioner"):
        Pipeline.from_model(tmp_path / "a", device="cpu")
