"""Picture files: finding them below a folder, one decoder for whatever they turn out to be, a quick look for faults."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from failures import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# What Pillow raises on damaged bytes, beside DecompressionBombError.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, IndexError, OverflowError, struct.error, zlib.error)
_UNUSABLE = (Image.DecompressionBombError, *DAMAGE)
PROCEDURE = 1  # to be raised when `decode` gives other pixels: what was decoded before is decoded anew


class UnusablePicture(DataError):
    """A picture that cannot be decoded; `reason` says why, without its name."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"cannot use the picture {name}: {reason}; delete or replace it")
        self.reason = reason


def find_pictures(folder: Path) -> list[str]:
    """The paths of all pictures below `folder`, sorted, without hidden ones; DataError if there is none."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder} is a file" if os.path.exists(folder) else f"there is no folder {folder}")

    def refuse(error: OSError):
        raise DataError(f"cannot read {error.filename} ({error.strerror})")

    paths, others, seen = [], 0, {os.path.realpath(folder)}
    for parent, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        visible = {os.path.realpath(os.path.join(parent, s)): s for s in sorted(subfolders) if s[0] != "."}
        subfolders[:] = [name for real, name in visible.items() if real not in seen]  # no loops
        seen.update(visible)
        pictures = [name for name in names if name.lower().endswith(SUFFIXES) and name[0] != "."]
        paths += [os.path.join(parent, name) for name in pictures]
        others += len(names) - len(pictures)
    if not paths:
        problem = f"holds {others} files, but no picture ({' '.join(SUFFIXES)})" if others else "is empty"
        raise DataError(f"{folder} {problem}")
    return sorted(paths)


def picture_size(path: str) -> tuple[int, int] | None:
    """(width, height) in pixels, from the file's head alone; None where that cannot be read."""
    try:
        return _head(path)[1]
    except _UNUSABLE:
        return None


def _head(file: str | BinaryIO) -> tuple[str, tuple[int, int]]:
    """(format, (width, height)). Raises one of _UNUSABLE."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # doubts of Pillow's about large or oddly tagged pictures
        with Image.open(file, formats=FORMATS) as image:
            return image.format, image.size


def flaw(file: BinaryIO, size: int) -> str | None:
    """Why the encoded picture in `file`, open and of `size` bytes, cannot be used; None if its head and end look sound.

    The head tells another kind of file, the end one that was cut short, as broken downloads and copies are. A strange
    end proves nothing (some cameras append to their JPEGs): then it is decoded.
    """
    try:
        kind, _ = _head(file)
        file.seek(max(0, size - _TAIL))
        end = file.read()
        file.seek(0)
        if not _ends_well(kind, end, file.read(8), size):
            file.seek(0)
            decode(file.read(), "", imsize=1)
    except UnusablePicture as error:
        return error.reason
    except _UNUSABLE as error:
        return _in_words(error)
    return None


_TAIL = 12  # bytes


def _ends_well(kind: str, end: bytes, start: bytes, size: int) -> bool:
    if kind == "JPEG":
        return end.endswith(b"\xff\xd9")  # the marker "end of image"
    if kind == "PNG":
        return end == b"\0\0\0\0IEND\xaeB`\x82"
    # WebP (RIFF) and BMP say their length at their beginning, the former less these 8 bytes
    return size >= (int.from_bytes(start[4:8], "little") + 8 if kind == "WEBP" else
                    int.from_bytes(start[2:6], "little"))


def read_picture(path: str, imsize: int, crop: int | None = None) -> torch.Tensor:
    """`decode` of the file at `path`, uint8 (3, imsize, imsize). Raises DataError, which names it."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:  # perhaps not the picture's fault, so no word about deleting it
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return decode(data, path, imsize, crop)


def decode(data: bytes, name: str, imsize: int, crop: int | None = None) -> torch.Tensor:
    """The encoded picture `data` as uint8 (3, imsize, imsize): its central square, Lanczos-resized.

    The square has the side `crop` if the picture is large enough, else it is the largest one. EXIF rotation
    is honoured, transparency laid over white. Raises UnusablePicture, which calls the picture `name`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if crop is None:
                    image.draft(None, (4 * imsize, 4 * imsize))  # large JPEGs decode at 1/2, 1/4, 1/8: faster
                return to_tensor(_rgb(_upright(image)), imsize, crop)
    except _UNUSABLE as error:
        raise UnusablePicture(name, _in_words(error)) from None


def _in_words(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no JPEG, PNG, WebP or BMP"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels"
    return str(error) or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # here, so that damaged pixels are not taken for a damaged tag
    try:
        return ImageOps.exif_transpose(image)
    except DAMAGE:
        return image  # a damaged tag beside sound pixels


def _rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB; 16 bits keep their high byte, transparent pixels turn white."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        grey = np.asarray(image)
        white = grey == image.info.get("transparency", -1)
        image = Image.fromarray(np.where(white, 255, grey >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(image: Image.Image, imsize: int, crop: int | None = None) -> torch.Tensor:
    """The central square of an RGB `image`, of side `crop` if it is large enough, as uint8 (3, imsize, imsize)."""
    side = min(image.size)
    if crop is not None and crop <= side:
        side = crop
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((imsize, imsize), Image.Resampling.LANCZOS)
    return planes(image)


def planes(picture: Image.Image | np.ndarray) -> torch.Tensor:
    """An RGB picture, uint8 (H, W, 3), as a tensor (3, H, W) of its own memory."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
