"""The pictures of a run: grids of samples, overlays of attention maps and masks, reconstructions.

Everything here takes plain tensors and writes one PNG; nothing knows of networks, runs or flags. Images are
(B, 3, H, W) in [-1, 1]. A picture of a diverged run is worth having too, so numbers that are not finite are
drawn (NaN as mid grey, and said so beside a map or a row) and never raise. Files appear whole or not at all. What
goes wrong with the disk leaves as OSError.
"""

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from utils import write_atomically

# Query colours: light, because they stand on photographs and on a dark page, and apart in lightness as well
# as in hue, because that is what a colour-blind reader has left (under simulated full protan-, deuter- and
# tritanopia any two differ by a CIE76 distance of 22 or more, any two of the first five by 28).
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

PAGE, INK, QUIET, WARN = (22, 23, 27), (236, 236, 238), (154, 157, 166), (255, 190, 92)
EDGE = (84, 87, 96)  # frames that stand for nothing

# Anchors of the heat ramp at 0, 1/4, ..., 1: lightness climbs in equal steps, so that equal steps of map look
# equal. The heat is *added* to the dimmed picture: black is transparent, and as the ramp climbs faster than
# the picture fades beneath it, more attention is never darker.
_ANCHORS = np.array([(0, 0, 0), (60, 14, 80), (148, 36, 80), (208, 98, 40), (224, 192, 104)], np.float32)
_LEVELS = np.linspace(0, 1, 256, dtype=np.float32)
_HEAT = np.stack([np.interp(_LEVELS, np.linspace(0, 1, 5), c) for c in _ANCHORS.T], 1).astype(np.float32)
_THROUGH = (1 - 0.5 * _LEVELS)[:, None]  # how much of the dimmed picture still shows at each level

GAP, MARGIN, FRAME, RAMP = 2, 24, 3, 120  # px; RAMP is the length of the heat scale in the legend
SCREEN = 1920  # px, the width that eight columns should not exceed


def grid_side(imsize):
    """Pictures per row and per column of a square sample grid that still fits on a screen.

    8 up to 64 px, 6 up to 128, 4 up to 256, 3 up to 512, 2 above.
    """
    for limit, side in ((64, 8), (128, 6), (256, 4), (512, 3)):
        if imsize <= limit:
            return side
    return 2


def default_queries():
    """The (5, 2) query points used unless others are asked for: (y, x) as fractions of the image.

    On aligned faces they are the two eyes, the mouth, the hair and a corner of the background; on a landscape
    two places at the horizon, the foreground, the sky and a far corner.
    """
    return torch.tensor([(0.45, 0.36), (0.45, 0.64), (0.72, 0.50), (0.20, 0.50), (0.12, 0.10)])


def to_uint8(images):
    """Float (B, 3, H, W) in [-1, 1] on any device -> uint8 (B, H, W, 3) numpy array.

    Values outside are clamped, NaN becomes mid grey, and levels are rounded: truncating would darken every
    picture by half a level, and a byte turned into a float would not always come back.
    """
    x = images.detach().float().nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0).clamp(-1, 1)
    # Bytes before the copy: a quarter of the traffic from the device.
    return ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def normalized_entropy(maps):
    """Entropy of each attention map over log(h*w): 1 is uniform, 0 looks at one place only.

    maps: (B, Q, h, w), non-negative, summing to 1 over h*w -> (B, Q) in [0, 1], float32. p = 0 adds nothing,
    neither does a p that is not finite. A single key leaves nothing to choose: its entropy is 0.
    """
    p = maps.detach().float().flatten(2).nan_to_num(0.0, 0.0, 0.0).clamp(min=0)  # (B, Q, h*w)
    if p.size(2) == 1:
        return p.new_zeros(p.shape[:2])
    return (torch.special.entr(p).sum(2) / math.log(p.size(2))).clamp(0, 1)


