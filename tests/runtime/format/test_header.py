"""The packed file: golden bytes, hand decoding, and headers that lie."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_packed import GOLDEN, LAYER_MAP, NETWORK, SAMPLER, arrays, content, fields, write_packed
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_config

from vitapack.kernels.linear.weights import check, dequantize
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.format.container import file_digest, lay_out, write_container
from vitapack.runtime.format.describe import describe
from vitapack.runtime.format.header import KEY, read_header
from vitapack.runtime.format.layermap import LayerMap
from vitapack.runtime.format.reader import verify
from vitapack.runtime.format.tensors import model_tensors
from vitapack.runtime.loading.packed import load_packed_dit
from vitapack.runtime.loading.source import packed_component
from vitapack.runtime.networks.dit import DiT
from vitapack.runtime.networks.linear import PackedLinear

ROOT = Path(__file__).parents[3]


def test_golden_bytes(tmp_path):
    path = write_packed(tmp_path / "m.safetensors")
    assert path.read_bytes() == GOLDEN.read_bytes()
    # Stated apart from the code above: the golden file itself must not be rewritten by accident.
    assert file_digest(GOLDEN) == "766f679d64f2dd51ae67318322cac2530ed4f68cfb180f41709c6a3b1aee0b1f"
    assert verify(GOLDEN) == read_header(GOLDEN).sha256


def test_golden_header():
    header = read_header(GOLDEN)
    expected = fields()
    assert header.layer_map == LAYER_MAP
    for name in ("tool", "family", "variant", "source", "linears", "rest", "quantizer", "sampler"):
        assert getattr(header, name) == expected[name]
    assert header.nodes() == [0.0, 0.5]
    assert header.schedules() == "euler 3 steps"
    assert header.sizes().total == header.size == GOLDEN.stat().st_size
    assert json.loads(json.dumps(header.to_json()))["sizes"]["total"] == header.size
    config = header.network
    assert config.double_blocks == (1,)
    assert config.time.channels == 8


def test_golden_weights_decoded_by_hand():
    header, raw = read_header(GOLDEN), GOLDEN.read_bytes()

    def data(name):
        info = header.tensors[name]
        return raw[header.data_start + info.start : header.data_start + info.end]

    dit = load_packed_dit(GOLDEN)
    name = "double_blocks.1.img_mlp.2"  # (4, 8) in 4 bits, groups of 32
    codes, groups = data(f"model.{name}.weight.q4"), data(f"model.{name}.weight.group")
    scale = np.frombuffer(data(f"model.{name}.weight.scale"), "<f4")
    weight = dequantize(dit.get_submodule(name).packed()).numpy()
    for n in range(4):
        s, z = (groups[2 * n] >> 4) + 1, groups[2 * n] & 15  # group 0 holds inputs 0..31
        for k in range(8):
            q = codes[32 * n + k] & 15
            assert weight[n, k] == np.float32(s * (q - z)) * scale[n]
    for name in header.linears:
        check(dit.get_submodule(name).packed())
    name = "single_blocks.0.linear2"
    codes = np.frombuffer(data(f"model.{name}.weight.q8"), np.int8).reshape(4, 12)
    scale = np.frombuffer(data(f"model.{name}.weight.scale"), "<f4")
    weight = dequantize(dit.get_submodule(name).packed()).numpy()
    assert np.array_equal(weight, codes.astype(np.float32) * scale[:, None])
    table = dit.single_blocks["0"].modulation.table
    expected = np.frombuffer(data("model.single_blocks.0.modulation.lin.table"), "<f2")
    assert np.array_equal(table.numpy().ravel(), expected.astype(np.float32))


def test_the_loaded_network_runs_and_says_what_it_is(tmp_path):
    dit = load_packed_dit(GOLDEN)
    assert isinstance(dit.double_blocks["1"].img_attn.qkv, PackedLinear)
    assert "int4 group 32" in repr(dit)
    assert not dit.training
    assert all(not p.requires_grad for p in dit.parameters())
    out = dit(torch.zeros(1, 3, 2), torch.tensor([0.5]), torch.zeros(1, 2, 3))
    assert out.shape == (1, 3, 2)
    half = load_packed_dit(GOLDEN, dtype=torch.bfloat16)
    assert half.cond_in.weight.dtype == torch.bfloat16
    assert half.single_blocks["0"].linear1.packed().scale.dtype == torch.float32
    decoder = packed_component(read_header(GOLDEN), "shape_decoder", None)
    assert torch.equal(
        decoder.read("post_kl.weight").float(),
        torch.from_numpy(arrays()["vae.post_kl.weight"].astype(np.float32)),
    )
    with pytest.raises(UserError, match="does not hold the conditioner"):
        packed_component(read_header(GOLDEN), "conditioner", None)


def test_the_table_of_tensors_is_the_networks_own_state_dict():
    for changes in ({}, {"guidance_embed": True}, {"qkv_bias": False}, {"double_blocks": (1,)}):
        config = tiny_config(**changes)
        kept = {"kind": "kept", "dtype": "F16", "nodes": 0}
        tensors = model_tensors(config, {}, "F16", kept)
        with torch.device("meta"):
            state = DiT(config).state_dict()
        assert {n.removeprefix("model."): shape for n, (_, shape) in tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in state.items()
        }
        linears, norms = config.linears(), config.norms()
        owned = {f"{name}.weight" for name in linears} | set(norms)
        owned |= {f"{name}.bias" for name, linear in linears.items() if linear.bias}
        assert owned == set(state)


def test_tampered_content_is_found(tmp_path):
    raw = bytearray(GOLDEN.read_bytes())
    raw[-5] ^= 4
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw)
    read_header(path)  # the header is whole
    for call in (verify, load_packed_dit):
        with pytest.raises(FormatError, match=r"m\.safetensors: the content's sha256 is"):
            call(path)
    load_packed_dit(path, verify_content=False)


def test_truncated_at_any_length(tmp_path):
    raw = GOLDEN.read_bytes()
    path = tmp_path / "m.safetensors"
    for length in (0, 1, 7, 8, 9, 100, read_header(GOLDEN).data_start, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError, match=r"m\.safetensors"):
            load_packed_dit(path)


def test_other_files_are_told_apart(tmp_path):
    path = tmp_path / "m.safetensors"
    layout = lay_out({"a": ("U8", (1,))}, {"format": "pt"})
    write_container(path, layout, [("a", b"1")])
    with pytest.raises(FormatError, match=r"but not a packed one.*vitapack compress"):
        read_header(path)


def changed(path, value):
    """Header fields with the entry at a dotted path replaced; `...` removes it."""
    made = content()
    *parents, last = path.split(".")
    place = made
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    if value is ...:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return made


def write_raw(path, made, tensors=None):
    """As `write_packed`, with metadata that `PackedContent` cannot hold."""
    text = made if isinstance(made, str) else json.dumps({"format": 1, **made}, sort_keys=True)
    held = arrays() if tensors is None else tensors
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "int8": "I8", "uint8": "U8"}
    names["int64"] = "I64"
    specs = {name: (names[str(array.dtype)], array.shape) for name, array in held.items()}
    write_container(
        path, lay_out(specs, {KEY: text}), ((name, a.tobytes()) for name, a in held.items())
    )
    return path


QKV = "double_blocks.1.img_attn.qkv"
LIES = [
    ("format", 2, "format version '2', this vitapack reads version 1"),
    ("format", True, "format version"),
    ("surprise", 1, "unknown field 'surprise'"),
    ("family", ..., "missing family"),
    ("family", 3, "family: expected a short text"),
    ("network", [], "network: expected an object"),
    (
        "network.kind",
        "moe",
        "network kind 'moe': this vitapack knows double-single-dit, flow-transformer",
    ),
    ("network.hidden", 6, "the layer map|expected"),
    ("network.hidden", 5, "hidden 5 must be a multiple of heads 2"),
    ("network.hidden", 10**12, "network hidden: expected a size"),
    ("network.heads", True, "network heads: expected a count"),
    ("network.heads", 1, "expected F16 .4., found F16 .2."),
    ("network.mlp_ratio", 1e9, "network mlp_ratio"),
    ("network.double_blocks", [1, 1], "ascending original indices"),
    ("network.double_blocks", [0], "the layer map keeps double blocks .1., the network has .0."),
    ("network.time.activation", "relu", "'silu' or 'gelu'"),
    ("network.time.surprise", 1, "network time: unknown field"),
    ("layer_map.group", 48, "group 48"),
    ("layer_map.group", 64, "require layout w4-b64-g64-v1, found w4-b64-g32-v1"),
    ("layer_map.blocks.0.bits", 8, "require layout w8-c-v1, found w4-b64-g32-v1"),
    ("layer_map.blocks.0.kind", "block", "layer map|only 0 such"),
    ("layer_map.blocks", [], "the layer map keeps double blocks"),
    ("layer_map.notes", 7, "expected|object|iterable"),
    (f"linears|{QKV}", "w3-v1", "unknown layout 'w3-v1'; this vitapack reads"),
    (f"linears|{QKV}", ["w8-c-v1"], "unknown layout"),
    (f"linears|{QKV}", ..., "require layout w4-b64-g32-v1, found None"),
    ("linears|nobody", "w8-c-v1", "require layout None, found w8-c-v1"),
    ("rest", "BF16", "this vitapack knows F16, F32"),
    ("rest", "F32", "expected F32"),
    ("modulation.kind", "spline", "this vitapack knows table, int8, both, kept"),
    ("modulation.kind", "kept", "nodes: expected 1..100000 for tables, else 0"),
    ("modulation.dtype", "F32", "expected F32 .2, 24., found F16 .2, 24."),
    ("modulation.nodes", 3, "2 distinct times, the tables 3 rows"),
    ("modulation.nodes", 10**9, "nodes: expected"),
    ("modulation.guidance", "high", "a number or null"),
    ("modulation.schedules", [], "0 distinct times"),
    ("modulation.schedules.0.steps", 10**9, "whole number from 1 to"),
    ("modulation.schedules.0.name", "magic", "no sampler 'magic'"),
    ("sampler.name", "magic", "no sampler 'magic'"),
    ("sampler", {}, "sampler settings hold"),
    ("source.sha256", "abc", "64 hexadecimal digits"),
    ("source.bytes", -1, "source bytes"),
    ("shape_decoder.storage", "none", "is none, but the file holds tensors under 'vae.'"),
    ("conditioner.storage", "embedded", "holds no tensors under 'conditioner.'"),
    ("conditioner.storage", "referenced", "conditioner source: expected an object"),
    ("shape_decoder.source", {}, "a source is for referenced components only"),
]


@pytest.mark.parametrize(("path", "value", "message"), LIES)
def test_headers_that_lie(tmp_path, path, value, message):
    if path.startswith("linears|"):
        made = content()
        made["linears"][path.partition("|")[2]] = value
        if value is ...:
            del made["linears"][QKV]
    else:
        made = changed(path, value)
    file = write_raw(tmp_path / "m.safetensors", made)
    with pytest.raises(FormatError, match=message) as caught:
        load_packed_dit(file)
    text = str(caught.value)
    assert text.startswith(f"{file}: ")
    assert "\n" not in text
    assert len(text) < 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[]", "metadata: expected an object, found list"),
        ('{"format": 1, "format": 1}', "'format' occurs twice"),
        ('{"format": 1e999}', "format version 'inf'"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": ' + "9" * 5000 + "}", "m.safetensors"),
    ],
)
def test_metadata_that_is_no_header(tmp_path, text, message):
    file = write_raw(tmp_path / "m.safetensors", text)
    with pytest.raises(FormatError, match=message):
        read_header(file)


def test_wrong_tensors_are_named(tmp_path):
    name = f"model.{QKV}.weight.q4"
    for change, message in (
        ({name: None}, rf"tensor '{name}' is missing, expected U8 \[12, 32\]"),
        ({"model.extra": np.zeros(1, np.float32)}, "'model.extra' does not belong"),
        ({"other": np.zeros(1, np.float32)}, "'other' does not belong"),
        ({name: np.zeros((12, 31), np.uint8)}, r"expected U8 \[12, 32\], found U8 \[12, 31\]"),
        ({name: np.zeros((12, 32), np.int8)}, r"expected U8 \[12, 32\], found I8 \[12, 32\]"),
        ({name: np.zeros((32, 12), np.uint8)}, r"found U8 \[32, 12\]"),
    ):
        tensors = {k: v for k, v in (arrays() | change).items() if v is not None}
        file = write_packed(tmp_path / "m.safetensors", tensors=tensors)
        with pytest.raises(FormatError, match=message):
            read_header(file)


def test_broken_numbers_are_named(tmp_path):
    for name in ("model.latent_in.bias", "model.single_blocks.0.linear1.weight.scale"):
        tensors = arrays()
        tensors[name][1] = np.nan
        file = write_packed(tmp_path / "m.safetensors", tensors=tensors)
        with pytest.raises(FormatError, match=f"tensor '{name}' holds NaN or infinite values"):
            load_packed_dit(file)
    for value in (0.0, -0.5):
        tensors = arrays()
        tensors["model.single_blocks.0.linear1.weight.scale"][1] = value
        file = write_packed(tmp_path / "m.safetensors", tensors=tensors)
        with pytest.raises(FormatError, match=f"holds {value:.3g}; scales are above 0"):
            load_packed_dit(file)
    tensors = arrays()
    tensors["modulation.t"][1] = 0.25
    file = write_packed(tmp_path / "m.safetensors", tensors=tensors)
    with pytest.raises(FormatError, match=r"'modulation\.t': expected the times of euler 3 steps"):
        load_packed_dit(file)


def paths(value, at=()):
    yield at
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*at, key))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    | st.sampled_from(["F16", "table", "w8-c-v1", "embedded", 8, 4, 0, 1, 2**31, [0], [1]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)  # fmt: skip
WHOLE = content()


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_any_mutated_header_gives_a_format_error_or_a_sound_file(tmp_path_factory, data):
    made = copy.deepcopy(WHOLE)
    for _ in range(data.draw(st.integers(1, 2))):
        *parents, last = data.draw(st.sampled_from([p for p in paths(made) if p]))
        place = made
        for key in parents:
            place = place[key]
        if data.draw(st.booleans()):
            place[last] = data.draw(JSON)
        else:
            del place[last]
    file = write_raw(tmp_path_factory.getbasetemp() / "fuzz.safetensors", made)
    try:
        header = read_header(file)
    except FormatError as error:
        message = str(error)
    else:
        message = describe(header).splitlines()[0]
        json.dumps(header.to_json())
        load_packed_dit(file)
    assert message.count("\n") == 0


BLOCKED = """
import sys
sys.path.insert(0, {root!r})
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "safetensors", "triton"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
from vitapack.runtime.format.describe import describe
from vitapack.runtime.format.header import read_header
from vitapack.runtime.format.reader import verify
header = read_header({file!r})
verify({file!r})
print(describe(header))
print(len(header.to_json()["tensors"]))
assert "torch" not in sys.modules
"""


def test_inspect_needs_no_torch():
    code = BLOCKED.format(root=str(ROOT), file=str(GOLDEN))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 blocks kept: 1 in 4 bits (groups of 32)" in done.stdout
    assert "table F16, 2 times: euler 3 steps" in done.stdout


def test_describe_shows_pruned_blocks_and_every_width(tmp_path):
    page = describe(read_header(GOLDEN))
    assert "    .4" in page
    assert "model       hunyuan3d worked example" in page
    assert "decoder     embedded" in page
    assert NETWORK.hidden == 4
    assert SAMPLER.steps == 3
    total = sum(
        int(line.split()[-2].replace(",", ""))
        for line in page.splitlines()
        if line.endswith(" B") and not line.startswith(("network", "file"))
    )
    assert total == GOLDEN.stat().st_size


def test_layer_maps_travel_whole():
    assert LayerMap.from_json(read_header(GOLDEN).layer_map.to_json()) == LAYER_MAP


def test_the_documents_worked_example_is_true():
    text, raw = (ROOT / "docs" / "format.md").read_text(), GOLDEN.read_bytes()
    rows = re.findall(r"^\| 0x([0-9a-f]+) \| ([0-9a-f ]+) \|", text, re.MULTILINE)
    assert len(rows) == 8
    for offset, data in rows:
        expected = bytes.fromhex(data)
        assert raw[int(offset, 16) :][: len(expected)] == expected
    weight = dequantize(load_packed_dit(GOLDEN).double_blocks["1"].img_mlp[2].packed())
    assert weight[0, 0] == -1.875
