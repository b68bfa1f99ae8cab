"""Pictures: what is accepted, what is refused in one line, where the object ends up."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitapack.runtime.condition.images import (
    decode_image,
    find_images,
    load_image,
    recentre,
    separate,
)
from vitapack.runtime.errors import UserError


def disc(size: int = 100, radius: int = 30, grey: int = 90) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:size, :size] - size // 2
    inside = x**2 + y**2 <= radius**2
    rgb = np.where(inside[..., None], grey, 255).astype(np.uint8).repeat(3, axis=2)
    return rgb, np.where(inside, 255, 0).astype(np.uint8)


def test_alpha_is_the_object() -> None:
    rgb, alpha = disc()
    found_rgb, found_alpha = separate(Image.fromarray(np.dstack([rgb, alpha])))
    np.testing.assert_array_equal(found_alpha, alpha)
    np.testing.assert_array_equal(found_rgb, rgb)


def test_a_plain_background_is_keyed_out_even_with_noise() -> None:
    rgb, alpha = disc()
    noise = np.random.default_rng(0).integers(0, 7, rgb.shape)
    _, found = separate(Image.fromarray((rgb - noise).astype(np.uint8)))
    assert ((found > 0) == (alpha > 0)).mean() > 0.999


def test_a_busy_background_is_an_explicit_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rembg", None)
    busy = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    with pytest.raises(UserError, match="no alpha channel and no plain background"):
        separate(Image.fromarray(busy), "room.png")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_nothing_in_the_picture(mode: str) -> None:
    with pytest.raises(UserError, match=r"^empty.png: no object in the image"):
        separate(Image.new(mode, (50, 50)), "empty.png")


def test_all_white_has_no_object() -> None:
    with pytest.raises(UserError, match="no object"):
        separate(Image.new("RGB", (50, 50), "white"))


def test_tiny_object_is_refused() -> None:
    rgb, alpha = disc(radius=4)
    with pytest.raises(UserError, match="only 9 x 9 pixels"):
        separate(Image.fromarray(np.dstack([rgb, alpha])))


@pytest.mark.parametrize(("width", "height"), [(40, 80), (300, 20), (64, 64)])
def test_recentre_fits_the_longer_side_into_the_middle(width: int, height: int) -> None:
    rgb = np.full((400, 400, 3), 50, np.uint8)
    alpha = np.zeros((400, 400), np.uint8)
    alpha[10 : 10 + height, 30 : 30 + width] = 255
    square = recentre(rgb, alpha, 112, border=0.15, background=255)
    assert square.shape == (112, 112, 3)
    rows, columns = np.where((square < 200).any((1, 2)))[0], np.where((square < 200).any((0, 2)))[0]
    spans = (np.ptp(columns) + 1, np.ptp(rows) + 1)
    assert max(spans) == 95  # 112 * 0.85, rounded
    assert abs(spans[0] / spans[1] - width / height) < 0.2 * width / height
    assert abs(columns[0] + columns[-1] - 111) <= 1
    assert abs(rows[0] + rows[-1] - 111) <= 1


def test_a_tall_picture_is_put_on_its_ground_as_a_whole() -> None:
    """Which is done in parts: half transparent black on white is grey in all of its rows."""
    rgb = np.zeros((700, 30, 3), np.uint8)
    alpha = np.full((700, 30), 128, np.uint8)
    square = recentre(rgb, alpha, 700, border=0.0, background=255)
    assert (square[:, 335:365] == 127).all()
    assert not rgb.any()


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    good = tmp_path / "good.png"
    Image.new("RGB", (64, 64), "red").save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    for name, words in (
        ("empty.png", "0 bytes"),
        ("text.png", "not an image"),
        ("cut.png", "damaged|not an image"),
        ("none.png", "no such file"),
    ):
        path = tmp_path / name
        with pytest.raises(UserError, match=words) as caught:
            load_image(path)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
        if path.exists():
            with pytest.raises(UserError, match=rf"^upload: .*({words})"):
                decode_image(path.read_bytes(), "upload")


def test_a_files_bytes_are_the_same_picture(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    image = Image.effect_noise((30, 20), 80)
    image.getexif()[274] = 6
    image.save(path, exif=image.getexif())
    found = decode_image(path.read_bytes())
    assert found.size == (20, 30)
    assert found.tobytes() == load_image(path).tobytes()


def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    Image.new("1", (9000, 9000)).save(path)
    with pytest.raises(UserError, match="9000 x 9000"):
        load_image(path)


def test_folders_are_expanded_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in find_images([tmp_path])] == ["a.JPG", "b.png"]
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match=r"no \.png"):
        find_images([tmp_path / "sub"])
    with pytest.raises(UserError, match="no such file or folder"):
        find_images([tmp_path / "nowhere"])


def test_of_a_folder_only_visible_files_count(tmp_path: Path) -> None:
    for name in ("chair.png", "._chair.png"):  # the second as macOS writes it beside the first
        (tmp_path / name).touch()
    (tmp_path / "more.png").mkdir()
    assert [p.name for p in find_images([tmp_path])] == ["chair.png"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_taken_as_the_camera_was_held(tmp_path: Path, orientation: int) -> None:
    """Phones write sideways and say so: an object on its side would become another shape."""
    rgb = np.full((60, 90, 3), 255, np.uint8)
    rgb[10:50, 10:30] = (200, 60, 0)
    rgb[30:50, 30:60] = (0, 60, 200)
    turns = {
        1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]  # fmt: skip
    written = Image.fromarray(rgb)
    for turn in turns:
        written = written.transpose(turn)
    tag = Image.Exif()
    tag[0x0112] = orientation
    for suffix in (".png", ".webp", ".tif"):
        path = tmp_path / f"chair{suffix}"
        written.save(path, exif=tag, **({"lossless": True} if suffix == ".webp" else {}))
        for picture in (load_image(path), Image.open(path), path, str(path)):
            np.testing.assert_array_equal(separate(picture)[0], rgb)


def test_every_way_to_keep_a_pixel_gives_the_same_picture(tmp_path: Path) -> None:
    """16 bits a channel would be clipped to white by pillow, a GIF closes with its file."""
    rgb, alpha = disc(grey=17 * 5)
    grey = Image.fromarray(rgb[..., 0])
    wide = np.asarray(grey).astype(np.uint16) * 257
    kinds = {
        "grey.png": grey, "wide.png": Image.fromarray(wide), "cmyk.tif": grey.convert("CMYK"),
        "wide.tif": Image.fromarray(wide), "int.tif": Image.fromarray(wide.astype(np.int32)),
        "palette.png": grey.quantize(4), "palette.gif": grey.convert("RGB"),
    }  # fmt: skip
    for name, picture in kinds.items():
        picture.save(tmp_path / name)
        found = separate(load_image(tmp_path / name), name)
        np.testing.assert_array_equal(found[0], rgb, err_msg=name)
        np.testing.assert_array_equal(found[1] > 0, alpha > 0, err_msg=name)
    np.testing.assert_array_equal(separate(rgb)[1], separate(grey)[1])
    moving = tmp_path / "moving.webp"
    grey.save(moving, save_all=True, append_images=[grey.rotate(90)], lossless=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file left open is a ResourceWarning
        np.testing.assert_array_equal(separate(load_image(moving))[0], rgb)


def test_what_no_picture_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    # Pillow would hand this one to Ghostscript.
    (tmp_path / "program.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\n%%EOF\n"
    )
    Image.fromarray(np.ones((40, 40), np.float32)).save(tmp_path / "float.tif")
    for name, words in (
        ("pipe.png", "pipe; expected an image file"),
        ("folder.png", "a folder"),
        ("program.png", "not an image"),
        ("float.tif", "32 bits per pixel; expected 8 or 16"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            separate(load_image(tmp_path / name), name)
        assert "\n" not in str(caught.value)
    for odd, words in (
        (Image.new("La", (40, 40)), "La to L not supported; save it as PNG"),
        (np.zeros((40, 40, 3)), r"array of float64 \[40, 40, 3\]; expected uint8"),
        (np.zeros((40, 40, 2), np.uint8), "expected uint8"),
        (b"png", "a bytes; expected a pillow image"),
        (None, "a NoneType; expected a pillow image"),
    ):
        with pytest.raises(UserError, match=words):
            separate(odd)


def test_sizes_that_would_fill_the_memory(tmp_path: Path) -> None:
    size = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    bomb = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        bomb += struct.pack(">I", len(body)) + kind + body
        bomb += struct.pack(">I", zlib.crc32(kind + body))
    (tmp_path / "bomb.png").write_bytes(bomb)
    Image.new("1", (10_001, 16)).save(tmp_path / "row.png")  # its square has 100 million pixels
    for name in ("bomb.png", "row.png"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserError, match="10000 per side are accepted; scale it down"):
                load_image(tmp_path / name)
    with pytest.raises(UserError, match="10001 x 16 pixels"):
        separate(Image.open(tmp_path / "row.png"))
