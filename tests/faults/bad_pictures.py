"""Pictures, and what is called one, that come with a folder from anywhere. Each writes itself into a folder."""

import os
import struct
import zlib

import numpy as np
from conftest import encode, gradient
from PIL import Image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, data, depth=8, colour=2, extra=b""):
    """A PNG of any header and any data, true to each other or not."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def noise(shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype)


PHOTO = encode(Image.fromarray(noise((90, 70, 3))), "JPEG")
PICTURE = encode(gradient(), "PNG")
MOVING = encode(gradient(), "GIF", save_all=True, append_images=[gradient(seed=n) for n in range(1, 5)])
LONG_TEXT = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000)))
SOUND = zlib.compress(bytes(61 * 20))                       # of 20 x 20 pixels

# {name of the file: its bytes}: some are good pictures of a rare kind, the others no pictures at all
FILES = {
    "cut.jpg": PHOTO[: len(PHOTO) // 2], "cut_in_its_head.jpg": PHOTO[:15], "nothing.jpg": b"", "nothing.png": b"",
    "text.png": b"no picture\n" * 99, "page.jpg": b"<html>quota exceeded</html>",
    "flipped.jpg": PHOTO[:900] + bytes([PHOTO[900] ^ 255]) + PHOTO[901:], "cut.png": PICTURE[:-30],
    "flipped.png": PICTURE[:60] + bytes([PICTURE[60] ^ 255]) + PICTURE[61:],
    "huge_header.png": png(2**31 - 1, 2**31 - 1, SOUND), "no_pixels.png": png(0, 0, SOUND),
    "bomb.png": png(30_000, 30_000, zlib.compress(bytes(30_000 * 3_751)), 1, 0),
    "bomb_below_the_limit.png": png(12_000, 12_000, zlib.compress(bytes(12_000 * 1_501)), 1, 0),
    "bomb_of_text.png": png(20, 20, SOUND, extra=LONG_TEXT), "one_pixel.png": encode(Image.new("RGB", (1, 1)), "PNG"),
    "a_line.png": encode(Image.new("RGB", (5000, 1)), "PNG"),
    "sixteen_bits.png": encode(Image.fromarray(noise((40, 40), np.uint16)), "PNG"),
    "cmyk.jpg": encode(Image.fromarray(noise((40, 40, 4)), "CMYK"), "JPEG"),
    "palette.png": encode(gradient().convert("P"), "PNG", transparency=0), "moving.gif": MOVING,
    "cut_moving.gif": MOVING[: len(MOVING) // 3], "grey_and_alpha.png": encode(gradient().convert("LA"), "PNG"),
    "head_only.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 ", "offset_into_nowhere.tiff": b"II*\0\xff\xff\xff\x7f",
    "loop_of_pages.tiff": b"II*\0\x08\0\0\0\0\0\x08\0\0\0", os.fsdecode(b"caf\xe9\n.png"): PICTURE,
    os.fsdecode(b"\xff\xfe.jpg"): PHOTO[:200],
}


def as_file(name):
    return lambda folder: (folder / name).write_bytes(FILES[name])


def a_pipe(folder):
    os.mkfifo(folder / "pipe.png")


def a_link_to_nothing(folder):
    (folder / "link.png").symlink_to("nowhere.png")


def a_link_to_itself(folder):
    (folder / "loop.png").symlink_to("loop.png")


def a_link_to_a_device(folder):
    (folder / "endless.png").symlink_to("/dev/zero")


def a_folder(folder):
    (folder / "folder.png").mkdir()


def a_folder_in_itself(folder):
    (folder / "again").symlink_to(folder, target_is_directory=True)


def a_deep_folder(folder):
    deep = folder.joinpath(*["d" * 60] * 20)
    deep.mkdir(parents=True)
    (deep / "picture.png").write_bytes(PICTURE)


WRITERS = {name.encode("ascii", "backslashreplace").decode(): as_file(name) for name in FILES} | {
    write.__name__: write for write in (a_pipe, a_link_to_nothing, a_link_to_itself, a_link_to_a_device, a_folder,
                                        a_folder_in_itself, a_deep_folder)}