def save_grid(images, path, columns=None):
    """Write images (B, 3, H, W) in [-1, 1] as one PNG, row by row, with a thin gap between them.

    columns defaults to the nearly square ceil(sqrt(B)). Pictures less than 64 px high are enlarged by a whole
    factor, each pixel becoming a square block, so that the grid can be looked at on a screen; all others
    keep their pixels. The file appears whole or not at all; missing folders are made.
    Raises ValueError for no image or fewer than one column, OSError if the file cannot be written.
    """
    cells = to_uint8(images)
    if not len(cells):
        raise ValueError("save_grid: there is no image to draw")
    columns = math.ceil(math.sqrt(len(cells))) if columns is None else min(columns, len(cells))
    if columns < 1:
        raise ValueError("save_grid: columns must be at least 1")
    zoom = math.ceil(64 / cells.shape[1])
    cells = cells.repeat(zoom, 1).repeat(zoom, 2)
    B, H, W, _ = cells.shape
    rows = math.ceil(B / columns)
    page = np.empty((rows * (H + GAP) + GAP, columns * (W + GAP) + GAP, 3), np.uint8)
    page[:] = PAGE
    for i, cell in enumerate(cells):
        top, left = GAP + i // columns * (H + GAP), GAP + i % columns * (W + GAP)
        page[top : top + H, left : left + W] = cell
    save_page(Image.fromarray(page), path)


def save_attention(images, maps, queries, path, layer, step, gamma, entropy):
    """Write `attention_page` of the other arguments as one PNG, whole or not at all; missing folders are made.

    Raises what that does, and OSError if the file cannot be written.
    """
    save_page(attention_page(images, maps, queries, layer, step, gamma, entropy), path)


