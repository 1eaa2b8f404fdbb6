"""Decode picture files of any supported format; look at a file's header and end without decoding it.

A decoded picture has the size and channels of a PictureShape (flags/pictures.py); where functions take a `shape`, a
number stands for that of square RGB pictures of this side. 8-bit pictures are decoded as Pillow does. Values of more
than 8 bits are mapped to 0..255 by the `Levels` of their data set, because 10 and 12 bits in 16-bit files would come
out black.
"""

import errno
import io
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError, features

from errors import DataError
from flags.pictures import PictureShape

_NEEDS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # a library that Pillow may have been built without
HEIF = (".heic", ".heif", ".hif")  # what phones write; needs pillow-heif
FORMATS = {format: endings for format, endings in {  # what Pillow decodes by itself, in the order of trying
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "QOI": (".qoi",),
    "SGI": (".sgi",),
    "SUN": (".ras",),
    "PCX": (".pcx",),
    "TGA": (".tga",),  # last: it has no signature
}.items() if features.check(_NEEDS.get(format, "pil"))} | ({"HEIF": HEIF} if find_spec("pillow_heif") else {})
_AT_HAND = tuple(format for format in FORMATS if format != "HEIF")  # whose libraries are imported already
SUFFIXES = frozenset(ending for endings in FORMATS.values() for ending in endings)
# How files begin that may be all right though Pillow cannot read them, such as a TIFF of 64-bit numbers.
_SIGNATURES = {"JPEG": rb"\xff\xd8", "PNG": rb"\x89PNG", "WebP or film": rb"RIFF", "TIFF": rb"II[*+]\0|MM\0[*+]",
               "GIF": rb"GIF8", "BMP": rb"BM", "HEIC, AVIF or film": rb"....ftyp",
               "JPEG 2000": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ", "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL "}
# Pillow's exceptions on damaged data.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, IndexError, OverflowError, struct.error, zlib.error)
# Increment when `decode` returns different pixels for files that it could decode before: invalidates the caches of
# decoded pictures. What only some data sets depend on, such as `Levels`, is in the caches' own headers instead.
CACHE_VERSION = 2
MAX_PIXELS = 178_956_970  # the default of --max_pixels: Pillow's own limit
warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged EXIF data; `catch_warnings` is not for threads
Image.MAX_IMAGE_PIXELS = None  # `_limit` checks instead, when the decoder has been told to scale down


class Levels(NamedTuple):
    """The values that become 0 and 255: of whole numbers of more than 8 bits, and of floating-point numbers."""

    whole: tuple = (0, 65535)
    real: tuple = (0.0, 1.0)


WHOLE, REAL = 1, 2  # `Traits.kind`; 0 for 8 bits
NO_LEVELS = Levels()


class UnusablePicture(DataError):
    """A picture cannot be decoded. `reason` says why, without the picture's name; `damaged` is False if the file may
    be all right, so that it should neither be deleted nor be remembered as unusable.
    """

    def __init__(self, name: str, reason: str, damaged: bool = True):
        super().__init__(f"cannot use the picture {printable(name)}: {reason}" +
                         "; delete or replace it" * damaged)
        self.reason, self.damaged = reason, damaged


class _TooLarge(Exception):
    pass


_UNUSABLE = (_TooLarge, MemoryError, *DAMAGE)


def printable(text: object) -> str:
    r"""Return `text` as any console can show it on one line: `\n`, `\t`, bytes that are not UTF-8 as `\xe9`."""
    return "".join(c if c.isprintable() else f"\\x{ord(c) - 0xdc00:02x}" if "\udc80" <= c <= "\udcff"
                   else c.encode("unicode_escape").decode() for c in str(text))


# ---- checks without decoding ----


@dataclass(frozen=True)
class Traits:
    """What a header says: the shorter `side` in pixels; the `kind` of the values, WHOLE or REAL if they have more than
    8 bits, and then also the smallest and largest value.
    """

    side: int
    kind: int = 0
    low: float = 0.0
    high: float = 0.0


def picture_size(file: BinaryIO) -> tuple[int, int] | None:
    """Return (width, height) in pixels of the upright picture, read from the file's header only; None if that cannot
    be read.
    """
    try:
        with _open(file) as image:
            width, height = image.size
            lies = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)   # Pillow turns TIFFs itself
            return (height, width) if lies else (width, height)
    except _UNUSABLE:
        return None


