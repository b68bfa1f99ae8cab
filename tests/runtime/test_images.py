"""Pictures: what is accepted, what is refused in one line, where the object ends up."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitapack.runtime.errors import UserError
from vitapack.runtime.images import find_images, load_image, recentre, separate


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
    with pytest.raises(UserError, match=r"^empty.png: no object in the picture"):
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


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    good = tmp_path / "good.png"
    Image.new("RGB", (64, 64), "red").save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    for name, words in (
        ("empty.png", "0 bytes"),
        ("text.png", "not a picture"),
        ("cut.png", "damaged|not a picture"),
        ("none.png", "no such file"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load_image(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)


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