def attention_page(images, maps, queries, layer, step, gamma, entropy):
    """A picture, of Pillow's, that shows where each query point looks: a row per image, a column per query.

    images: (B, 3, S, S) in [-1, 1]. maps: (B, Q, h, w), the softmax weights of each query over the keys.
    queries: (Q, 2) tensor or list, (y, x) as fractions of the image in [0, 1]. layer: its name; step: int;
    gamma: the layer's residual weight; entropy: the layer's mean normalized entropy; numbers or one-element
    tensors, only printed.

    The first column is the image with all query points. In the others the image is dimmed and the map,
    interpolated between the centres of its keys and divided by its own maximum, glows over it. Beneath each:
    its minimum and maximum in multiples of uniform attention 1/(h*w), and `H`, its normalized entropy.
    Images are shown at a whole multiple of their size up to 256 px, larger ones are scaled down to 256.
    There are 8 colours; a 9th query would begin them anew.
    Raises ValueError if the shapes do not fit together.
    """
    queries = torch.as_tensor(queries).detach().float().cpu().reshape(-1, 2).clamp(0, 1)
    B, Q = len(images), len(queries)
    if maps.dim() != 4 or tuple(maps.shape[:2]) != (B, Q) or not B * Q:
        raise ValueError(f"save_attention: {B} images and {Q} queries do not fit maps {tuple(maps.shape)}")
    h, w = maps.shape[2:]
    cells = to_uint8(images)
    cell = _shown(cells.shape[1])
    maps = maps.detach().float().cpu()
    gamma, entropy = (float(torch.as_tensor(number).detach()) for number in (gamma, entropy))
    colours = [QUERY_COLOURS[i % len(QUERY_COLOURS)] for i in range(Q)]

    head = [(layer, INK), (f"{h}x{w} keys", QUIET), (f"step {step}", QUIET)]
    # Spelled out: Pillow's own font has no Greek.
    head += [(f"gamma = {gamma:+.4f}", INK), (f"entropy {entropy:.2f}", INK)]
    if abs(gamma) < 0.005:
        head += [("gamma is near 0: almost no effect yet", WARN)]
    legend = ("0", None, "maximum of each map", "least to most: times uniform attention", "H: entropy, 1 = uniform")
    columns = [(f"query {i + 1}", colour, colour, "") for i, colour in enumerate(colours)]
    rows = [([_of_peak(map) for map in row], [_caption(map) for map in row]) for row in maps]
    page, left, tops = _sheet(head, legend, _enlarge(cells, cell), columns, rows)
    for i, (down, right) in enumerate((queries * cell).tolist()):
        for y in tops:
            _dot(page, left[0] + right, y + down, max(5, cell // 36), colours[i])
            _dot(page, left[i + 1] + right, y + down, max(4, cell // 50), colours[i])
    return page


def save_masks(images, masks, path, title, step):
    """Write `masks_page` of the other arguments as one PNG, whole or not at all; missing folders are made.

    Raises what that does, and OSError if the file cannot be written.
    """
    save_page(masks_page(images, masks, title, step), path)


def masks_page(images, masks, title, step):
    """A picture, of Pillow's, that shows what each layer's spatial mask favours: a row per image, a column per layer.

    images: (B, 3, S, S) in [-1, 1]. masks: {layer name: (B, 1, h, w)}, sigmoid values in (0, 1); layers may
    differ in h and w. title: str; step: int.

    The first column is the image. In the others the image is dimmed and the layer's mask glows over it. A
    mask need not use much of (0, 1), so each is stretched from its own minimum (no heat) to its own maximum;
    the caption beneath tells its true range and mean. One whose range is below 0.0001 counts as constant and
    has no heat anywhere; neither has a place whose value is not finite. Where all masks of a layer together
    span less than 0.05, its heading warns that they hardly tell one place from another. Sizes of images as in
    attention_page. Raises ValueError if the shapes do not fit together.
    """
    shapes = [tuple(images.shape)] + [tuple(mask.shape) for mask in masks.values()]
    B, S = shapes[0][:1], shapes[0][-1:]
    fit = shapes[0] == B + (3,) + S + S and all(len(s) == 4 and s[:2] == B + (1,) for s in shapes[1:])
    if not (fit and masks and all(map(math.prod, shapes))):
        raise ValueError(f"save_masks: images {shapes[0]} and masks {shapes[1:]} do not fit together")
    masks = {layer: mask.detach().float().cpu()[:, 0] for layer, mask in masks.items()}
    columns = []
    for layer, mask in masks.items():
        flat = mask.max() - mask.min() < 0.05  # false if any value is not finite
        note = "nearly constant: almost no effect" if flat else ""
        columns.append((f"{layer}  {mask.size(1)}x{mask.size(2)}", INK, EDGE, note))
    per_image = zip(*masks.values(), strict=True)
    rows = [([_stretched(mask) for mask in row], [_mask_caption(mask) for mask in row]) for row in per_image]
    legend = ("dark = the mask's least", None, "bright = its most", "a mask multiplies the features it covers")
    cells = _enlarge(to_uint8(images), _shown(*S))
    return _sheet([(title, INK), (f"step {step}", QUIET)], legend, cells, columns, rows)[0]


def save_reconstructions(rows, path, title, step, captions=None, legend="each column belongs to one image"):
    """Write one PNG with a labelled row of pictures per entry: real images and what was made of them.

    rows: {label: (B, 3, h, w) in [-1, 1]}, in the order of the page; column i of every row belongs to the
    same image. captions: {label: B short texts to stand beneath the pictures of that row}. Rows may differ in
    h and w: all are shown at one size, that of save_attention for the largest of them, or less so that 8
    columns stay within 1920 px; what is not square keeps its shape. title: str; step: int, or None to leave it
    out. A row with numbers that are not finite says so. The file appears whole or not at all; missing
    folders are made.
    Raises ValueError if the shapes do not fit together, OSError if the file cannot be written.
    """
    shapes = [tuple(images.shape) for images in rows.values()]
    if not shapes or any(len(s) != 4 or s[:2] != (shapes[0][0], 3) or not math.prod(s) for s in shapes):
        raise ValueError(f"save_reconstructions: rows {shapes} are not pictures of the same number of images")
    B = shapes[0][0]
    gap, small = 2 * GAP, _font(13)
    limit = min(256, (SCREEN - 2 * MARGIN) // min(B, 8) - gap)
    cell = _shown(max(max(shape[2:]) for shape in shapes), limit)
    captions = captions or {}
    labels = []
    for label, images in rows.items():
        parts = [(label, INK)] + [("not finite", WARN)] * (not images.isfinite().all())
        labels.append(_flow(parts, small, math.inf, 14)[0])
    width = max([B * (cell + gap) - gap] + [math.ceil(x + small.getlength(t)) for x, _, t, _ in sum(labels, [])])
    head = [(title, INK)] + [(f"step {step}", QUIET)] * (step is not None)
    page, draw, top = _page(head, (legend,), width, len(rows) * (cell + 38) + len(captions) * 18)
    for placed, (label, images) in zip(labels, rows.items(), strict=True):
        _put(page, draw, placed, MARGIN, top + 10, small)
        top += 32
        for i, picture in enumerate(_enlarge(to_uint8(images), cell)):
            h, w, _ = picture.shape
            place = MARGIN + i * (cell + gap) + (cell - w) // 2, top + (cell - h) // 2
            page.paste(Image.fromarray(picture), place)
        top += cell + 6
        if label in captions:
            for i, text in enumerate(captions[label]):
                draw.text((MARGIN + i * (cell + gap), top + 10), text, QUIET, small, "ls")
            top += 18
    save_page(page, path)


def _shown(side, limit=256):
    """The px at which a picture of this side is shown: a whole multiple of about 192, at most `limit`."""
    return limit if side > limit else side * min(math.ceil(192 / side), limit // side)


def _enlarge(cells, cell):
    """uint8 (B, h, w, 3) -> the same with `cell` px at the longer side; square blocks where it divides `cell`."""
    h, w = cells.shape[1:3]
    zoom, rest = divmod(cell, max(h, w))
    if not rest:
        return cells.repeat(zoom, 1).repeat(zoom, 2)
    size = [max(1, round(side * cell / max(h, w))) for side in (w, h)]
    return np.stack([Image.fromarray(c).resize(size, Image.Resampling.LANCZOS) for c in cells])


def _caption(map):
    """The line beneath the overlay of one attention map (h, w)."""
    if not map.isfinite().all():
        return "map is not finite"
    low, high = (extreme.item() * map.numel() for extreme in (map.min(), map.max()))
    return f"{low:.2f}x to {high:.1f}x   H {normalized_entropy(map[None, None]).item():.2f}"


def _mask_caption(mask):
    """The line beneath the overlay of one mask (h, w)."""
    if not mask.isfinite().all():
        return "mask is not finite"
    low, high = mask.min().item(), mask.max().item()
    digits = 2 if high - low >= 0.02 else 4
    return f"{low:.{digits}f}-{high:.{digits}f}  mean {mask.mean().item():.{digits}f}"


def _of_peak(map):
    """An attention map (h, w) in multiples of its maximum; zeros where there is no attention."""
    map = map.nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
    peak = map.max()
    return map / torch.where(peak > 0, peak, 1.0)


def _stretched(mask):
    """A mask (h, w) from its minimum, 0, to its maximum, 1; zeros if they differ by less than can be told."""
    sound = mask.isfinite()
    if not sound.any() or mask[sound].max() - mask[sound].min() < 1e-4:
        return torch.zeros_like(mask)
    low, high = mask[sound].min(), mask[sound].max()
    return (torch.where(sound, mask, low) - low) / (high - low)


def _overlays(cell, maps):
    """uint8 (cell, cell, 3) and maps (h, w) in [0, 1] -> uint8 pictures with each map glowing over the cell."""
    picture = cell.astype(np.float32)
    grey = picture @ np.array((0.299, 0.587, 0.114), np.float32)
    dim = 0.42 * (0.4 * picture + 0.6 * grey[..., None])
    for map in maps:
        # Bicubic passes smoothly through the centres; what it over- and undershoots is nothing that the map
        # says, so it is cut off. antialias matters only where a map is finer than the cell.
        fine = F.interpolate(map[None, None], cell.shape[:2], mode="bicubic", antialias=True)[0, 0].clamp(0, 1)
        level = (fine * 255).round().to(torch.uint8).numpy()
        yield np.minimum(dim * _THROUGH[level] + _HEAT[level], 255).astype(np.uint8)


def _sheet(head, legend, cells, columns, rows):
    """A page with one row per cell: the picture, then its overlays in frames with a caption beneath each.

    head, legend: as in _page. cells: uint8 (B, cell, cell, 3). columns: (heading, its colour, the frame's
    colour, a warning or "") per overlay. rows: (maps in [0, 1], captions) per cell.
    -> (page, lefts of all columns, tops of all rows), those of the pictures without their frames.
    """
    cell, small = cells.shape[1], _font(13)
    texts = [text for heading, _, _, note in columns for text in (heading, note)]
    texts += [caption for _, captions in rows for caption in captions]
    pitch_x = max(cell + 2 * FRAME, *(math.ceil(small.getlength(text)) for text in texts)) + 10
    pitch_y = cell + 2 * FRAME + 34
    # x of the image, then of each map: these stand a little apart from the column of images.
    left = [MARGIN] + [MARGIN + cell + 18 + FRAME + i * pitch_x for i in range(len(columns))]
    over = 58 if any(note for *_, note in columns) else 40  # the px taken by headings
    page, draw, top = _page(head, legend, left[-1] - FRAME + pitch_x - 10 - MARGIN, over + len(cells) * pitch_y)
    tops = [top + over + b * pitch_y for b in range(len(cells))]
    draw.text((MARGIN, top + 29), "image", INK, small, "ls")
    for x, (heading, colour, _, note) in zip(left[1:], columns, strict=True):
        draw.text((x - FRAME, top + 29), heading, colour, small, "ls")
        draw.text((x - FRAME, top + 47), note, WARN, small, "ls")
    for y, picture, (maps, captions) in zip(tops, cells, rows, strict=True):
        page.paste(Image.fromarray(picture), (MARGIN, y))
        for i, overlay in enumerate(_overlays(picture, maps)):
            x = left[i + 1]
            draw.rectangle((x - FRAME, y - FRAME, x + cell + FRAME - 1, y + cell + FRAME - 1), columns[i][2])
            page.paste(Image.fromarray(overlay), (x, y))
            draw.text((x - FRAME, y + cell + FRAME + 16), captions[i], QUIET, small, "ls")
    return page, left, tops


def _page(head, legend, width, body):
    """An empty page with room for width x body px (wider if the head needs that).

    head: (text, colour) parts above; legend: texts below, None being the heat scale.
    -> (page, its ImageDraw, y where the body begins); it begins at x = MARGIN.
    """
    title, small = _font(17), _font(13)
    foot = [(text, QUIET) for text in legend]
    width = max(width, 400 - 2 * MARGIN, *(math.ceil(title.getlength(text)) for text, _ in head))
    head, head_height = _flow(head, title, width, 26)
    foot, foot_height = _flow(foot, small, width, 20)
    height = 2 * MARGIN + head_height + body + 6 + foot_height
    page = Image.new("RGB", (width + 2 * MARGIN, height), PAGE)
    draw = ImageDraw.Draw(page)
    _put(page, draw, head, MARGIN, MARGIN - 6, title)
    _put(page, draw, foot, MARGIN, height - MARGIN - foot_height + 6, small)
    return page, draw, MARGIN + head_height


@lru_cache
def _font(size):
    return ImageFont.load_default(size=size)


def _flow(parts, font, width, gap):
    """Place (text, colour) parts from left to right, beginning a new line where the page ends.

    A text of None is the heat scale. -> ([(x, y, text, colour)], height), relative to the first line.
    """
    placed, x, y, line = [], 0, 0, round(font.size * 1.5)
    for text, colour in parts:
        length = RAMP if text is None else math.ceil(font.getlength(text))
        if x and x + length > width:
            x, y = 0, y + line
        placed.append((x, y, text, colour))
        x += length + gap
    return placed, y + line


def _put(page, draw, placed, left, top, font):
    for x, y, text, colour in placed:
        if text is not None:
            draw.text((left + x, top + y + font.size), text, colour, font, "ls")
            continue
        ramp = _HEAT[np.linspace(0, 255, RAMP).astype(int)].astype(np.uint8)
        page.paste(Image.fromarray(np.tile(ramp, (9, 1, 1))), (left + x, top + y + font.size - 9))


def _dot(page, x, y, radius, colour):
    sprite = _sprite(radius, colour)
    half = sprite.width // 2
    page.paste(sprite, (math.floor(x) - half, math.floor(y) - half), sprite)


@lru_cache
def _sprite(radius, colour):
    """A dot with a white and a black ring, so that it shows on any ground; smoothed by drawing it large."""
    over, half = 8, radius + 3
    size = (2 * half + 1) * over
    sprite, middle = Image.new("RGBA", (size, size)), size / 2
    draw = ImageDraw.Draw(sprite)
    for r, fill in ((radius + 3, (0, 0, 0)), (radius + 1.8, (255, 255, 255)), (radius + 0.3, colour)):
        draw.ellipse([middle - r * over, middle - r * over, middle + r * over, middle + r * over], fill)
    return sprite.reduce(over)


def save_raw(arrays, path):
    """Write {name: tensor} as numbers into one compressed .npz, which `numpy.load` reads. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in arrays.items()}

    def write(temporary):
        with open(temporary, "wb") as file:             # given a name, NumPy would add .npz to it
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)


def save_page(image, path):
    """Write a Pillow picture as PNG, whole or not at all; missing folders are made. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Level 6, Pillow's default, takes up to 2.6 times as long; run lengths suit pages: smaller and faster than level 2.
    write_atomically(path, lambda temporary: image.save(
        temporary, format="PNG", compress_level=2, compress_type=Image.core.RLE))
