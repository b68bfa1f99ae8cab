"""The container against the safetensors library, and against files that lie."""

import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save

from vitapack.runtime.errors import FormatError
from vitapack.runtime.format import container
from vitapack.runtime.format.container import lay_out, read_container, write_container

ARRAYS = {
    "b.codes": np.arange(15, dtype=np.uint8).reshape(3, 5),
    "a.table": np.arange(6, dtype=np.float16).reshape(2, 3),
    "z.scale": np.array([1.5, -2.0], dtype=np.float32),
    "a.q8": np.array([[-127, 5]], dtype=np.int8),
    "t": np.array([0.25], dtype=np.float64),
    "empty": np.zeros((0, 4), dtype=np.float32),
    "größe": np.array([7], dtype=np.int64),
}
NAMES = {"uint8": "U8", "float16": "F16", "float32": "F32", "int8": "I8", "float64": "F64"}
NAMES["int64"] = "I64"


def specs(arrays):
    return {name: (NAMES[str(a.dtype)], a.shape) for name, a in arrays.items()}


def write(path, arrays=ARRAYS, **metadata):
    layout = lay_out(specs(arrays), metadata)
    items = [
        (name, np.ascontiguousarray(a).reshape(-1).view(np.uint8)) for name, a in arrays.items()
    ]
    digest = write_container(path, layout, items[::-1])  # any order
    return layout, digest


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_same_bytes_as_the_library(tmp_path):
    path = tmp_path / "a.safetensors"
    layout, digest = write(path)
    ours = path.read_bytes()
    # The library orders metadata by hash, so it is given the one key that we always write.
    assert ours == save(ARRAYS, {"sha256": digest})
    assert len(ours) == layout.size


def test_the_library_reads_it(tmp_path):
    path = tmp_path / "a.safetensors"
    _, digest = write(path, vitapack='{"a": "\\"quoted\\" ü"}')
    loaded = load_file(path)
    assert set(loaded) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert np.array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype
    with safe_open(path, "np") as file:
        assert file.metadata() == {"sha256": digest, "vitapack": '{"a": "\\"quoted\\" ü"}'}


def test_we_read_what_the_library_writes(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(ARRAYS, {"x": "y"}))
    found = read_container(path)
    assert found.metadata == {"x": "y"}
    assert {name: (i.dtype, i.shape) for name, i in found.tensors.items()} == specs(ARRAYS)
    raw = path.read_bytes()
    for name, info in found.tensors.items():
        data = raw[found.data_start + info.start : found.data_start + info.end]
        assert data == ARRAYS[name].tobytes()


def test_digest_covers_every_byte(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, vitapack="{}")
    stated, actual = container.content_digest(path)
    assert stated == actual
    good = path.read_bytes()
    for place in range(0, len(good), 3):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        if 8 <= place < container.DIGEST_AT:
            with pytest.raises(FormatError, match="states no sha256"):
                container.content_digest(path)
        else:
            stated, actual = container.content_digest(path)
            assert stated != actual


def test_writer_refuses_what_was_not_announced(tmp_path):
    layout = lay_out({"a": ("U8", (2,)), "b": ("U8", (1,))}, {})
    path = tmp_path / "a.safetensors"
    for items, message in (
        ([("a", b"12")], "not written: b"),
        ([("a", b"12"), ("a", b"12")], "written twice"),
        ([("c", b"")], "not in the layout"),
        ([("a", b"1")], "1 bytes, expected 2"),
    ):
        with pytest.raises(ValueError, match=message):
            write_container(path, layout, items)
        assert list(tmp_path.iterdir()) == []


HEADERS = [
    ([], "not a JSON object"),
    (b"{", "not valid JSON"),
    (b'{"a":1}\xff', "not valid JSON"),
    (b'{"a":' + b"[" * 100_000, "not valid JSON"),
    (b'{"a":{},"a":{}}', "'a' occurs twice"),
    (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', "NaN is not a JSON number"),
    ({"__metadata__": {"a": 1}}, "object of strings"),
    ({"a": {"dtype": "U8", "shape": [1]}}, "expected dtype, shape and data_offsets"),
    ({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 1]}}, "unknown dtype"),
    ({"a": {"dtype": [], "shape": [1], "data_offsets": [0, 1]}}, "unknown dtype"),
    ({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}, "expected a shape"),
    ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, "expected a shape"),
    ({"a": {"dtype": "U8", "shape": [1] * 9, "data_offsets": [0, 1]}}, "expected a shape"),
    ({"a": {"dtype": "U8", "shape": [10**40], "data_offsets": [0, 1]}}, "expected a shape"),
    ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, "needs 48357"),
    ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]}}, "data_offsets"),
    ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, "to start at byte 0"),
    ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, "cut off"),
    ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, "appended"),
    ({"": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, "printable name"),
    ({"x\n": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, "printable name"),
    (
        {
            "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
            "b": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
        },
        "without gaps",
    ),
]


@pytest.mark.parametrize(("header", "message"), HEADERS)
def test_broken_headers(tmp_path, header, message):
    path = raw_file(tmp_path / "a.safetensors", header, b"12")
    with pytest.raises(FormatError, match=message) as caught:
        read_container(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_broken_files(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FormatError, match="no such file"):
        read_container(path)
    path.write_bytes(b"1234")
    with pytest.raises(FormatError, match="4 bytes, too short"):
        read_container(path)
    raw_file(path, {}, length=2**63)
    with pytest.raises(FormatError, match="cut off"):
        read_container(path)
    with pytest.raises(FormatError, match="not a regular file"):
        read_container(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="not a regular file"):
        read_container(tmp_path / "pipe")


def test_an_absurd_header_is_never_read(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 34))
        file.truncate(1 << 35)  # sparse: no disk is used
    tracemalloc.start()
    with pytest.raises(FormatError, match="at most"):
        read_container(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_files_raise_format_errors_only(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    write(folder / "good", vitapack="{}")
    raw = bytearray((folder / "good").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "digit"]))
        if kind == "flip":
            raw[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del raw[place : place + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            raw[place:place] = data.draw(st.binary(min_size=1, max_size=20))
        else:
            raw[place : place + 1] = b"99999999999"
        if not raw:
            break
    path = folder / "bad"
    path.write_bytes(raw)
    try:
        found = read_container(path)
    except FormatError:
        return
    assert sum(info.nbytes for info in found.tensors.values()) < len(raw)
