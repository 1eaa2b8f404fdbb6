"""Decoding: unusual picture files are read, damaged ones refused; folders are searched recursively."""

import io
import os

import numpy as np
import pytest
import torch
from conftest import BLUE, GREEN, RED, WHITE, assert_colour, data_config, encode, fill, gradient
from PIL import Image, ImageOps, PngImagePlugin

from data_loader import build_dataset, describe
from dataset import decode as decoding
from dataset.decode import UnusablePicture, decode
from dataset.scan import find_pictures
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
    "tiff": (plain("RGB", BLUE, "TIFF"), BLUE),
    "tiff-lzw": (plain("RGB", BLUE, "TIFF", compression="tiff_lzw"), BLUE),
    "tiff-jpeg": (plain("RGB", BLUE, "TIFF", compression="jpeg"), BLUE),
    "tiff-cmyk": (plain("CMYK", (0, 255, 255, 0), "TIFF"), RED),
    "tiff-clear": (plain("RGBA", (*RED, 0), "TIFF"), WHITE),
    "tiff-one-bit": (plain("1", 1, "TIFF"), WHITE),
    "tiff-pages": (plain("RGB", BLUE, "TIFF", save_all=True, append_images=[Image.new("RGB", (5, 5), RED)]), BLUE),
    "gif": (plain("RGB", BLUE, "GIF"), BLUE),
    "gif-film": (plain("RGB", BLUE, "GIF", save_all=True, append_images=[Image.new("RGB", (20, 30), RED)]), BLUE),
    "gif-clear": (encode(PALETTE, "GIF", transparency=PALETTE.getpixel((0, 0))), WHITE),
    "webp-film": (plain("RGB", BLUE, "WEBP", save_all=True, lossless=True,
                        append_images=[Image.new("RGB", (20, 30), RED)]), BLUE),
    "mpo": (plain("RGB", BLUE, "MPO", save_all=True, append_images=[Image.new("RGB", (20, 30), RED)]), BLUE),
    "avif": (plain("RGB", BLUE, "AVIF", quality=100), BLUE),
    "avif-clear": (plain("RGBA", (*RED, 0), "AVIF", quality=100), WHITE),
    "jpeg-2000": (plain("RGB", BLUE, "JPEG2000"), BLUE),
    "ppm": (plain("RGB", BLUE, "PPM"), BLUE),
    "qoi": (plain("RGB", BLUE, "QOI"), BLUE),
    "tga": (plain("RGB", BLUE, "TGA"), BLUE),
    "pcx": (plain("RGB", BLUE, "PCX"), BLUE),
    "sgi": (plain("RGB", BLUE, "SGI"), BLUE),
}


@pytest.mark.parametrize(("data", "colour"), KINDS.values(), ids=KINDS)
def test_any_kind_of_picture_is_read(data, colour):
    picture = decode(data, "x", 16)
    assert picture.shape == (3, 16, 16)
    assert_colour(picture, colour)


def test_pictures_of_phones_are_read_by_a_library_that_is_imported_for_them():
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    data = encode(gradient((90, 60)), "HEIF", quality=90)
    upright = encode(gradient((90, 60)), "PNG")
    Image.OPEN.pop("HEIF")
    decoding._register_heif.cache_clear()
    decode(upright, "x", 16)
    assert "HEIF" not in Image.OPEN
    assert (decode(data, "x", 16).int() - decode(upright, "x", 16).int()).abs().max() < 12
    assert look(data) is None and decoding.picture_size(io.BytesIO(data)) == (90, 60)
    damaged = bytearray(data)
    damaged[data.rindex(b"mdat"):] = bytes(len(data) - data.rindex(b"mdat"))
    for bad in (data[:-20], data[:60], bytes(damaged)):
        with pytest.raises(UnusablePicture):
            decode(bad, "x", 16)
    assert look(data[:-20]) and look(data[:60])
    with pytest.raises(UnusablePicture, match="more than 5,399 pixels"):
        decode(data, "x", 16, max_pixels=5_399)


