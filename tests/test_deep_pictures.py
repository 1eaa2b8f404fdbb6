"""Values of more than 8 bits: the range of the whole set becomes 0..255."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WHITE, assert_colour, data_config, encode, fill
from PIL import Image

from data_loader import open_dataset
from dataset import check
from dataset.decode import NO_LEVELS, Levels, Traits, decode, measure_levels
from dataset.table import fingerprint
from metrics import meter

# ---- writers: Pillow reads 16 bits per channel, and writes them of one channel only ----


def png(values: np.ndarray, *chunks: tuple) -> bytes:
    """A PNG of uint16 values (H, W, C) of 1 to 4 channels."""
    height, width, channels = values.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = np.hstack([np.zeros((height, 1), np.uint8), values.astype(">u2").view(np.uint8).reshape(height, -1)])
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + kind + data +
                                         struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts)


def tiff(values: np.ndarray, order="<", compressed=False) -> bytes:
    """A TIFF of uint16 values (H, W, C) of 3 or 4 channels: RGB, RGB and alpha."""
    height, width, channels = values.shape
    data = values.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if compressed else data
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, 8), (259, 3, 1, 8 if compressed else 1),
            (262, 3, 1, 2), (273, 4, 1, 16), (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(data))]
    tags += [(338, 3, 1, 2)] if channels == 4 else []
    bits = 16 + len(data)
    start = bits + 8
    table = struct.pack(f"{order}H", len(tags))
    for tag, kind, count, value in tags:
        value = bits if tag == 258 else value
        packed = struct.pack(f"{order}HH", value, 0) if kind == 3 and tag != 258 else struct.pack(f"{order}I", value)
        table += struct.pack(f"{order}HHI", tag, kind, count) + packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return head.ljust(16, b"\0") + data + struct.pack(f"{order}4H", 16, 16, 16, 16) + table + b"\0" * 4


COLOUR = (4095, 2048, 100)      # of 12 bits


def flat(*values, size=20) -> np.ndarray:
    return np.full((size, size, len(values)), values, np.uint16)


def grey(*values, kind="PNG", dtype=np.uint16, **options) -> bytes:
    """A picture of one channel that has these values in columns."""
    return encode(Image.fromarray(np.repeat(np.array([values], dtype), 20, 0).repeat(5, 1)), kind, **options)


TWELVE = Levels(whole=(0, 4095))
DEEP = {
    "grey": (grey(2048), (128,) * 3),
    "grey-tiff": (grey(2048, kind="TIFF"), (128,) * 3),
    "grey-lzw": (grey(2048, kind="TIFF", compression="tiff_lzw"), (128,) * 3),
    "grey-jp2": (grey(2048, kind="JPEG2000"), (128,) * 3),
    "grey-pgm": (grey(2048, kind="PPM"), (128,) * 3),
    "signed-32": (grey(2048, kind="TIFF", dtype=np.int32), (128,) * 3),
    "grey-alpha": (png(flat(2048, 4095)), (128,) * 3),
    "grey-clear": (png(flat(2048, 0)), WHITE),
    "rgb": (png(flat(*COLOUR)), (255, 128, 6)),
    "rgb-key": (png(flat(*COLOUR), (b"tRNS", struct.pack(">3H", *COLOUR))), WHITE),
    "rgb-other-key": (png(flat(*COLOUR), (b"tRNS", struct.pack(">3H", 4095, 2048, 101))), (255, 128, 6)),
    "rgba": (png(flat(*COLOUR, 4095)), (255, 128, 6)),
    "rgba-clear": (png(flat(*COLOUR, 0)), WHITE),
    "rgb-tiff": (tiff(flat(*COLOUR)), (255, 128, 6)),
    "rgb-tiff-big-endian": (tiff(flat(*COLOUR), ">"), (255, 128, 6)),
    "rgb-tiff-deflate": (tiff(flat(*COLOUR), compressed=True), (255, 128, 6)),
    "rgb-tiff-deflate-big-endian": (tiff(flat(*COLOUR), ">", True), (255, 128, 6)),
    "rgba-tiff": (tiff(flat(*COLOUR, 4095)), (255, 128, 6)),
}


@pytest.mark.parametrize(("data", "colour"), DEEP.values(), ids=DEEP)
def test_twelve_bits_in_sixteen_do_not_come_out_black(data, colour):
    assert_colour(decode(data, "x", 16, levels=TWELVE), colour)
    assert decode(data, "x", 16).shape == (3, 16, 16)


def test_all_sixteen_bits_keep_their_upper_eight():
    values = np.random.default_rng(0).integers(0, 65536, (20, 20, 3), np.uint16)
    expected = decode(encode(Image.fromarray((values >> 8).astype(np.uint8)), "PNG"), "x", 16)
    for data in (png(values), tiff(values), tiff(values, ">"), tiff(values, compressed=True)):
        assert torch.equal(decode(data, "x", 16), expected)


def test_a_turned_deep_picture_is_turned_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    values = flat(0, 0, 0, size=64)
    values[:, :32] = 4095
    data = png(values, (b"eXIf", exif.tobytes()[6:]))
    picture = decode(data, "x", 64, levels=TWELVE)
    assert_colour(picture[:, :30], WHITE)
    assert_colour(picture[:, 34:], (0, 0, 0))


@pytest.mark.parametrize(("kind", "extremes", "levels"), [
    (1, [(0, 1023)], (0, 1023)), (1, [(5, 4000), (900, 901)], (0, 4095)), (1, [(0, 65535), (0, 7)], (0, 65535)),
    (1, [(3, 200)], (0, 255)), (1, [(0, 7)], (0, 255)), (1, [(29000, 31000), (29500, 30000)], (29000, 31000)),
    (1, [(-1000, 3000)], (-1000, 3000)), (2, [(0.0, 0.9)], (0.0, 1.0)), (2, [(0.1, 254.0)], (0.0, 255.0)),
    (2, [(-1.0, 1.0)], (-1.0, 1.0)), (2, [(0.0, 8.5)], (0.0, 8.5)), (2, [(0.0, 0.0)], (0.0, 0.0)),
])
def test_the_range_is_that_of_the_whole_set(kind, extremes, levels):
    found = measure_levels([Traits(9), *(Traits(9, kind, *pair) for pair in extremes)])
    assert found[kind - 1] == levels and found[2 - kind] == NO_LEVELS[2 - kind]
    assert measure_levels([Traits(9)]) is None


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(**changes):
    return open_dataset(data_config("pictures", **{"check_data": "auto", **changes}))


@pytest.mark.parametrize("level", ["full", "header", "off"])
def test_a_set_of_twelve_bits_is_bright_and_its_range_is_said_once(home, capsys, level):
    """The same range for all: a dark picture stays darker than a bright one."""
    folder = fill(home / "pictures", 3)
    expected = opened().load_batch(range(3))
    (folder / "bright.png").write_bytes(grey(4000, 4000))
    (folder / "dark.tif").write_bytes(tiff(flat(1000, 1000, 1000)))
    for _ in range(2):
        capsys.readouterr()
        dataset = opened(check_data=level, cache="on", cache_dir="kept")
        assert torch.equal(dataset.load_batch(range(3)), expected)
        assert_colour(dataset[3], (250,) * 3)
        assert_colour(dataset[4], (62,) * 3)
        words = "2 of 5 have values of more than 8 bits; 0..4095, the range of the whole set, becomes 0..255"
        assert capsys.readouterr().out.count(words) == (level != "off")
    assert_colour(meter.of_folder("pictures", 16, "--real_dir").dataset[4], (62,) * 3)


def test_floats_from_zero_to_one_are_no_black_pictures(home):
    fill(home / "pictures", 2)
    (home / "pictures/float.tif").write_bytes(grey(0.5, 0.5, dtype=np.float32, kind="TIFF"))
    (home / "pictures/hole.tif").write_bytes(grey(1, np.nan, dtype=np.float32, kind="TIFF"))
    assert_colour(opened()[2], (128,) * 3)


def test_a_value_of_minus_one_is_no_mark_of_transparency():
    for dtype, levels in ((np.float32, Levels(real=(-1.0, 1.0))), (np.int32, Levels(whole=(-1, 254)))):
        assert_colour(decode(grey(-1, -1, dtype=dtype, kind="TIFF"), "x", 16, levels=levels), (0, 0, 0))


def test_another_range_has_another_cache_and_plain_sets_keep_theirs(home):
    fill(home / "pictures", 3)
    config = data_config("pictures", cache="on", check_data="full")
    plain = fingerprint(open_dataset(config), config)
    (cache,) = Path("pictures/.decoded").iterdir()
    assert b"levels" not in cache.read_bytes()[:4096] and b"max_pixels" not in cache.read_bytes()[:4096]
    Path("pictures/a.png").write_bytes(grey(1000, 1000))
    seen = {plain, fingerprint(open_dataset(config), config)}
    assert_colour(open_dataset(config)[3], (249,) * 3)
    Path("pictures/b.png").write_bytes(grey(4000, 4000))
    dataset = open_dataset(config)
    assert_colour(dataset[3], (62,) * 3)
    assert len(seen | {fingerprint(dataset, config)}) == 3


def test_a_damaged_deep_picture_is_found_and_spoils_no_range(home, monkeypatch):
    monkeypatch.setattr(check, "SHARE", 1)
    fill(home / "pictures", 3)
    Path("pictures/good.png").write_bytes(grey(1000, 1000))
    data = bytearray(png(np.random.default_rng(0).integers(0, 65536, (40, 40, 3), np.uint16)))
    data[len(data) // 2] ^= 255
    Path("pictures/torn.png").write_bytes(data)
    dataset = opened(check_data="header")
    assert len(dataset) == 4
    assert_colour(dataset[3], (249,) * 3)


def test_a_sampled_range_and_that_of_all_pictures_share_no_cache(home, monkeypatch):
    monkeypatch.setattr(check, "SAMPLE", 1)
    (home / "pictures").mkdir()
    for name, value in (("a.png", 1000), ("b.png", 4000)):
        Path("pictures", name).write_bytes(grey(value, value))
    for level, value in (("off", 250), ("full", 62), ("off", 250)):
        assert_colour(opened(check_data=level, cache="on", cache_dir="kept")[0], (value,) * 3)
