"""Where a result may be written: nothing is replaced but files, links are followed."""

import os
import stat
from pathlib import Path

import pytest

from vitapack.compressor.packing.resumable import partial_file
from vitapack.runtime.errors import UserError
from vitapack.runtime.files import atomic_path, destination
from vitapack.runtime.format.container import lay_out


def write(path: Path, text: str = "new") -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def publish(path: Path) -> None:
    with partial_file(path, lay_out({"a": ("U8", (1,))}, {})) as file:
        file.put("a", b"1")
        file.publish()


def test_a_device_or_a_pipe_is_never_replaced(tmp_path: Path) -> None:
    """`-o /dev/null`, run by root, would rename a file onto the device."""
    pipe = tmp_path / "null"
    os.mkfifo(pipe)
    link = tmp_path / "link"
    link.symlink_to(pipe)
    for place in (pipe, link):
        with pytest.raises(UserError, match=f"cannot write {place}: it is a device or a pipe"):
            write(place)
        with pytest.raises(UserError, match="a device or a pipe"):
            publish(place)
        assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(UserError, match="it is a folder; name a file"):
        write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "null"]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    real = tmp_path / "there" / "a.txt"
    link = tmp_path / "a.txt"
    link.symlink_to(real)  # to a file that is yet to be
    for text in ("new", "newer"):
        write(link, text)
        assert link.is_symlink()
        assert real.read_text() == text
    assert [p.name for p in real.parent.iterdir()] == ["a.txt"]


def test_a_place_that_cannot_be_is_known_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    around = tmp_path / "around"
    around.symlink_to(around)
    for place in (file / "a.glb", around / "a.glb", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot write"):
            destination(place)
    assert destination(tmp_path / "new" / "a.glb") == tmp_path / "new" / "a.glb"
    assert not (tmp_path / "new").exists()