def look(file: BinaryIO, size: int, crop: int | None = None, max_pixels: int = MAX_PIXELS) -> Traits:
    """Check the header and the end of the encoded picture in the open `file` of `size` bytes; return its Traits.

    A bad header means that the file has another format; a bad end usually means that it is truncated, as after an
    interrupted download. Some cameras append data to their JPEGs, so a picture with an unexpected end is decoded before
    it is rejected. Pictures of more than 8 bits are decoded anyway. Raise UnusablePicture if it cannot be used.
    """
    start = b""
    try:
        start = file.read(16)
        file.seek(0)
        with _open(file) as image:
            kind, side = _kind(image), min(image.size)
            complete = _is_complete(image, file, size)
            _limit(image, 1, crop, max_pixels)
        file.seek(0)
        if kind:
            return Traits(side, kind, *_despite_text(_extremes, file.read()))
        if not complete:
            decode(file.read(), "", 1, crop, max_pixels)
        return Traits(side)
    except _UNUSABLE as error:
        raise _unusable("", error, max_pixels, start) from None


def _is_complete(image: Image.Image, file: BinaryIO, size: int) -> bool:
    """Return whether the file is certainly not truncated."""
    def read(start: int, count: int) -> bytes:
        file.seek(max(0, start))
        return file.read(count)

    match image.format:
        case "JPEG" | "MPO" | "JPEG2000":
            return read(size - 2, 2) == b"\xff\xd9"  # the EOI marker (end of image)
        case "PNG":
            return read(size - 12, 12) == b"\0\0\0\0IEND\xaeB`\x82"
        case "GIF":
            return read(size - 1, 1) == b";"
        case "WEBP":  # RIFF stores the file size, less its first 8 bytes
            return size >= int.from_bytes(read(4, 4), "little") + 8
        case "BMP":
            return size >= int.from_bytes(read(2, 4), "little")
        case "TIFF":  # the places of its strips or tiles
            tags = image.tag_v2
            starts, counts = (np.ravel(tags.get(strips, tags.get(tiles, ()))) for strips, tiles in (
                (273, 324), (279, 325)))
            return len(starts) == len(counts) > 0 and bool((starts + counts <= size).all())
        case "AVIF" | "HEIF":  # boxes; the last ends with the file
            start = 0
            while 0 <= start < size:
                length = int.from_bytes(read(start, 4), "big")
                if length == 1:
                    length = int.from_bytes(read(start + 8, 8), "big")
                start = start + length if length >= 8 else size if length == 0 and start else -1
            return start == size
    return False


def _open(file: BinaryIO) -> Image.Image:
    """Read a picture's header. Raises one of _UNUSABLE."""
    formats = _formats(file)
    try:
        return Image.open(file, formats=formats)
    except (RuntimeError, EOFError) as error:  # of a damaged AVIF or HEIC; not in DAMAGE, as PyTorch raises them, too
        raise OSError(str(error)) from None
    except ValueError:  # of a PNG with large texts, see `_despite_text`
        file.seek(0)
        return _despite_text(lambda data: Image.open(io.BytesIO(data), formats=formats), file.read())


def _formats(file: BinaryIO) -> tuple[str, ...]:
    """Return the FORMATS to try; HEIF, whose library takes a third of a second to import, for files of its kind."""
    start = file.read(12)
    file.seek(0)
    if "HEIF" in FORMATS and start[4:8] == b"ftyp" and start[8:] not in (b"avif", b"avis"):
        _register_heif()
        return tuple(FORMATS)
    return _AT_HAND


@cache
def _register_heif():
    import pillow_heif

    pillow_heif.register_heif_opener()


