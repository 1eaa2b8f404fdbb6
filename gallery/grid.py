"""Sample grids, and what all pictures of the gallery share: colours, conversion to uint8, atomic PNG writes.

The functions take plain tensors and are independent of networks and runs. Images are (B, C, H, W) in [-1, 1]: grey,
RGB, or RGB and transparency, which is shown on a chequered ground. Images of a diverged run are useful too: non-finite
values are drawn (NaN as mid grey) and never raise. Disk errors are raised as OSError.
"""

import math
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from flags.pictures import sides
from utils import write_atomically

BACKGROUND, INK, QUIET, WARN = (22, 23, 27), (236, 236, 238), (154, 157, 166), (255, 190, 92)
EDGE = (84, 87, 96)  # frames whose colour has no meaning
GAP, MARGIN, FRAME, RAMP = 2, 24, 3, 120  # px; RAMP is the length of the colour scale in the legend
NAME_WIDTH = 160  # px: of a row's name, at most
SCREEN = 1920  # px: maximal width of eight columns
SHOWN = (1, 3, 4)  # channels of images that can be shown
CHEQUER, CHEQUERS = 8, (204, 255)  # px and shades of grey of the ground of transparent images


def grid_side(imsize):
    """Return the images per row and column of a sample grid that fits on a screen.

    8 up to 64 px at the longer side, 6 up to 128, 4 up to 256, 3 up to 512, 2 above.
    """
    for limit, side in ((64, 8), (128, 6), (256, 4), (512, 3)):
        if max(sides(imsize)) <= limit:
            return side
    return 2


def to_uint8(images):
    """Float (B, C, H, W) in [-1, 1] on any device -> uint8 (B, H, W, C) numpy array.

    Values outside are clamped, NaN becomes mid grey, and values are rounded: truncation would darken every picture by
    half a level, and a uint8 picture converted to float and back would change.
    """
    x = images.detach().float().nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0).clamp(-1, 1)
    # Convert before the copy to the CPU: uint8 is a quarter of the bytes.
    return ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_visible(images):
    """Images (B, C, H, W) in [-1, 1] -> uint8 (B, H, W, 3) numpy array as a screen shows them: transparency as a
    chequered ground.
    """
    pictures = to_uint8(images)
    B, H, W, C = pictures.shape
    if C == 1:
        return pictures.repeat(3, 3)
    if C == 3:
        return pictures
    odd = (np.indices((H, W)) // CHEQUER).sum(0) % 2                    # (H, W)
    ground = np.where(odd, *CHEQUERS)[..., None]                        # (H, W, 1)
    alpha = pictures[..., 3:] / 255
    return (pictures[..., :3] * alpha + ground * (1 - alpha)).round().astype(np.uint8)


def to_picture(pixels):
    """Return uint8 (H, W, C) as a Pillow image of mode L, RGB or RGBA."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


@lru_cache
def find_font(size):
    """The font of all text in pictures: Pillow's own, which is everywhere."""
    return ImageFont.load_default(size=size)


def save_grid(images, path, columns=None, names=None):
    """Write images (B, C, H, W) in [-1, 1] as a grid in one PNG, row by row, with a thin gap between them.

    columns defaults to the images of one of `names`, or to what makes the grid nearly square. Images of a shorter side
    under 64 px are enlarged by an integer factor (nearest neighbour) to be visible on a screen; larger ones keep their
    size. `names`, one per row, stand left of the rows. The write is atomic; missing folders are created. Raises
    ValueError for no image or fewer than one column, OSError if the file cannot be written.
    """
    cells = to_visible(images)
    if not len(cells):
        raise ValueError("save_grid: no images")
    if columns is None:
        columns = len(cells) // len(names) if names else columns_of(*cells.shape[:3])
    columns = min(columns, len(cells))
    if columns < 1:
        raise ValueError("save_grid: columns must be at least 1")
    zoom = math.ceil(64 / min(cells.shape[1:3]))
    cells = cells.repeat(zoom, 1).repeat(zoom, 2)
    B, H, W, _ = cells.shape
    rows, font = math.ceil(B / columns), find_font(13)
    lines = [shortened(name, font) for name in names or ()]
    margin = math.ceil(max(map(font.getlength, lines), default=-2 * GAP)) + 2 * GAP
    canvas = np.empty((rows * (H + GAP) + GAP, margin + columns * (W + GAP) + GAP, 3), np.uint8)
    canvas[:] = BACKGROUND
    for i, cell in enumerate(cells):
        top, left = GAP + i // columns * (H + GAP), margin + GAP + i % columns * (W + GAP)
        canvas[top : top + H, left : left + W] = cell
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        draw.text((margin, GAP + row * (H + GAP) + H // 2), line, INK, font, "rm")
    save_png(picture, path)


def columns_of(count, height, width):
    """Return the columns of a nearly square grid of `count` images of height x width; if its longer side can be at most
    twice the shorter one without empty cells, there are none.
    """
    def cost(columns):
        rows = math.ceil(count / columns)
        across, down = columns * width, rows * height
        ratio = max(across, down) / min(across, down)
        empty = rows * columns / count
        return ratio > 2 or empty > 1, ratio * empty, -columns

    return min(range(1, count + 1), key=cost)


def in_ranges(numbers):
    """Return whole numbers as the name of a row, such as "3, 5, 9-14"; where that is too wide, without some before the
    last: "3, 5, ..., 70".
    """
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [f"{first}-{last}" if last > first else str(first) for first, last in runs]
    lines = [", ".join(parts), *(", ".join([*parts[:kept], "...", parts[-1]]) for kept in range(len(parts) - 2, 0, -1))]
    return next((line for line in lines if find_font(13).getlength(line) <= NAME_WIDTH), lines[-1])


def shortened(name, font, width=NAME_WIDTH):
    """The name, or its beginning if it is wider than `width` px, in letters that the font has: e for é, ? for others.
    """
    parts = unicodedata.normalize("NFKD", name)
    name = "".join(one for one in parts if not unicodedata.combining(one)).encode("ascii", "replace").decode()
    if font.getlength(name[:width]) <= width and len(name) <= width:    # no letter is under 1 px wide
        return name
    name = name[:width]
    while font.getlength(f"{name}...") > width:
        name = name[:-1]
    return f"{name}..."


def save_png(image, path):
    """Write a Pillow image as PNG atomically; create missing folders. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Pillow's default level 6 takes up to 2.6 times as long. RLE suits sheets: smaller and faster than level 2 without.
    write_atomically(path, lambda temporary: image.save(
        temporary, format="PNG", compress_level=2, compress_type=Image.core.RLE), sweep=False)
