"""Sheets: labelled figures of attention maps and masks (heat-map overlays) and of rows of images.

The functions take plain tensors and are independent of networks and runs. Images are (B, C, H, W) in [-1, 1],
shown as in grids.
Non-finite values are drawn, flagged by a caption or label, and never raise. All writes are atomic.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from gallery.grid import (
    BACKGROUND,
    EDGE,
    FRAME,
    GAP,
    INK,
    MARGIN,
    QUIET,
    RAMP,
    SCREEN,
    SHOWN,
    WARN,
    find_font,
    save_png,
    shortened,
    to_visible,
)

LEAST = 192         # px that small pictures are enlarged to
NARROWEST = 400     # px: width of a sheet, at least
UNIFORM = 0.98      # entropy of maps, 1 = uniform, above which they show hardly anything
LONG_CAPTION = "0.0000-0.0000  mean 0.0000"     # columns are at least as wide: all frames of a film are alike
# Query colours: light, because they are drawn on photographs and on a dark sheet; distinct in lightness as well as in
# hue, for colour-blind readers (under simulated full protanopia, deuteranopia and tritanopia any two differ by a CIE76
# distance of at least 22, any two of the first five by at least 28).
QUERY_COLOURS = (
    (64, 127, 218),  # blue
    (255, 120, 52),  # orange
    (0, 214, 143),  # green
    (255, 224, 24),  # yellow
    (236, 150, 208),  # pink
    (130, 92, 255),  # violet
    (214, 40, 72),  # crimson
    (240, 240, 240),  # white
)


# Anchors of the colour map at 0, 1/4, ..., 1. Lightness increases in equal steps, so that the colour map is
# perceptually uniform. It is *added* to the dimmed picture: black is transparent. Its brightness rises faster than the
# picture fades, so more attention is never darker.
_ANCHORS = np.array([(0, 0, 0), (60, 14, 80), (148, 36, 80), (208, 98, 40), (224, 192, 104)], np.float32)
_LEVELS = np.linspace(0, 1, 256, dtype=np.float32)
_HEAT = np.stack([np.interp(_LEVELS, np.linspace(0, 1, 5), c) for c in _ANCHORS.T], 1).astype(np.float32)
_OPACITY = (1 - 0.5 * _LEVELS)[:, None]  # weight of the dimmed picture at each level


def normalized_entropy(maps):
    """Entropy of each attention map divided by log(h*w): 1 is uniform, 0 attends to a single key.

    maps: (B, Q, h, w), non-negative, summing to 1 over h*w -> (B, Q) in [0, 1], float32. Zero and non-finite weights
    contribute nothing. With a single key (h*w = 1) the entropy is 0.
    """
    p = maps.detach().float().flatten(2).nan_to_num(0.0, 0.0, 0.0).clamp(min=0)  # (B, Q, h*w)
    if p.size(2) == 1:
        return p.new_zeros(p.shape[:2])
    return (torch.special.entr(p).sum(2) / math.log(p.size(2))).clamp(0, 1)


def save_attention(images, maps, queries, path, layer, step, gamma, entropy, names=()):
    """Write the `attention_sheet` of the other arguments as PNG atomically; create missing folders.

    Raises ValueError as it does, and OSError if the file cannot be written.
    """
    save_png(attention_sheet(images, maps, queries, layer, step, gamma, entropy, names), path)


def attention_sheet(images, maps, queries, layer, step, gamma, entropy, names=()):
    """Return a Pillow image of the attention maps of each query point: a row per image, a column per query.

    images: (B, C, H, W) in [-1, 1]. maps: (B, Q, h, w), the softmax weights of each query over the keys. queries:
    (Q, 2) tensor or list, (y, x) as fractions of the image in [0, 1]. Only printed: layer, its name; step: int; gamma,
    the layer's residual weight, and entropy, its mean normalized entropy, as numbers or one-element tensors; names, one
    text per image, such as its class, below it.

    The first column is the image with all query points. In the others the map, interpolated bicubically and divided by
    its maximum, is overlaid on the dimmed image. The caption gives its minimum and maximum in multiples of uniform
    attention 1/(h*w), and `H`, its normalized entropy. Images are enlarged by an integer factor up to 256 px at their
    longer side, larger ones are downscaled to 256 px. There are 8 colours, used cyclically.
    Raises ValueError if the shapes do not match.
    """
    queries = torch.as_tensor(queries).detach().float().cpu().reshape(-1, 2).clamp(0, 1)
    B, Q = len(images), len(queries)
    if maps.dim() != 4 or tuple(maps.shape[:2]) != (B, Q) or not B * Q:
        raise ValueError(f"save_attention: {B} images and {Q} queries do not fit maps {tuple(maps.shape)}")
    h, w = maps.shape[2:]
    cells = to_visible(images)
    cells = _enlarge(cells, _shown(max(cells.shape[1:3])))
    maps = maps.detach().float().cpu()
    gamma, entropy = (float(torch.as_tensor(number).detach()) for number in (gamma, entropy))
    colours = [QUERY_COLOURS[i % len(QUERY_COLOURS)] for i in range(Q)]

    head = [(layer, INK), (f"{h}x{w} keys", QUIET), (f"step {step}", QUIET)]
    # "gamma" in letters, because Pillow's default font has no Greek.
    head += [(f"gamma = {gamma:+.4f}", INK), (f"entropy {entropy:.2f}", INK)]
    if abs(gamma) < 0.005:
        head += [("gamma is near 0: almost no effect yet", WARN)]
    else:                                               # the space is there always: films do not jump
        head += [("entropy is near 1: nearly uniform, the colours say little", WARN if entropy > UNIFORM else None)]
    legend = ("0", None, "maximum of each map", "least to most: times uniform attention", "H: entropy, 1 = uniform")
    columns = [(f"query {i + 1}", colour, colour, "") for i, colour in enumerate(colours)]
    rows = [([_divided_by_max(map) for map in row], [_caption(map) for map in row]) for row in maps]
    sheet, left, tops = _sheet(head, legend, cells, columns, rows, names)
    longer = max(cells.shape[1:3])
    for i, (down, right) in enumerate((queries * torch.tensor(cells.shape[1:3])).tolist()):
        for y in tops:
            _dot(sheet, left[0] + right, y + down, max(5, longer // 36), colours[i])
            _dot(sheet, left[i + 1] + right, y + down, max(4, longer // 50), colours[i])
    return sheet


def save_masks(images, masks, path, title, step, names=()):
    """Write the `mask_sheet` of the other arguments as PNG atomically; create missing folders.

    Raises ValueError as it does, and OSError if the file cannot be written.
    """
    save_png(mask_sheet(images, masks, title, step, names), path)


def mask_sheet(images, masks, title, step, names=()):
    """Return a Pillow image of each layer's spatial attention mask: a row per image, a column per layer.

    images: (B, C, H, W) in [-1, 1]. masks: {layer name: (B, 1, h, w)}, sigmoid values in (0, 1); layers may differ in h
    and w. title: str; step: int. names: one text per image, such as its class, below it.

    The first column is the image. In the others the layer's mask is overlaid on the dimmed image. Because a mask may
    use a small part of (0, 1), each is normalized by its own minimum (transparent) and maximum; the caption gives the
    actual range and mean. A mask whose range is below 0.0001 counts as constant and is transparent, as are non-finite
    values. If the masks of a layer span less than 0.05 over all images, the column's heading warns that the layer has
    almost no effect. Image sizes as in attention_sheet. Raises ValueError if the shapes do not match.
    """
    shapes = [tuple(images.shape)] + [tuple(mask.shape) for mask in masks.values()]
    B = shapes[0][:1]
    fit = len(shapes[0]) == 4 and shapes[0][1] in SHOWN and all(len(s) == 4 and s[:2] == B + (1,) for s in shapes[1:])
    if not (fit and masks and all(map(math.prod, shapes))):
        raise ValueError(f"save_masks: images {shapes[0]} and masks {shapes[1:]} do not fit together")
    masks = {layer: mask.detach().float().cpu()[:, 0] for layer, mask in masks.items()}
    columns = []
    for layer, mask in masks.items():
        constant = mask.max() - mask.min() < 0.05  # False if any value is NaN or infinite
        note = "nearly constant" if constant else " "       # the line is there: films do not jump
        columns.append((f"{layer}  {mask.size(1)}x{mask.size(2)}", INK, EDGE, note))
    per_image = zip(*masks.values(), strict=True)
    rows = [([_min_max_normalized(mask) for mask in row], [_mask_caption(mask) for mask in row]) for row in per_image]
    legend = ("dark = the mask's least", None, "bright = its most", "a mask multiplies the features it covers",
              "nearly constant = almost no effect")
    cells = _enlarge(to_visible(images), _shown(max(shapes[0][2:])))
    return _sheet([(title, INK), (f"step {step}", QUIET)], legend, cells, columns, rows, names)[0]


def save_reconstructions(rows, path, title, step, captions=None, legend="each column belongs to one image"):
    """Write one PNG with a labelled row of images per entry, such as real images and their reconstructions.

    rows: {label: (B, C, h, w) in [-1, 1]}, from top to bottom; column i of every row belongs to the same image.
    captions: {label: B short texts below the images of that row}. title: str; step: int, or None to omit it. Rows may
    differ in h and w: all are shown at one size, that of attention_sheet for the largest of them, or less so that 8
    columns fit into 1920 px; the aspect ratio is kept. Labels are cut to the width of the pictures. That of a row with
    non-finite values says so. The write is atomic; missing folders are created.
    Raises ValueError if the shapes do not match, OSError if the file cannot be written.
    """
    shapes = [tuple(images.shape) for images in rows.values()]
    if not shapes or any(len(s) != 4 or s[0] != shapes[0][0] or s[1] not in SHOWN or not math.prod(s)
                         for s in shapes):
        raise ValueError(f"save_reconstructions: rows {shapes} are not pictures of the same number of images")
    B = shapes[0][0]
    gap, small = 2 * GAP, find_font(13)
    limit = min(256, (SCREEN - 2 * MARGIN) // min(B, 8) - gap)
    cell = _shown(max(max(shape[2:]) for shape in shapes), limit)
    captions = captions or {}
    enlarged = [_enlarge(to_visible(images), cell) for images in rows.values()]
    tall, wide = (max(pictures.shape[side] for pictures in enlarged) for side in (1, 2))
    wide = max([wide] + [math.ceil(small.getlength(text)) for texts in captions.values() for text in texts])
    width, labels = max(B * (wide + gap) - gap, NARROWEST - 2 * MARGIN), []
    for label, images in rows.items():
        note = [("not finite", WARN)] * (not images.isfinite().all())
        labels.append(_flow([(shortened(label, small, width - 80 * len(note)), INK), *note], small, math.inf, 14)[0])
    head = [(title, INK)] + [(f"step {step}", QUIET)] * (step is not None)
    sheet, draw, top = _blank(head, (legend,), width, len(rows) * (tall + 38) + len(captions) * 18)
    for placed, label, pictures in zip(labels, rows, enlarged, strict=True):
        _put(sheet, draw, placed, MARGIN, top + 10, small)
        top += 32
        for i, picture in enumerate(pictures):
            h, w, _ = picture.shape
            place = MARGIN + i * (wide + gap) + (wide - w) // 2, top + (tall - h) // 2
            sheet.paste(Image.fromarray(picture), place)
        top += tall + 6
        if label in captions:
            for i, text in enumerate(captions[label]):
                draw.text((MARGIN + i * (wide + gap), top + 10), text, QUIET, small, "ls")
            top += 18
    save_png(sheet, path)


def _shown(side, limit=256):
    """Return the displayed size in px: an integer multiple of `side`, at least LEAST if possible, at most `limit`."""
    return limit if side > limit else side * min(math.ceil(LEAST / side), limit // side)


def _enlarge(cells, cell):
    """Resize uint8 (B, h, w, 3) to `cell` px at the longer side: nearest neighbour at integer factors, else Lanczos."""
    h, w = cells.shape[1:3]
    zoom, rest = divmod(cell, max(h, w))
    if not rest:
        return cells.repeat(zoom, 1).repeat(zoom, 2)
    size = [max(1, round(side * cell / max(h, w))) for side in (w, h)]
    return np.stack([Image.fromarray(c).resize(size, Image.Resampling.LANCZOS) for c in cells])


def _caption(map):
    """Caption of one attention map (h, w)."""
    if not map.isfinite().all():
        return "map is not finite"
    low, high = (extreme.item() * map.numel() for extreme in (map.min(), map.max()))
    return f"{low:.2f}x to {high:.1f}x   H {normalized_entropy(map[None, None]).item():.2f}"


def _mask_caption(mask):
    """Caption of one mask (h, w)."""
    if not mask.isfinite().all():
        return "mask is not finite"
    low, high = mask.min().item(), mask.max().item()
    digits = 2 if high - low >= 0.02 else 4
    return f"{low:.{digits}f}-{high:.{digits}f}  mean {mask.mean().item():.{digits}f}"


def _divided_by_max(map):
    """An attention map (h, w) divided by its maximum; all zeros if the maximum is 0."""
    map = map.nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
    peak = map.max()
    return map / torch.where(peak > 0, peak, 1.0)


def _min_max_normalized(mask):
    """A mask (h, w) scaled from its minimum and maximum to 0 and 1; all zeros if they differ by less than 1e-4."""
    finite = mask.isfinite()
    if not finite.any() or mask[finite].max() - mask[finite].min() < 1e-4:
        return torch.zeros_like(mask)
    low, high = mask[finite].min(), mask[finite].max()
    return (torch.where(finite, mask, low) - low) / (high - low)


def _overlays(cell, maps):
    """Yield uint8 (H, W, 3): each of `maps` (h, w) in [0, 1] overlaid on the dimmed picture `cell`."""
    picture = cell.astype(np.float32)
    grey = picture @ np.array((0.299, 0.587, 0.114), np.float32)
    dim = 0.42 * (0.4 * picture + 0.6 * grey[..., None])
    for map in maps:
        # Bicubic interpolation is smooth; its overshoot is an artifact and is clamped. antialias matters only if the
        # map has a higher resolution than the cell.
        fine = F.interpolate(map[None, None], cell.shape[:2], mode="bicubic", antialias=True)[0, 0].clamp(0, 1)
        level = (fine * 255).round().to(torch.uint8).numpy()
        yield np.minimum(dim * _OPACITY[level] + _HEAT[level], 255).astype(np.uint8)


def _sheet(head, legend, cells, columns, rows, names):
    """Draw a sheet with one row per cell: the picture, then its framed overlays with a caption below each.

    head, legend: as in _blank. cells: uint8 (B, H, W, 3). columns: (heading, its colour, frame colour, a warning
    or "") per overlay. rows: (maps in [0, 1], captions) per cell. names: one per cell, or none.
    -> (sheet, x of all columns, y of all rows): positions of the pictures inside their frames.
    """
    height, width = cells.shape[1:3]
    small = find_font(13)
    texts = [text for heading, _, _, note in columns for text in (heading, note)]
    texts += [caption for _, captions in rows for caption in captions] + [LONG_CAPTION]
    pitch_x = max(width + 2 * FRAME, *(math.ceil(small.getlength(text)) for text in texts)) + 10
    pitch_y = height + 2 * FRAME + 34
    # x of the image, then of each overlay, with a wider gap after the image
    left = [MARGIN] + [MARGIN + width + 18 + FRAME + i * pitch_x for i in range(len(columns))]
    headings = 58 if any(note for *_, note in columns) else 40  # height in px
    sheet, draw, top = _blank(head, legend, left[-1] - FRAME + pitch_x - 10 - MARGIN, headings + len(cells) * pitch_y)
    tops = [top + headings + b * pitch_y for b in range(len(cells))]
    draw.text((MARGIN, top + 29), "image", INK, small, "ls")
    for x, (heading, colour, _, note) in zip(left[1:], columns, strict=True):
        draw.text((x - FRAME, top + 29), heading, colour, small, "ls")
        draw.text((x - FRAME, top + 47), note, WARN, small, "ls")
    for y, picture, (maps, captions), name in zip(tops, cells, rows, names or [""] * len(rows), strict=True):
        sheet.paste(Image.fromarray(picture), (MARGIN, y))
        draw.text((MARGIN, y + height + FRAME + 16), shortened(name, small, width), INK, small, "ls")
        for i, overlay in enumerate(_overlays(picture, maps)):
            x = left[i + 1]
            draw.rectangle((x - FRAME, y - FRAME, x + width + FRAME - 1, y + height + FRAME - 1), columns[i][2])
            sheet.paste(Image.fromarray(overlay), (x, y))
            draw.text((x - FRAME, y + height + FRAME + 16), captions[i], QUIET, small, "ls")
    return sheet, left, tops


def _blank(head, legend, width, body):
    """Create a sheet with an empty body of width x body px (wider if the title line needs it).

    head: (text, colour) parts of the title line, the space of one without a colour stays empty; legend: texts below the
    body, None for the colour scale.
    -> (sheet, its ImageDraw, y of the body); the body's x is MARGIN.
    """
    title, small = find_font(17), find_font(13)
    foot = [(text, QUIET) for text in legend]
    width = max(width, NARROWEST - 2 * MARGIN, *(math.ceil(title.getlength(text)) for text, _ in head),
                *(math.ceil(small.getlength(text)) for text, _ in foot if text))
    head, head_height = _flow(head, title, width, 26)
    foot, foot_height = _flow(foot, small, width, 20)
    height = 2 * MARGIN + head_height + body + 6 + foot_height
    sheet = Image.new("RGB", (width + 2 * MARGIN, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    _put(sheet, draw, head, MARGIN, MARGIN - 6, title)
    _put(sheet, draw, foot, MARGIN, height - MARGIN - foot_height + 6, small)
    return sheet, draw, MARGIN + head_height


def _flow(parts, font, width, gap):
    """Lay out (text, colour) parts from left to right, with line breaks at `width`.

    A text of None is the colour scale. -> ([(x, y, text, colour)], height), relative to the first line.
    """
    placed, x, y, line = [], 0, 0, round(font.size * 1.5)
    for text, colour in parts:
        length = RAMP if text is None else math.ceil(font.getlength(text))
        if x and x + length > width:
            x, y = 0, y + line
        placed.append((x, y, text, colour))
        x += length + gap
    return placed, y + line


def _put(sheet, draw, placed, left, top, font):
    for x, y, text, colour in placed:
        if text is None:
            ramp = _HEAT[np.linspace(0, 255, RAMP).astype(int)].astype(np.uint8)
            sheet.paste(Image.fromarray(np.tile(ramp, (9, 1, 1))), (left + x, top + y + font.size - 9))
        elif colour is not None:
            draw.text((left + x, top + y + font.size), text, colour, font, "ls")


def _dot(sheet, x, y, radius, colour):
    sprite = _sprite(radius, colour)
    half = sprite.width // 2
    sheet.paste(sprite, (math.floor(x) - half, math.floor(y) - half), sprite)


@lru_cache
def _sprite(radius, colour):
    """A dot with a white and a black ring, visible on any background; anti-aliased by supersampling."""
    over, half = 8, radius + 3
    size = (2 * half + 1) * over
    sprite, middle = Image.new("RGBA", (size, size)), size / 2
    draw = ImageDraw.Draw(sprite)
    for r, fill in ((radius + 3, (0, 0, 0)), (radius + 1.8, (255, 255, 255)), (radius + 0.3, colour)):
        draw.ellipse([middle - r * over, middle - r * over, middle + r * over, middle + r * over], fill)
    return sprite.reduce(over)