def _without_text(data: bytes) -> bytes | None:
    """Return a PNG without its texts and colour profile, of which Pillow refuses large ones; None if it has none."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    kept, start = [data[:8]], 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start:start + 4], "big")
        if data[start + 4:start + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[start:end])
        start = end
    stripped = b"".join(kept)
    return stripped if len(stripped) < len(data) else None


# ---- decoding ----


def read_picture(path: str, shape: PictureShape | int, crop: int | None = None, max_pixels: int = MAX_PIXELS,
                 levels: Levels = NO_LEVELS) -> torch.Tensor:
    """Return the decoded file at `path` as `decode` does: uint8 (C, H, W). Raises DataError naming `path`."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:  # the file itself may be intact, so the message does not advise deleting it
        raise DataError(f"cannot read {printable(path)}: {error.strerror}") from error
    return decode(data, path, shape, crop, max_pixels, levels)


def decode(data: bytes, name: str, shape: PictureShape | int, crop: int | None = None, max_pixels: int = MAX_PIXELS,
           levels: Levels = NO_LEVELS) -> torch.Tensor:
    """Decode the encoded picture `data` and bring it into `shape`, see `to_tensor`; return uint8 (C, H, W).

    EXIF rotation is applied; transparency is composited over white, unless the shape has it. Of an animation the first
    frame is taken. A picture of
    more than `max_pixels` (0: no limit) is decoded at a reduced size if the format can. Raises UnusablePicture, whose
    message contains `name`.
    """
    try:
        return _despite_text(partial(_decode, shape=PictureShape.of(shape), crop=crop, max_pixels=max_pixels,
                                     levels=levels), data)
    except _UNUSABLE as error:
        raise _unusable(name, error, max_pixels, data[:16]) from None


def _despite_text(read: Callable, data: bytes):
    """Return read(data), of a PNG without its texts if Pillow refuses them: it reads those behind the pixels last."""
    try:
        return read(data)
    except ValueError:
        stripped = _without_text(data)
        if stripped is None:
            raise
        return read(stripped)


def _decode(data: bytes, shape: PictureShape, crop: int | None, max_pixels: int, levels: Levels) -> torch.Tensor:
    with _open(io.BytesIO(data)) as image:
        _limit(image, max(shape.height, shape.width), crop, max_pixels)
        kind = _kind(image)
        if kind == REAL or image.mode.startswith("I"):
            image = _grey(_upright(image), levels)
        elif kind and levels.whole != NO_LEVELS.whole:  # else the high bytes, which Pillow decodes, are the result
            image = _channels_in_8_bits(data, levels)
        else:
            image = _upright(image)
        return to_tensor(image, shape, crop)


def _unusable(name: str, error: Exception, max_pixels: int, start: bytes) -> UnusablePicture:
    """Return the error for a file with these first bytes."""
    if isinstance(error, UnidentifiedImageError) or re.search("supported|ot implemented", str(error)):  # of BMP, AVIF
        kind = next((kind for kind, begin in _SIGNATURES.items() if re.match(begin, start, re.DOTALL)), None)
        if kind is None:
            return UnusablePicture(name, "it is not a JPEG, PNG, WebP or any other picture that can be read")
        mend = "`pip install pillow-heif` lets HEIC be read" if "HEIC" in kind and "HEIF" not in FORMATS else \
            "convert or replace it"
        return UnusablePicture(name, f"it begins like a {kind}, but is damaged or of a kind that cannot be read here; "
                                     f"{mend}", False)
    if isinstance(error, _TooLarge):
        return UnusablePicture(name, f"it has more than {max_pixels:,} pixels; --max_pixels 0 lifts this limit", False)
    if isinstance(error, MemoryError):
        return UnusablePicture(name, "there is not enough memory to decode it", False)
    # Errors of the disk or the network have a number, Pillow's have none. EINVAL: a damaged header led out of the file.
    refused = getattr(error, "errno", None) not in (None, errno.EINVAL)
    return UnusablePicture(name, printable(error) or type(error).__name__, damaged=not refused)


