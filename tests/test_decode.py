"""Decoding: unusual picture files are read, damaged ones refused; folders are searched recursively."""

import io
import os

import numpy as np
import pytest
import torch
from conftest import BLUE, GREEN, RED, WHITE, assert_colour, data_config, encode, fill, gradient
from PIL import Image

from data_loader import build_dataset, describe
from dataset.decode import decode, find_defect, find_pictures
from errors import DataError

# ---- one picture ----



def plain(mode, colour, kind="PNG", size=(20, 30), **options) -> bytes:
    return encode(Image.new(mode, size, colour), kind, **options)


DEEP = Image.fromarray(np.full((20, 20), 0x80FF, np.uint16))
PALETTE = Image.new("RGB", (20, 20), RED).convert("P", palette=Image.Palette.ADAPTIVE)
KINDS = {
    "grey": (plain("L", 90), (90, 90, 90)),
    "grey-jpeg": (plain("L", 90, "JPEG"), (90, 90, 90)),
    "one-bit": (plain("1", 1), WHITE),
    "16-bit": (encode(DEEP, "PNG"), (128, 128, 128)),
    "16-bit-transparent": (encode(DEEP, "PNG", transparency=0x80FF), WHITE),
    "palette": (encode(PALETTE, "PNG"), RED),
    "palette-transparent": (encode(PALETTE, "PNG", transparency=PALETTE.getpixel((0, 0))), WHITE),
    "grey-alpha": (plain("LA", (0, 0)), WHITE),
    "colour-key": (plain("RGB", RED, transparency=RED), WHITE),
    "clear": (plain("RGBA", (*RED, 0)), WHITE),
    "half-clear": (plain("RGBA", (*RED, 128)), (255, 127, 127)),
    "clear-webp": (plain("RGBA", (*RED, 0), "WEBP", lossless=True), WHITE),
    "cmyk": (plain("CMYK", (0, 255, 255, 0), "JPEG"), RED),
    "bmp": (plain("RGB", BLUE, "BMP"), BLUE),
    "large-progressive": (plain("RGB", BLUE, "JPEG", (700, 900), progressive=True), BLUE),
    "one-pixel-wide": (plain("RGB", BLUE, size=(1, 300)), BLUE),
}


@pytest.mark.parametrize(("data", "colour"), KINDS.values(), ids=KINDS)
def test_any_kind_of_picture_is_read(data, colour):
    picture = decode(data, "x", 16)
    assert picture.shape == (3, 16, 16)
    assert_colour(picture, colour)


@pytest.mark.parametrize("size", [(90, 30), (30, 90)])
def test_the_centre_of_a_long_picture_is_used(size):
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, ((size[0] - 30) // 2, (size[1] - 30) // 2, (size[0] + 30) // 2, (size[1] + 30) // 2))
    assert_colour(decode(encode(image, "PNG"), "x", 16), GREEN)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_honoured(kind):
    image = Image.new("RGB", (64, 64), RED)
    image.paste(BLUE, (32, 0, 64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the left side becomes the top
    picture = decode(encode(image, kind, exif=exif, quality=95), "x", 16)
    assert_colour(picture[:, :6], RED, 12)
    assert_colour(picture[:, 10:], BLUE, 12)


def test_a_damaged_exif_tag_does_not_cost_the_picture():
    data = encode(Image.new("RGB", (20, 20), BLUE), "PNG", exif=b"Exif\0\0no such byte order")
    assert_colour(decode(data, "x", 16), BLUE)


def test_a_large_jpeg_keeps_its_quality():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8))
    image = noise.resize((1500, 1000), Image.Resampling.BICUBIC)
    whole = image.crop((250, 0, 1250, 1000)).resize((64, 64), Image.Resampling.LANCZOS)
    expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
    picture = decode(encode(image, "JPEG", quality=95), "x", 64)
    assert (picture.float() - expected).abs().mean() < 1.5


# ---- finding pictures ----


def test_folders_are_searched_in_depth_and_in_order(tmp_path):
    for name in ["b/2.JPG", "b/1.webp", "a/deep/er/x.Png", "c.jpeg", "d.bmp"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        gradient().save(path)
    for name in ["._c.jpg", ".DS_Store", "notes.txt", ".cache/x.png"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("not a picture")
    (tmp_path / "a/deep/up").symlink_to(tmp_path, target_is_directory=True)  # a loop
    found = [os.path.relpath(path, tmp_path) for path in find_pictures(tmp_path)]
    assert found == ["a/deep/er/x.Png", "b/1.webp", "b/2.JPG", "c.jpeg", "d.bmp"]


def test_pictures_behind_a_link_are_found(tmp_path):
    fill(tmp_path / "elsewhere", 4)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(build_dataset(data_config(tmp_path / "data"))) == 4


def test_pictures_that_a_link_leads_back_to_are_found_once(tmp_path):
    fill(tmp_path / "data/deep/er", 3)
    (tmp_path / "data/later").mkdir()
    for place in ("data/later/back", "data/later/again"):
        (tmp_path / place).symlink_to(tmp_path / "data/deep", target_is_directory=True)
    found = [os.path.relpath(path, tmp_path) for path in find_pictures(tmp_path)]
    assert found == [f"data/deep/er/{index:03}.png" for index in range(3)]


def test_folder_is_described(tmp_path):
    config = data_config(fill(tmp_path, 5))
    assert describe(build_dataset(config), config) == f"folder: 5 pictures in {tmp_path}"


# ---- a quick look for faults ----


def look(data: bytes) -> str | None:
    return find_defect(io.BytesIO(data), len(data))


@pytest.mark.parametrize("data", [data for data, _ in KINDS.values()], ids=KINDS)
def test_no_sound_picture_is_found_faulty(data):
    assert look(data) is None


def noisy(kind, **options) -> bytes:
    return encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)), kind, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("cut", [1, 20, 1000])
def test_a_picture_that_was_cut_short_is_found_by_its_end_if_it_cannot_be_decoded(kind, cut):
    data = noisy(kind)[:-cut]
    try:
        decode(data, "x", 16)
    except DataError:
        assert look(data)
    else:
        assert look(data) is None, "the last bytes of some formats say nothing of the picture"
    assert cut < 1000 or look(data)


def test_bytes_after_the_end_are_no_fault():
    assert look(noisy("JPEG") + b"a maker's note" * 9) is None
    assert look(noisy("PNG") + b"more") is None


@pytest.mark.parametrize("data", [b"", b"<html>quota exceeded</html>", encode(gradient(), "GIF"),
                                  encode(gradient((500, 500)), "TIFF")], ids=["empty", "page", "gif", "large-tiff"])
def test_what_is_no_picture_is_found(data):
    assert look(data) == "it is not a JPEG, PNG, WebP or BMP"


def test_a_fault_without_words_is_a_fault(monkeypatch):
    def fail(*_, **__):
        raise IndexError

    monkeypatch.setattr(Image, "open", fail)
    assert look(noisy("PNG")) == "IndexError"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_sound_ends_are_not_decoded(kind, monkeypatch):
    """A look at 100,000 pictures must take seconds."""
    monkeypatch.setattr("dataset.decode.decode", None)
    assert look(noisy(kind)) is None


def test_damage_in_the_middle_is_for_a_full_check():
    data = bytearray(noisy("PNG"))
    data[len(data) // 2] ^= 255
    assert look(bytes(data)) is None
    with pytest.raises(DataError):
        decode(bytes(data), "x", 16)
