"""What a run's pictures are: their size (`--imsize`), channels (`--channels`) and how others are fitted (`--fit`).

An imsize is a number, the side of squares, or text such as "64x128", the height and width of pictures that are not
squares. Whatever grows with the pictures, such as the number of layers, goes by the shorter side, and feature sizes are
named by it. Nothing here imports torch.
"""

import argparse
import re
from typing import NamedTuple

from errors import UsageError

CHANNELS = {"rgb": 3, "grey": 1, "rgba": 4}     # --channels
FITS = ("crop", "pad", "stretch")               # --fit
FIRST = 4               # pixels: the shorter side of G's first feature map
LONGEST = 4             # the longer side, in units of the shorter one


def as_imsize(text):
    """'64' and '64x64' -> 64; '64x128' -> "64x128", height and width."""
    match = re.fullmatch(r"(\d{1,6})(?:[xX×](\d{1,6}))?", str(text).strip(), re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of pixels nor HEIGHTxWIDTH, such as 64x128")
    height, width = (int(side or match[1]) for side in match.groups())
    return height if height == width else f"{height}x{width}"


def sides(imsize):
    """Return (height, width): 64 -> (64, 64); "64x128" -> (64, 128)."""
    if isinstance(imsize, int):
        return imsize, imsize
    height, width = imsize.split("x")
    return int(height), int(width)


def short_side(imsize):
    """Return the shorter side: 64 -> 64; "64x128" -> 64."""
    return min(sides(imsize))


def halved(imsize):
    """Return the imsize of half the height and width: 64 -> 32, "64x128" -> "32x64"; None if one is odd."""
    height, width = sides(imsize)
    return None if height % 2 or width % 2 else as_imsize(f"{height // 2}x{width // 2}")


def sides_at(imsize, size):
    """Return (height, width) of this shape at a shorter side of `size`: "64x128" at 4 -> (4, 8)."""
    short = short_side(imsize)
    return tuple(size * side // short for side in sides(imsize))


def check_size(imsize, allowed, model):
    """Raise UsageError if the shorter side is not one of `allowed`, or the longer one no multiple of G's first map."""
    *others, last = allowed
    short, long = sorted(sides(imsize))
    if short not in allowed:
        which = "must be" if short == long else "the shorter side must be"
        raise UsageError(f"--imsize {imsize}: {which} {', '.join(map(str, others))} or {last} with --model {model}")
    step = short // FIRST
    if long > LONGEST * short:
        raise UsageError(f"--imsize {imsize}: the longer side must be at most {LONGEST} times the shorter one")
    if long % step:
        nearest = round(long / step) * step
        raise UsageError(f"--imsize {imsize}: the longer side must be a multiple of {step}, a quarter of the shorter "
                         f"one, such as {nearest}")


class PictureShape(NamedTuple):
    """The height and width of pictures, their channels, and how those of another shape are fitted."""

    height: int
    width: int
    channels: str = "rgb"
    fit: str = "crop"

    @classmethod
    def of(cls, imsize, channels="rgb", fit="crop"):
        """The shape of an imsize; a PictureShape as it is."""
        return imsize if isinstance(imsize, cls) else cls(*sides(imsize), channels, fit)

    @classmethod
    def of_config(cls, config):
        """The shape of a config's pictures; tools may have less than a whole config."""
        return cls.of(config.imsize, getattr(config, "channels", "rgb"), getattr(config, "fit", "crop"))

    @property
    def size(self):
        """(C, H, W), as of a tensor."""
        return CHANNELS[self.channels], self.height, self.width

    @property
    def values(self):
        """The number of values of one picture, C * H * W."""
        return CHANNELS[self.channels] * self.height * self.width

    @property
    def imsize(self):
        """The --imsize of this shape."""
        return as_imsize(f"{self.height}x{self.width}")

    @property
    def key(self):
        """What tells it from other shapes: the side of a square RGB picture, else text such as "64x128 rgba pad"."""
        words = [word for word, usual in ((self.channels, "rgb"), (self.fit, "crop")) if word != usual]
        return f"{self.imsize} {' '.join(words)}" if words else self.imsize
