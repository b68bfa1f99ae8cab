"""The packed file's container: 16 MB in 256 tensors, written, checked and read."""

import pytest

from vitapack.runtime.format.container import (
    content_digest,
    lay_out,
    read_container,
    write_container,
)

TENSORS = {f"blocks.{i}.weight.q8": ("I8", (256, 256)) for i in range(256)}
DATA = bytes(256 * 256)


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "16mb.safetensors")
    return tmp_path / "16mb.safetensors"


def write(path):
    write_container(path, lay_out(TENSORS, {}), ((name, DATA) for name in TENSORS))


def bench_write(benchmark, tmp_path):
    benchmark(write, tmp_path / "16mb.safetensors")


def bench_read_header(benchmark, path):
    benchmark(read_container, path)


def bench_digest(benchmark, path):
    benchmark(content_digest, path)
