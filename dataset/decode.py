"""Picture files: find them below a folder, decode any supported format, detect truncated files without decoding."""

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

from errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Pillow's exceptions on damaged data, besides DecompressionBombError.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, IndexError, OverflowError, struct.error, zlib.error)
_UNUSABLE = (Image.DecompressionBombError, *DAMAGE)
CACHE_VERSION = 1  # increment when `decode` returns different pixels: invalidates the caches of decoded pictures


class UnusablePicture(DataError):
    """A picture cannot be decoded. `reason` says why, without the picture's name."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"cannot use the picture {name}: {reason}; delete or replace it")
        self.reason = reason


def find_pictures(folder: Path) -> list[str]:
    """Return the sorted paths of all pictures below `folder`, except hidden ones. Raise DataError if there are none."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder} is a file" if os.path.exists(folder) else f"there is no folder {folder}")

    def refuse(error: OSError):
        raise DataError(f"cannot read {error.filename} ({error.strerror})")

    paths, others, seen = [], 0, {os.path.realpath(folder)}
    for parent, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        visible = {os.path.realpath(os.path.join(parent, s)): s for s in sorted(subfolders) if s[0] != "."}
        subfolders[:] = [name for real, name in visible.items() if real not in seen]  # no symlink loops
        seen.update(visible)
        pictures = [name for name in names if name.lower().endswith(SUFFIXES) and name[0] != "."]
        paths += [os.path.join(parent, name) for name in pictures]
        others += len(names) - len(pictures)
    if not paths:
        problem = f"holds {others} files, but no picture ({' '.join(SUFFIXES)})" if others else "is empty"
        raise DataError(f"{folder} {problem}")
    return sorted(paths)


def picture_size(path: str) -> tuple[int, int] | None:
    """Return (width, height) in pixels, read from the file's header only; None if the header cannot be read."""
    try:
        return _read_header(path)[1]
    except _UNUSABLE:
        return None


def _read_header(file: str | BinaryIO) -> tuple[str, tuple[int, int]]:
    """Return (format, (width, height)). Raises one of _UNUSABLE."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large pictures and of damaged EXIF data
        with Image.open(file, formats=FORMATS) as image:
            return image.format, image.size


def find_defect(file: BinaryIO, size: int) -> str | None:
    """Check the header and the end of the encoded picture in the open `file` of `size` bytes.

    Return why it cannot be used, or None. A bad header means that the file has another format; a bad end usually means
    that it is truncated, as after an interrupted download. Some cameras append data to their JPEGs, so a picture with
    an unexpected end is decoded before it is rejected.
    """
    try:
        format, _ = _read_header(file)
        file.seek(max(0, size - _TAIL))
        end = file.read()
        file.seek(0)
        if not _is_complete(format, end, file.read(8), size):
            file.seek(0)
            decode(file.read(), "", imsize=1)
    except UnusablePicture as error:
        return error.reason
    except _UNUSABLE as error:
        return _describe(error)
    return None


_TAIL = 12  # bytes: the length of PNG's IEND chunk


def _is_complete(format: str, end: bytes, start: bytes, size: int) -> bool:
    if format == "JPEG":
        return end.endswith(b"\xff\xd9")  # the EOI marker (end of image)
    if format == "PNG":
        return end == b"\0\0\0\0IEND\xaeB`\x82"
    # WebP (RIFF) and BMP store the file size in their header; RIFF does not count its first 8 bytes
    return size >= (int.from_bytes(start[4:8], "little") + 8 if format == "WEBP" else
                    int.from_bytes(start[2:6], "little"))


def read_picture(path: str, imsize: int, crop: int | None = None) -> torch.Tensor:
    """Return the decoded file at `path` as `decode` does: uint8 (3, imsize, imsize). Raises DataError naming `path`."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:  # the file itself may be intact, so the message does not advise deleting it
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return decode(data, path, imsize, crop)


def decode(data: bytes, name: str, imsize: int, crop: int | None = None) -> torch.Tensor:
    """Decode the encoded picture `data`, center-crop it, Lanczos-resize it; return uint8 (3, imsize, imsize).

    The crop is a square of side `crop`, or the largest square if `crop` is None or larger than the picture. EXIF
    rotation is applied, transparency is composited over white. Raises UnusablePicture, whose message contains `name`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if crop is None:
                    image.draft(None, (4 * imsize, 4 * imsize))  # large JPEGs decode at 1/2, 1/4, 1/8: faster
                return to_tensor(_rgb(_upright(image)), imsize, crop)
    except _UNUSABLE as error:
        raise UnusablePicture(name, _describe(error)) from None


def _describe(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not a JPEG, PNG, WebP or BMP"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels"
    return str(error) or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # before the try, so that damaged pixel data is not mistaken for a damaged EXIF tag
    try:
        return ImageOps.exif_transpose(image)
    except DAMAGE:
        return image  # the EXIF tag is damaged, the pixels are intact


def _rgb(image: Image.Image) -> Image.Image:
    """Convert to mode RGB: 16-bit values keep their high byte, transparent pixels become white."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip it at 255
        grey = np.asarray(image)
        white = grey == image.info.get("transparency", -1)
        image = Image.fromarray(np.where(white, 255, grey >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(image: Image.Image, imsize: int, crop: int | None = None) -> torch.Tensor:
    """Center-crop an RGB `image` (side `crop` if it is large enough, else the largest square) and Lanczos-resize it.

    Returns uint8 (3, imsize, imsize).
    """
    side = min(image.size)
    if crop is not None and crop <= side:
        side = crop
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((imsize, imsize), Image.Resampling.LANCZOS)
    return to_chw(image)


def to_chw(picture: Image.Image | np.ndarray) -> torch.Tensor:
    """Copy an RGB picture, uint8 (H, W, 3), into a contiguous tensor (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