@pytest.mark.parametrize("size", [(90, 30), (30, 90)])
def test_the_centre_of_a_long_picture_is_used(size):
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, ((size[0] - 30) // 2, (size[1] - 30) // 2, (size[0] + 30) // 2, (size[1] + 30) // 2))
    assert_colour(decode(encode(image, "PNG"), "x", 16), GREEN)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_rotation_is_honoured(kind):
    image = Image.new("RGB", (64, 64), RED)
    image.paste(BLUE, (32, 0, 64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the left side becomes the top
    exif = exif.tobytes()
    picture = decode(encode(image, kind, exif=exif, quality=95), "x", 16)
    assert_colour(picture[:, :6], RED, 12)
    assert_colour(picture[:, 10:], BLUE, 12)
    assert decoding.picture_size(io.BytesIO(plain("RGB", RED, kind, (20, 30), exif=exif))) == (30, 20)


def test_every_exif_orientation_is_as_pillow_has_it():
    image, exif = gradient((90, 60)), Image.Exif()
    for orientation in range(1, 10):
        exif[0x0112] = orientation
        data = encode(image, "PNG", exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert torch.equal(decode(data, "x", 16), decode(encode(upright, "PNG"), "x", 16))


def test_another_exif_tag_of_a_wrong_type_costs_neither_the_picture_nor_its_orientation():
    exif = Image.Exif()
    exif[0x0112], exif[0x0131] = 6, "abc"       # orientation, software
    text, number = (b"\x01\x31\0" + rest for rest in (b"\x02\0\0\0\4", b"\x0b\0\0\0\1"))  # 4 letters, one float
    assert text in exif.tobytes()
    image = gradient((90, 60))
    turned = decode(encode(image.transpose(Image.Transpose.ROTATE_270), "PNG"), "x", 16)
    assert torch.equal(decode(encode(image, "PNG", exif=exif.tobytes().replace(text, number)), "x", 16), turned)


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


def texts(count, length, where="before"):
    """A PNG with so many megabytes of text, before or behind its pixels; compressed, and so a small file."""
    info = PngImagePlugin.PngInfo()
    for number in range(count):
        info.add_text(f"text {number}", "x" * length * 2**20, zip=True)
    data = encode(Image.new("RGB", (20, 20), BLUE), "PNG", pnginfo=info)
    start, end = data.index(b"zTXt") - 4, data.index(b"IDAT") - 4
    return data if where == "before" else data[:start] + data[end:-12] + data[start:end] + data[-12:]


@pytest.mark.parametrize(("count", "length", "where"), [(1, 3, "before"), (70, 1, "behind")], ids=["one-long", "many"])
def test_a_png_with_megabytes_of_text_is_a_good_picture(count, length, where):
    data = texts(count, length, where)
    assert_colour(decode(data, "x", 16), BLUE)
    assert look(data) is None


def test_a_png_with_a_large_colour_profile_is_a_good_picture():
    data = encode(Image.new("RGB", (20, 20), BLUE), "PNG", icc_profile=bytes(3 * 2**20))
    assert_colour(decode(data, "x", 16), BLUE)
    assert look(data) is None


# ---- pictures over the limit ----


@pytest.mark.parametrize(("kind", "size"), [("JPEG", (300, 200)), ("JPEG", (1200, 60)), ("JPEG2000", (300, 200))])
def test_a_scan_over_the_limit_is_read_at_a_reduced_size_where_the_format_allows(kind, size):
    data = encode(gradient(size), kind, quality=95) if kind == "JPEG" else encode(gradient(size), kind)
    expected = decode(data, "x", 64).float()
    for limit in (size[0] * size[1] - 1, size[0] * size[1] // 16):
        reduced = decode(data, "x", 64, max_pixels=limit).float()
        assert (reduced - expected).abs().mean() < 4
    assert look(data, max_pixels=size[0] * size[1] // 60) is None


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "GIF", "AVIF", "BMP"])
def test_any_other_scan_over_the_limit_names_the_flag_that_lifts_it(kind):
    data = encode(gradient((300, 200)), kind)
    with pytest.raises(UnusablePicture) as caught:
        decode(data, "scan", 16, max_pixels=59_999)
    assert str(caught.value) == ("cannot use the picture scan: it has more than 59,999 pixels; --max_pixels 0 lifts "
                                 "this limit")
    assert not caught.value.damaged and look(data, max_pixels=59_999) == caught.value.reason
    for limit in (60_000, 0):
        assert decode(data, "scan", 16, max_pixels=limit).shape == (3, 16, 16) and look(data, max_pixels=limit) is None


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
def test_a_crop_of_a_scan_over_the_limit_is_not_taken_from_a_reduced_one(kind):
    with pytest.raises(UnusablePicture, match="--max_pixels"):
        decode(encode(gradient((300, 200)), kind), "x", 16, 100, max_pixels=59_999)


def test_a_jpeg_beyond_pillows_own_limit_is_read():
    assert decoding.Image.MAX_IMAGE_PIXELS is None
    data = encode(Image.new("L", (13400, 13400), 90), "JPEG", quality=30)
    assert_colour(decode(data, "x", 16), (90, 90, 90))
    assert look(data) is None


HUGE = b"BM" + b"\0" * 8 + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
HUGE += (60000).to_bytes(4, "little") * 2 + b"\1\0\x18\0" + b"\0" * 24


def test_a_bomb_is_refused_by_its_header():
    assert look(HUGE) == "it has more than 178,956,970 pixels; --max_pixels 0 lifts this limit"


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
    found = [os.path.relpath(path, tmp_path) for path in find_pictures(tmp_path).paths]
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
    found = [os.path.relpath(path, tmp_path) for path in find_pictures(tmp_path).paths]
    assert found == [f"data/deep/er/{index:03}.png" for index in range(3)]


def test_folder_is_described(tmp_path):
    config = data_config(fill(tmp_path, 5))
    assert describe(build_dataset(config), config) == f"folder: 5 pictures in {tmp_path}"


# ---- a quick look for faults ----


def look(data: bytes, max_pixels=decoding.MAX_PIXELS) -> str | None:
    """Why the check refuses it, or None."""
    try:
        decoding.look(io.BytesIO(data), len(data), max_pixels=max_pixels)
    except UnusablePicture as error:
        return error.reason


@pytest.mark.parametrize("data", [data for data, _ in KINDS.values()], ids=KINDS)
def test_no_sound_picture_is_found_faulty(data):
    assert look(data) is None


def noisy(kind, **options) -> bytes:
    return encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)), kind, **options)


ANY = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "QOI", "TGA", "PCX", "SGI"]


