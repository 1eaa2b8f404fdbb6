"""Picture files: finding them below a folder, one decoder for whatever they turn out to be."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from failures import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# What Pillow raises on damaged bytes, beside DecompressionBombError.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, IndexError, OverflowError, struct.error, zlib.error)


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                return image.size
    except (Image.DecompressionBombError, *DAMAGE):
        return None


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
    is honoured, transparency laid over white. Raises DataError, which calls the picture `name`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # doubts of Pillow's about large or oddly tagged pictures
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if crop is None:
                    image.draft(None, (4 * imsize, 4 * imsize))  # large JPEGs decode at 1/2, 1/4, 1/8: faster
                return to_tensor(_rgb(_upright(image)), imsize, crop)
    except UnidentifiedImageError:
        reason = "it is no JPEG, PNG, WebP or BMP"
    except Image.DecompressionBombError:
        reason = f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels"
    except DAMAGE as error:
        reason = str(error) or type(error).__name__
    raise DataError(f"cannot use the picture {name}: {reason}; delete or replace it")


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