def _limit(image: Image.Image, longest: int, crop: int | None, max_pixels: int):
    """Let the decoder scale down, for speed or to stay within `max_pixels`. Raise _TooLarge if it cannot."""
    side, reduction = 4 * longest, 1  # what is asked for, and by what each side must be divided
    while max_pixels and -(-image.width // reduction) * -(-image.height // reduction) > max_pixels:
        reduction *= 2
    if reduction > 1:
        if crop is not None:
            raise _TooLarge
        side = max(1, min(side, min(image.size) // reduction))
    if crop is None:
        image.draft(None, (side, side))  # large JPEGs decode at 1/2, 1/4, 1/8
    if reduction > 1 and image.format == "JPEG2000":
        image.reduce = reduction.bit_length() - 1
    elif max_pixels and image.width * image.height > max_pixels:
        raise _TooLarge


def _load(image: Image.Image):
    """Decode a picture. Raises one of _UNUSABLE."""
    try:
        image.load()
    except (RuntimeError, EOFError) as error:  # as in `_open`
        raise OSError(str(error)) from None


_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}     # {EXIF orientation: what makes such a picture upright}


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except DAMAGE:
        return 1  # the EXIF data are damaged; the pixels need not be


def _upright(image: Image.Image) -> Image.Image:
    """Decode and turn a picture. Not by Pillow's `exif_transpose`, which fails where it cannot write the other tags."""
    _load(image)
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _convert(image: Image.Image, channels: str) -> Image.Image:
    """Convert to mode RGB, L ("grey") or RGBA: where there is no transparency, transparent pixels become white."""
    if channels == "rgba":
        return image.convert("RGBA") if image.has_transparency_data else image.convert("RGB").convert("RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image.convert("L") if channels == "grey" else image


# ---- more than 8 bits ----

_NATIVE, _SWAPPED = ("L", "B") if sys.byteorder == "little" else ("B", "L")
# {how Pillow unpacks channels of 16 bits, keeping the high bytes: how it unpacks the low bytes of the same data}
_LOW_BYTES = {"LA;16B": "RGBA"} | {f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBA", "RGBX", "CMYK")
                                   for order, other in (("L", "B"), ("B", "L"), ("N", _SWAPPED))}


def _raw_modes(image: Image.Image) -> set[str]:
    """Return the names by which Pillow calls the layout of this PNG's or TIFF's data."""
    return {args[0] if isinstance(args, tuple) else args for *_, args in image.tile}


def _kind(image: Image.Image) -> int:
    """Return REAL, WHOLE or 0 for values of 8 bits; before the picture is loaded."""
    if image.mode == "F" or image.mode.startswith("I"):
        return REAL if image.mode == "F" else WHOLE
    return WHOLE if image.format in ("PNG", "TIFF") and image.tile and _raw_modes(image) <= _LOW_BYTES.keys() else 0


def _channels(data: bytes) -> tuple[np.ndarray, str]:
    """Return (values, mode) of a picture of several channels of 16 bits: uint16 (H, W, C), upright."""
    with _open(io.BytesIO(data)) as first, _open(io.BytesIO(data)) as second:
        second.tile = [tile._replace(args=(_LOW_BYTES[tile.args[0]], *tile.args[1:]) if isinstance(tile.args, tuple)
                                     else _LOW_BYTES[tile.args]) for tile in first.tile]
        grey = _raw_modes(first) == {"LA;16B"}
        high, low = (np.asarray(_upright(image)).astype(np.uint16) for image in (first, second))
        if grey:  # the second one holds both bytes of grey and alpha
            return np.stack([low[..., 0] << 8 | low[..., 1]] * 3 + [low[..., 2] << 8 | low[..., 3]], -1), "RGBA"
        return high << 8 | low, first.mode


def _extremes(data: bytes) -> tuple[float, float]:
    """Return the smallest and the largest value of a picture of more than 8 bits, transparency left out.

    Raises one of _UNUSABLE.
    """
    with _open(io.BytesIO(data)) as image:
        if image.mode == "F" or image.mode.startswith("I"):
            _load(image)
            values = np.asarray(image)
        else:
            values, mode = _channels(data)
            values = values[..., :3] if mode == "RGBA" else values
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def _to_8_bits(values: np.ndarray, levels: Levels) -> np.ndarray:
    """Map values linearly to uint8, clipped."""
    if values.dtype.kind == "f":
        low, high = levels.real
        with np.errstate(all="ignore"):  # NaN and infinite values
            scaled = np.nan_to_num((values - low) / ((high - low) or 1)) * 255 + 0.5
    else:
        low, high = levels.whole  # such as 0..4095: of 12 bits, the upper 8
        scaled = (values.astype(np.int64) - low) * 256 // (high - low + 1)
    return scaled.clip(0, 255).astype(np.uint8)


def _grey(image: Image.Image, levels: Levels) -> Image.Image:
    values, transparent = np.asarray(image), image.info.get("transparency")
    pixels = _to_8_bits(values, levels)
    if transparent is not None:
        pixels[values == transparent] = 255
    return Image.fromarray(pixels)


def _channels_in_8_bits(data: bytes, levels: Levels) -> Image.Image:
    values, mode = _channels(data)
    pixels = _to_8_bits(values, levels)
    with _open(io.BytesIO(data)) as image:
        transparent = image.info.get("transparency")
    if mode == "RGB" and transparent is not None:
        pixels[(values == transparent).all(-1)] = 255
    return Image.frombytes(mode, values.shape[1::-1], pixels.tobytes())


def measure_levels(traits: list[Traits]) -> Levels | None:
    """Return the Levels of a set of pictures, the same for all; None if all have 8 bits.

    Whole numbers range from 0 to the largest number of as many bits as the largest value has, such as 4095;
    floating-point numbers from 0 to 1, 255 or the largest value. Sets with negative values, or with values in a narrow
    band far from 0, such as temperatures, range from their smallest to their largest value.
    """
    if not any(t.kind for t in traits):
        return None
    levels = NO_LEVELS
    whole, real = ([(t.low, t.high) for t in traits if t.kind == kind] for kind in (WHOLE, REAL))
    if whole:
        low, high = int(min(low for low, _ in whole)), int(max(high for _, high in whole))
        own = low < 0 or 256 <= high - low < high / 8
        levels = levels._replace(whole=(low, high) if own else (0, 2**max(8, high.bit_length()) - 1))
    if real:
        low, high = min(low for low, _ in real), max(high for _, high in real)
        usual = next((top for top in (1.0, 255.0) if top / 2 < high <= top), high)
        levels = levels._replace(real=(low, high) if low < 0 or 0 < high - low < high / 8 else (0.0, usual))
    return levels


# ---- to tensors ----


def to_tensor(image: Image.Image, shape: PictureShape | int, crop: int | None = None) -> torch.Tensor:
    """Bring an `image` of any mode into `shape`; return uint8 (C, H, W).

    With `--fit crop` the largest part of the shape's proportions is cut from the middle of the image, or from its
    central square of side `crop` if that is given and the image is large enough; then it is Lanczos-resized. `pad`
    resizes the whole image until it fits and fills the rest with white, where there is transparency with transparent
    pixels; `stretch` resizes it as it is.
    """
    shape = PictureShape.of(shape)
    image, size = _convert(image, shape.channels), (shape.width, shape.height)
    if shape.fit == "crop":
        image = image.crop(_middle(image.size, size, crop))
    if shape.fit == "pad":
        scale = min(wanted / side for wanted, side in zip(size, image.size, strict=True))
        inner = tuple(max(1, round(scale * side)) for side in image.size)
        canvas = Image.new(image.mode, size, {"RGBA": (0, 0, 0, 0), "RGB": (255, 255, 255), "L": 255}[image.mode])
        canvas.paste(image.resize(inner, Image.Resampling.LANCZOS),
                     tuple((wanted - side) // 2 for wanted, side in zip(size, inner, strict=True)))
        image = canvas
    picture = to_chw(image.resize(size, Image.Resampling.LANCZOS))
    if shape.channels == "rgba":
        picture *= picture[3:] > 0      # what is invisible is black, so that G has nothing to learn there
    return picture


def _middle(size: tuple[int, int], wanted: tuple[int, int], crop: int | None) -> tuple[int, int, int, int]:
    """Return the box (left, top, right, bottom) of the largest part of a picture of `size` (width, height) with the
    proportions of `wanted`, within its central square of side `crop` if it has one.
    """
    width, height = (crop, crop) if crop is not None and crop <= min(size) else size
    scale = min(width / wanted[0], height / wanted[1])
    width, height = (min(whole, max(1, round(scale * side)))        # 1: of very thin pictures
                     for whole, side in zip((width, height), wanted, strict=True))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


def to_chw(picture: Image.Image | np.ndarray) -> torch.Tensor:
    """Copy a picture, uint8 (H, W, C) or (H, W), into a contiguous tensor (C, H, W)."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