@pytest.mark.parametrize("kind", ANY)
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


@pytest.mark.parametrize("what", [b"iloc", b"mdat"])
def test_a_damaged_avif_is_damaged(what):
    """libavif's errors are RuntimeErrors, of the header and of the pixels."""
    data = bytearray(noisy("AVIF"))
    place = data.rindex(what)
    data[place:place + 8] = bytes(8)
    with pytest.raises(UnusablePicture):
        decode(bytes(data), "x.avif", 16)


def test_bytes_after_the_end_are_no_fault():
    assert look(noisy("JPEG") + b"a maker's note" * 9) is None
    assert look(noisy("PNG") + b"more") is None


@pytest.mark.parametrize("data", [b"", b"<html>quota exceeded</html>", b"\0" * 500, b"%PDF-1.7\n"],
                         ids=["empty", "page", "zeros", "pdf"])
def test_what_is_no_picture_is_found(data):
    with pytest.raises(UnusablePicture, match="it is not a JPEG, PNG, WebP or any other picture that") as caught:
        decode(data, "x", 16)
    assert look(data) == caught.value.reason and caught.value.damaged


BITS = b"\x02\x01\x03\0\1\0\0\0"     # the tag of a TIFF that says how many bits a value has


@pytest.mark.parametrize(("kind", "data"), [
    ("TIFF", plain("F", 0.5, "TIFF").replace(BITS + b"\x20", BITS + b"\x40")),
    ("BMP", plain("RGB", BLUE, "BMP")[:30] + b"\x09" + plain("RGB", BLUE, "BMP")[31:]),     # an unknown compression
    ("JPEG XL", b"\xff\x0a" + bytes(50)), ("HEIC, AVIF or film", b"\0\0\0\x18ftypheic")])
def test_a_kind_that_cannot_be_read_is_no_damage(monkeypatch, kind, data):
    for mend in ("convert or replace it", "`pip install pillow-heif` lets HEIC be read")[:1 + ("HEIC" in kind)]:
        if "pip" in mend:
            monkeypatch.setattr(decoding, "FORMATS", {"PNG": ()})
        with pytest.raises(UnusablePicture, match=f"begins like a {kind}, but is damaged or of a kind") as caught:
            decode(data, "x", 16)
        assert look(data) == caught.value.reason and not caught.value.damaged and caught.value.reason.endswith(mend)


def test_a_fault_without_words_is_a_fault(monkeypatch):
    def fail(*_, **__):
        raise IndexError

    monkeypatch.setattr(Image, "open", fail)
    assert look(noisy("PNG")) == "IndexError"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000"])
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
