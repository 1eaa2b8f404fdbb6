"""Attention, mask and reconstruction sheets. The tests open the PNG and check its pixels."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_grid import flat, noise, read

from gallery import grid, sheets
from gallery.records import DEFAULT_QUERIES


def one_hot(B, Q, h, w, y, x):
    maps = torch.zeros(B, Q, h, w)
    maps[:, :, y, x] = 1
    return maps


def uniform(B, Q, h, w):
    return torch.full((B, Q, h, w), 1 / (h * w))


def write_attention(path, images, maps, queries, gamma=0.5):
    sheets.save_attention(images, maps, queries, path, "g16", 100, gamma, 0.83)
    return read(path)


def runs(flags):
    """[(start, stop)] of the runs of True in a 1-D array."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return list(zip(edges[::2], edges[1::2], strict=True))


def framed(page, colour):
    """[(top, left, size)], from top to bottom, of the areas inside square frames of exactly this colour."""
    same = (page == colour).all(2)
    # Only a frame's top and bottom edges have 128 px of one colour in a row.
    bars = [max(runs(row), key=lambda r: r[1] - r[0], default=(0, 0)) for row in same]
    bars = runs(np.array([b - a >= 128 for a, b in bars]))
    found = []
    for (_, top), (bottom, _) in zip(bars[::2], bars[1::2], strict=True):
        left, right = max(runs(same[top - 1]), key=lambda r: r[1] - r[0])
        thick = top - bars[2 * len(found)][0]
        assert bottom - top == right - left - 2 * thick
        # So do its sides, except where a dot covers them.
        assert same[top:bottom, left].mean() > 0.8 and same[top:bottom, right - 1].mean() > 0.8
        found.append((top, left + thick, bottom - top))
    return found


def side_by_side(page, colour):
    """The number of square frames of exactly this colour in one row."""
    return max(sum(b - a >= 128 for a, b in runs(row)) for row in (page == colour).all(2))


def inside(page, place):
    top, left, size = place
    return page[top : top + size, left : left + size]


def luminance(pixels):
    return pixels @ np.array([0.299, 0.587, 0.114])


def dot_at(pixels, colour):
    """The centre (y, x) of all pixels of exactly this colour; None if there are none."""
    found = np.argwhere((pixels == colour).all(2))
    return found.mean(0) if len(found) else None


class Written(list):
    """[((x, y), words)] of all texts drawn, in order; y is the baseline.

    `lines`: {y: [(left, right) of each text]}.
    """

    def __init__(self):
        super().__init__()
        self.lines = {}


@pytest.fixture
def written(monkeypatch):
    texts = Written()
    text = ImageDraw.ImageDraw.text

    def note(self, xy, words, fill, font, anchor):
        texts.append((xy, words))
        texts.lines.setdefault(xy[1], []).append((xy[0], xy[0] + font.getlength(words)))
        return text(self, xy, words, fill, font, anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    return texts


# ---- entropy ----


def test_entropy_is_one_for_uniform_zero_for_one_hot_and_between_otherwise():
    two_of_sixteen = one_hot(1, 1, 4, 4, 0, 0) / 2 + one_hot(1, 1, 4, 4, 3, 3) / 2
    maps = torch.cat([uniform(1, 1, 4, 4), one_hot(1, 1, 4, 4, 2, 1), two_of_sixteen], 1)
    entropy = sheets.normalized_entropy(maps)
    assert entropy.shape == (1, 3)
    assert torch.allclose(entropy, torch.tensor([[1.0, 0.0, 0.25]]), atol=1e-6)


def test_entropy_of_one_key_of_zeros_and_of_nan_is_zero():
    assert sheets.normalized_entropy(torch.ones(2, 3, 1, 1)).tolist() == [[0] * 3] * 2
    assert sheets.normalized_entropy(torch.zeros(1, 1, 4, 4)).item() == 0
    assert sheets.normalized_entropy(torch.full((1, 1, 4, 4), float("nan"))).item() == 0


# ---- attention ----


@pytest.mark.parametrize("size, cell", [(32, 192), (100, 200), (512, 256)])
def test_every_query_has_a_frame_of_its_colour_around_each_image(tmp_path, size, cell):
    page = write_attention(
        tmp_path / "a.png", noise(2, 3, size, size), uniform(2, 4, 8, 8), DEFAULT_QUERIES[:4]
    )
    frames = [framed(page, colour) for colour in sheets.QUERY_COLOURS[:4]]
    assert all([f[2] for f in column] == [cell, cell] for column in frames)
    tops = [[f[0] for f in column] for column in frames]
    assert tops.count(tops[0]) == 4 and tops[0][0] < tops[0][1]  # same rows, one per image
    lefts = [column[0][1] for column in frames]
    assert lefts == sorted(set(lefts)) and all(a[1] == b[1] for a, b in frames)


def test_the_class_of_each_image_stands_below_it(tmp_path, written):
    images, names = noise(2, 3, 64, 64), ("glassés", "w" * 300)
    sheets.save_attention(images, uniform(2, 1, 8, 8), DEFAULT_QUERIES[:1], tmp_path / "a.png", "g16", 1, 0.5, 1, names)
    sheets.save_masks(images, {"slae8": uniform(2, 1, 8, 8)}, tmp_path / "m.png", "fastgan", 1, names)
    below = [(y, words) for (x, y), words in written if x == grid.MARGIN and words.startswith(("glasses", "ww"))]
    assert [words for _, words in below[::2]] == ["glasses"] * 2 and below[0][0] < below[1][0]
    assert all(words.endswith("...") and len(words) < 40 for _, words in below[1::2]), "cut to the image's width"


@pytest.mark.parametrize("ground", [-1.0, 0.0, 1.0])
def test_dots_have_the_right_colour_at_the_right_place(tmp_path, ground):
    queries = [(0.25, 0.75), (0.5, 0.1), (0.9, 0.4)]
    images = torch.full((1, 3, 64, 64), ground)
    page = write_attention(tmp_path / "a.png", images, uniform(1, 3, 8, 8), queries)
    colours = sheets.QUERY_COLOURS[:3]
    places = [framed(page, colour)[0] for colour in colours]
    first = (places[0][0], grid.MARGIN, places[0][2])  # the image starts at the margin
    for (y, x), colour, place in zip(queries, colours, places, strict=True):
        for spot in (first, place):
            pixels, size = inside(page, spot), spot[2]
            assert np.abs(dot_at(pixels, colour) - (y * size, x * size)).max() <= 1
            # White and black rings around it make it visible on any background.
            near = pixels[int(y * size) - 8 : int(y * size) + 9, int(x * size) - 8 : int(x * size) + 9]
            assert near.min(2).max() > 225 and near.max(2).min() < 30
        others = set(colours) - {colour}
        assert all(dot_at(inside(page, place), other) is None for other in others)


def test_a_dot_in_the_very_corner_is_whole(tmp_path):
    page = write_attention(tmp_path / "a.png", noise(1, 3, 64, 64), uniform(1, 2, 4, 4), [(0.5, 0.5), (0, 0)])
    dots = page[:, : grid.MARGIN + 192]
    sizes = [(dots == colour).all(2).sum() for colour in sheets.QUERY_COLOURS[:2]]
    assert sizes[0] == sizes[1] > 40


def test_the_first_column_is_the_untouched_image(tmp_path):
    images = noise(1, 3, 64, 64)
    page = write_attention(tmp_path / "a.png", images, uniform(1, 1, 8, 8), [(0.9, 0.9)])
    top, _, size = framed(page, sheets.QUERY_COLOURS[0])[0]
    shown = inside(page, (top, grid.MARGIN, size))[1::3, 1::3]
    assert (shown[:50] == grid.to_uint8(images)[0, :50]).all()


@pytest.mark.parametrize(
    "h, w, y, x", [(4, 4, 0, 3), (64, 64, 40, 50), (4, 8, 1, 6)]
)
def test_the_overlay_is_brightest_where_the_map_peaks(tmp_path, h, w, y, x):
    page = write_attention(tmp_path / "a.png", noise(1, 3, 64, 64), one_hot(1, 1, h, w, y, x), [(0.98, 0.02)])
    light = luminance(inside(page, framed(page, sheets.QUERY_COLOURS[0])[0]))
    size = len(light)
    light[-16:, :16] = 0  # the query's own dot
    peak_y, peak_x = np.unravel_index(light.argmax(), light.shape)
    assert y / h <= peak_y / size < (y + 1) / h and x / w <= peak_x / size < (x + 1) / w
    # Far from the peak the image is dimmed, without heat.
    far = np.abs(np.arange(size)[:, None] / size - (y + 0.5) / h) > 2.1 / h
    assert light[np.broadcast_to(far, light.shape)].max() < 110


@pytest.mark.parametrize("ground", [-1.0, 0.0, 1.0])
def test_more_attention_is_never_darker(tmp_path, ground):
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
    page = write_attention(
        tmp_path / "a.png", torch.full((1, 3, 64, 64), ground), ramp / ramp.sum(), [(0.98, 0.02)]
    )
    line = luminance(inside(page, framed(page, sheets.QUERY_COLOURS[0])[0])[10])
    assert (np.diff(line) >= -1).all()  # rounding to uint8
    assert line[-1] - line[0] > 100


def test_a_map_is_measured_by_its_own_maximum_and_belongs_to_its_own_image(tmp_path):
    left, right = one_hot(1, 1, 8, 8, 4, 0), one_hot(1, 1, 8, 8, 4, 7)
    maps = torch.cat([torch.cat([left, right], 1), torch.cat([right, left], 1)])
    maps[0, 0] *= 0.01  # much weaker, but drawn equally bright
    page = write_attention(tmp_path / "a.png", torch.zeros(2, 3, 64, 64), maps, [(0.05, 0.5), (0.05, 0.5)])
    for i, expected in ((0, [0, 1]), (1, [1, 0])):
        for place, side in zip(framed(page, sheets.QUERY_COLOURS[i]), expected, strict=True):
            light = luminance(inside(page, place))[40:]
            halves = light[:, :96].max(), light[:, 96:].max()
            assert halves[side] > 180 > 100 > halves[1 - side]


def test_every_row_shows_its_own_image_and_attention_does_not_bury_it(tmp_path):
    images = torch.full((2, 3, 64, 64), -1.0)
    images[0, :, :, 32:] = images[1, :, :, :32] = 1
    page = write_attention(tmp_path / "a.png", images, uniform(2, 1, 8, 8), [(0.05, 0.5)])
    for (top, left, size), sign in zip(framed(page, sheets.QUERY_COLOURS[0]), (1, -1), strict=True):
        for x in (grid.MARGIN, left):
            light = luminance(inside(page, (top, x, size)))[40:]
            assert sign * (light[:, 96:] - light[:, :96]).min() > 30


def test_one_broken_key_does_not_hide_the_others(tmp_path):
    maps = one_hot(1, 1, 8, 8, 6, 6) / 4
    maps[0, 0, 0, 0] = float("nan")
    page = write_attention(tmp_path / "a.png", torch.zeros(1, 3, 64, 64), maps, [(0.05, 0.5)])
    light = luminance(inside(page, framed(page, sheets.QUERY_COLOURS[0])[0]))
    assert light[144:168, 144:168].max() > 180 > 100 > light[:24, :24].max()


def test_beneath_each_overlay_stand_its_peak_and_its_entropy(tmp_path, written):
    two = one_hot(1, 1, 4, 4, 0, 0) / 2 + one_hot(1, 1, 4, 4, 3, 3) / 2
    maps = torch.cat([uniform(1, 1, 4, 4), one_hot(1, 1, 4, 4, 2, 1), two, two / 0 * 0], 1)
    page = write_attention(tmp_path / "a.png", noise(1, 3, 64, 64), maps, DEFAULT_QUERIES[:4])
    expected = ["1.00x to 1.0x   H 1.00", "0.00x to 16.0x   H 0.00", "0.00x to 8.0x   H 0.25", "map is not finite"]
    for colour, words in zip(sheets.QUERY_COLOURS, expected, strict=False):
        top, left, size = framed(page, colour)[0]
        [(x, y)] = [xy for xy, w in written if w == words]
        assert left - 6 <= x <= left and top + size < y < top + size + 30


def header(page):
    """The pixels above the column of images."""
    return page[: framed(page, sheets.QUERY_COLOURS[0])[0][0] - 30]


def test_the_header_warns_when_the_map_has_no_effect_or_no_structure(tmp_path):
    images, queries = torch.zeros(1, 3, 64, 64), DEFAULT_QUERIES

    def warns(gamma, entropy=0.83):
        sheets.save_attention(images, uniform(1, 5, 4, 4), queries, tmp_path / "a.png", "g16", 100, gamma, entropy)
        page = read(tmp_path / "a.png")
        return (header(page) == grid.WARN).all(2).sum() > 20

    assert warns(0.0) and warns(-0.0049) and warns(torch.nn.Parameter(torch.zeros(1)))
    assert not warns(0.0051) and not warns(-0.3) and not warns(float("nan"))
    assert warns(0.3, 0.985) and not warns(0.3, 0.975)


@pytest.mark.parametrize("Q", [1, 2, 3, 5])
def test_frames_of_a_film_are_alike_whether_the_header_warns_or_not(Q):
    sizes = {sheets.attention_sheet(torch.zeros(1, 3, 64, 64), uniform(1, Q, 4, 4), DEFAULT_QUERIES[:Q], "g16", 1, 0.5,
                                    entropy).size for entropy in (0.5, 0.99)}
    assert len(sizes) == 1


def test_the_header_changes_with_what_it_says(tmp_path):
    images, maps, queries = torch.zeros(1, 3, 64, 64), uniform(1, 5, 4, 4), DEFAULT_QUERIES

    def shown(layer="g16", step=100, gamma=0.5, entropy=0.83, maps=maps):
        sheets.save_attention(images, maps, queries, tmp_path / "a.png", layer, step, gamma, entropy)
        return header(read(tmp_path / "a.png")).tobytes()

    heads = [shown(), shown(layer="g32"), shown(step=200), shown(gamma=-0.5), shown(entropy=0.1)]
    heads.append(shown(maps=uniform(1, 5, 8, 8)))
    assert len(set(heads)) == len(heads) and shown() == heads[0]


@pytest.mark.parametrize("Q, size", [(1, 130), (8, 32), (9, 32)])
def test_one_to_eight_queries_and_all_text_fit_on_the_page(tmp_path, Q, size):
    queries = [(0.5, (i + 1) / 12) for i in range(Q)]
    page = write_attention(
        tmp_path / "a.png", noise(1, 3, size, size), uniform(1, Q, 4, 4), queries, gamma=0.0
    )
    for edge in (page[:12], page[-12:], page[:, :20], page[:, -20:]):
        assert (edge == grid.BACKGROUND).all()
    assert sum(side_by_side(page, colour) for colour in sheets.QUERY_COLOURS) == Q, "of nine, one colour has two"


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_diverged_run_still_gives_its_overlay(tmp_path, bad):
    images, maps = noise(2, 3, 64, 64), uniform(2, 2, 8, 8)
    images[0], maps[0] = bad, bad
    maps[1, 1] = 0
    with np.errstate(all="raise"):
        page = write_attention(tmp_path / "a.png", images, maps, [(0.9, 0.9), (0.2, 0.2)], gamma=bad)
    grey = inside(page, (framed(page, sheets.QUERY_COLOURS[0])[0][0], grid.MARGIN, 192))[100, 100]
    assert grey.tolist() == [128 if np.isnan(bad) else 255 if bad > 0 else 0] * 3
    empty = framed(page, sheets.QUERY_COLOURS[1])[1]
    assert luminance(inside(page, empty)).mean() < 110  # no attention: only the dimmed image


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    for B, Q, points in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        with pytest.raises(ValueError, match="do not fit"):
            sheets.save_attention(
                torch.zeros(1, 3, 64, 64), uniform(B, Q, 4, 4), [(0.5, 0.5)] * points, tmp_path / "a.png",
                "g16", 1, 0.0, 1.0,
            )  # fmt: skip
    assert not list(tmp_path.iterdir())


# ---- masks ----


def hill(B, h, w, y, x, low=0.48, high=0.53):
    """Masks that are `low` everywhere except at one place."""
    masks = torch.full((B, 1, h, w), low)
    masks[:, :, y, x] = high
    return masks


def write_masks(path, images, masks, title="fastgan"):
    sheets.save_masks(images, masks, path, title, 100)
    return read(path)


def mask_places(page):
    """[[(top, left, size) per layer] per image] of the areas inside the frames."""
    same = (page == grid.EDGE).all(2)
    return [
        [(top, a + grid.FRAME, size) for a, b in runs(same[top - 1]) if b - a >= 128]
        for top, _, size in framed(page, grid.EDGE)
    ]


def quarters(pixels):
    """The brightest pixel of the upper left, upper right, lower left and lower right quarter."""
    half, light = len(pixels) // 2, luminance(pixels)
    return [light[y : y + half, x : x + half].max() for y in (0, half) for x in (0, half)]


def colourful(pixels):
    return (pixels.max(2) - pixels.min(2)).max() > 10


@pytest.mark.parametrize(("size", "h", "corner"), [(64, 4, 0), (64, 4, 1), (64, 8, 2), (64, 256, 3), (256, 8, 1)])
def test_a_mask_glows_where_it_is_largest_however_little_it_varies(tmp_path, size, h, corner):
    depth = max(1, h // 16)
    y, x = (slice(h - depth, h) if far else slice(depth) for far in divmod(corner, 2))
    page = write_masks(tmp_path / "m.png", torch.zeros(1, 3, size, size), {"slae8": hill(1, h, h, y, x)})
    pixels = inside(page, mask_places(page)[0][0])
    for other in range(4):
        y, x = (slice(-8, None) if far else slice(8) for far in divmod(other, 2))
        spot = pixels[y, x]
        assert luminance(spot).min() > 180 if other == corner else luminance(spot).max() < 80
        assert colourful(spot) == (other == corner)


def test_every_image_and_every_layer_has_its_own_place(tmp_path):
    images = flat([60, 200], 64)
    spots = [[(0, 0), (0, 7), (7, 0)], [(7, 7), (7, 0), (0, 0)]]  # per image and layer
    masks = {
        name: torch.cat([hill(1, 8, 8, *spots[b][i]) for b in range(2)])
        for i, name in enumerate(("slae8", "slae16", "slae32"))
    }
    page = write_masks(tmp_path / "m.png", images, masks)
    places = mask_places(page)
    assert [len(row) for row in places] == [3, 3]
    for b, row in enumerate(places):
        shown = inside(page, (row[0][0], grid.MARGIN, row[0][2]))
        assert (shown == (60, 200)[b]).all()  # the first column is the unmodified image
        assert [p[1] for p in row] == sorted(p[1] for p in row)
        for place, (y, x) in zip(row, spots[b], strict=True):
            light = quarters(inside(page, place))
            assert int(np.argmax(light)) == 2 * (y // 7) + x // 7 and sorted(light)[-2] < 110 < 180 < max(light)


def test_the_picture_shows_through_its_mask(tmp_path):
    images = torch.full((1, 3, 64, 64), -1.0)
    images[:, :, :, 32:] = 1
    page = write_masks(tmp_path / "m.png", images, {"slae4": torch.linspace(0.2, 0.8, 4).view(1, 1, 4, 1)})
    light = luminance(inside(page, mask_places(page)[0][0]))
    assert (light[:, 100:] - light[:, 92:93]).min() > 30


@pytest.mark.parametrize(("level", "spread"), [(0.0, 0.0), (1.0, 0.0), (0.5, 5e-5)])
def test_a_constant_mask_adds_no_heat(tmp_path, level, spread):
    mask = torch.full((1, 1, 8, 8), level)
    mask[0, 0, 3, 3] -= spread
    with np.errstate(all="raise"):
        page = write_masks(tmp_path / "m.png", flat([200], 64), {"slae8": mask, "slae16": hill(1, 8, 8, 0, 0)})
    constant, other = (inside(page, place) for place in mask_places(page)[0])
    assert not colourful(constant) and constant.max() < 100 and constant.min() == constant.max() > 20
    assert colourful(other)


def test_captions_tell_the_true_range_and_headings_the_layer(tmp_path, written):
    two = hill(2, 4, 4, 0, 0)  # mean 0.483125
    two[1] = 0.5
    wide = torch.cat([hill(1, 2, 3, 1, 2, 0.1, 0.7), hill(1, 2, 3, 1, 2, 0.5, 0.506)])
    page = write_masks(tmp_path / "m.png", noise(2, 3, 64, 64), {"slae4": two, "slae_odd": wide})
    expected = [
        ["0.48-0.53  mean 0.48", "0.10-0.70  mean 0.20"],
        ["0.5000-0.5000  mean 0.5000", "0.5000-0.5060  mean 0.5010"],
    ]
    places = mask_places(page)
    for row, captions in zip(places, expected, strict=True):
        for (top, left, size), words in zip(row, captions, strict=True):
            [(x, y)] = [xy for xy, w in written if w == words]
            assert left - 6 <= x <= left and top + size < y < top + size + 30
    for (top, left, _), words in zip(places[0], ("slae4  4x4", "slae_odd  2x3"), strict=True):
        [(x, y)] = [xy for xy, w in written if w == words]
        assert left - 6 <= x <= left and top - 60 < y < top


def test_a_layer_that_hardly_varies_is_warned_of_above_its_column(tmp_path):
    apart = torch.cat([torch.full((1, 1, 4, 4), 0.3), torch.full((1, 1, 4, 4), 0.6)])  # constant each
    masks = {
        "slae4": hill(2, 4, 4, 0, 0, 0.5, 0.56),
        "slae8": hill(2, 8, 8, 0, 0, 0.5, 0.54),
        "slae16": apart,
        "slae32": torch.full((2, 1, 4, 4), 0.5),
    }
    page = write_masks(tmp_path / "m.png", noise(2, 3, 64, 64), masks)
    places = mask_places(page)[0]
    warm = (page == grid.WARN).all(2)
    above = [warm[: top - 5, left - 5 : left + size].sum() > 20 for top, left, size in places]
    assert above == [False, True, False, True]
    assert warm[: places[0][0]].sum() == warm.sum()  # and nowhere else
    del masks["slae8"], masks["slae32"]
    assert not (write_masks(tmp_path / "m.png", noise(2, 3, 64, 64), masks) == grid.WARN).all(2).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_run_still_gives_its_masks(tmp_path, written, bad):
    images = flat([255, 255], 64).clone()
    images[0] = bad
    broken = hill(2, 8, 8, 7, 7)
    broken[0], broken[1, 0, 0, 0] = bad, bad
    masks = {"slae8": broken, "slae16": hill(2, 8, 8, 0, 7)}
    with np.errstate(all="raise"):
        page = write_masks(tmp_path / "m.png", images, masks)
    places = mask_places(page)
    grey = inside(page, (places[0][0][0], grid.MARGIN, 192))[100, 100]
    assert grey.tolist() == [128 if np.isnan(bad) else 255 if bad > 0 else 0] * 3
    assert not colourful(inside(page, places[0][0]))
    light = quarters(inside(page, places[1][0]))  # one non-finite place does not hide the others
    assert light[3] > 180 > 120 > max(light[:3])
    assert [w for _, w in written].count("mask is not finite") == 2
    assert [w for _, w in written].count("0.48-0.53  mean 0.48") == 2
    assert not any(w == "nearly constant" for (x, _), w in written if x < places[0][1][1] - 9)


def test_the_legend_explains_the_heat(tmp_path, written):
    page = write_masks(tmp_path / "m.png", torch.full((1, 3, 64, 64), -1.0), {"slae8": hill(1, 8, 8, 0, 0)})
    top, left, size = mask_places(page)[0][0]
    foot = page[top + size + 30 :]
    # Over a black image only the heat is visible. The legend's scale runs from black to the colour of the peak.
    hottest = page[top, left]
    assert hottest.min() > 80 and (foot == hottest).all(2).any() and (foot == 0).all(2).any()
    words = " ".join(w for (_, y), w in written if y > top + size + 30)
    assert "least" in words and "most" in words and "multiplies the features" in words


def test_the_head_of_the_masks_names_the_run_and_the_step(tmp_path):
    images, masks = torch.zeros(1, 3, 64, 64), {"slae8": hill(1, 8, 8, 0, 0)}

    def head(title, step):
        sheets.save_masks(images, masks, tmp_path / "m.png", title, step)
        page = read(tmp_path / "m.png")
        return page[: mask_places(page)[0][0][0] - 60].tobytes()

    assert len({head("a", 1), head("b", 1), head("a", 2)}) == 3


@pytest.mark.parametrize("layers, size, name", [
    (1, 64, "slae8"), (3, 130, "slae8"), (6, 64, "a_layer_with_a_rather_long_name"),
    (1, 256, "a_layer_with_a_rather_long_name"),
])
def test_masks_of_one_to_six_layers_and_all_text_fit_on_the_page(tmp_path, written, layers, size, name):
    masks = {f"{name}{i}": hill(2, 4, 4, 0, 0, 0.5, 0.503) for i in range(layers)}
    page = write_masks(tmp_path / "m.png", noise(2, 3, size, size), masks, title="a title " * 8)
    for edge in (page[:12], page[-12:], page[:, :20], page[:, -20:]):
        assert (edge == grid.BACKGROUND).all()
    places = mask_places(page)
    assert [len(row) for row in places] == [layers] * 2
    # Texts on one line do not overlap.
    for y, spans in written.lines.items():
        if y > places[0][0][0] - 50:
            spans = sorted(spans)
            assert all(a[1] < b[0] for a, b in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize(
    "images, masks",
    [
        ((2, 3, 64, 64), {}),
        ((0, 3, 64, 64), {"a": (0, 1, 4, 4)}),
        ((2, 3, 64, 64), {"a": (1, 1, 4, 4)}),
        ((2, 3, 64, 64), {"a": (2, 1, 4, 4), "b": (2, 3, 4, 4)}),
        ((2, 3, 64, 64), {"a": (2, 4, 4)}),
        ((2, 3, 64, 64), {"a": (2, 1, 0, 4)}),
        ((2, 2, 64, 64), {"a": (2, 1, 4, 4)}),
        ((3, 64, 64), {"a": (3, 1, 4, 4)}),
        ((), {"a": (1, 1, 4, 4)}),
    ],
)
def test_masks_of_shapes_that_do_not_fit_are_refused(tmp_path, images, masks):
    masks = {name: torch.zeros(shape) for name, shape in masks.items()}
    with pytest.raises(ValueError, match="do not fit"):
        sheets.save_masks(torch.zeros(images), masks, tmp_path / "m.png", "fastgan", 1)
    assert not list(tmp_path.iterdir())


# ---- reconstructions ----


def write_rows(path, rows, title="fastgan", step=100):
    sheets.save_reconstructions(rows, path, title, step)
    return read(path)


def box(page, level):
    """(top, left, height, width) of the only rectangle of exactly this grey."""
    same = (page == level).all(2)
    [(top, bottom)] = [r for r in runs(same.sum(1) >= 32)]
    [(left, right)] = [r for r in runs(same[top:bottom].sum(0) >= 32)]
    assert same[top:bottom, left:right].all()
    return top, left, bottom - top, right - left


def test_each_row_stands_in_its_place_beneath_its_label(tmp_path, written):
    levels = [[50, 60, 70], [80, 90, 100], [110, 120, 130], [140, 161, 171]]
    sizes = (32, 64, 16, 24)  # all shown at one size
    rows = {f"row {i}": flat(row, size) for i, (row, size) in enumerate(zip(levels, sizes, strict=True))}
    page = write_rows(tmp_path / "r.png", rows)
    boxes = [[box(page, level) for level in row] for row in levels]
    assert {b[2:] for row in boxes for b in row} == {(192, 192)}
    lefts = [b[1] for b in boxes[0]]
    assert lefts[0] == grid.MARGIN and np.diff(lefts).min() > 192 and np.diff(lefts).max() < 200
    floor = 0
    for i, row in enumerate(boxes):
        assert [b[1] for b in row] == lefts and len({b[0] for b in row}) == 1
        [(x, y)] = [xy for xy, words in written if words == f"row {i}"]
        assert x == grid.MARGIN and floor < y - 13 < y < row[0][0] < y + 20  # nearer to its own row
        floor = row[0][0] + 192
    assert not (page == grid.WARN).all(2).any()


def test_small_rows_become_blocks_of_the_size_of_the_largest(tmp_path):
    small, large = noise(2, 3, 32, 32), noise(2, 3, 64, 64, seed=1)
    page = write_rows(tmp_path / "r.png", {"small": small, "large": large, "mark": flat([77, 78], 64)})
    top, left, size, _ = box(page, 77)
    pitch = box(page, 78)[1] - left
    for up, images, zoom in ((2, small, 6), (1, large, 3)):
        y = top - up * (size + 38)
        for i in range(2):
            shown = page[y : y + size, left + i * pitch : left + i * pitch + size]
            assert (shown == grid.to_uint8(images)[i].repeat(zoom, 0).repeat(zoom, 1)).all()


@pytest.mark.parametrize("size, cell", [(8, 192), (128, 128), (256, 230)])
def test_eight_columns_fit_on_a_screen(tmp_path, size, cell):
    page = write_rows(tmp_path / "r.png", {"real": flat([40 + i for i in range(8)], size)})
    assert page.shape[1] <= 1920
    assert {box(page, 40 + i)[2:] for i in range(8)} == {(cell, cell)}
    few = write_rows(tmp_path / "r.png", {"real": flat([90], size)})
    assert box(few, 90)[2] == (256 if size > 64 else cell)
    for edge in (page[:12], page[-12:], page[:, :20], page[:, -20:]):
        assert (edge == grid.BACKGROUND).all()


def test_what_is_not_square_keeps_its_shape_in_the_middle_of_its_cell(tmp_path):
    wide = flat([200], 64)[:, :, :32]
    tall, odd = flat([190], 64)[..., :16], flat([180], 50)[..., :25]  # 50 does not divide the cell
    rows = {"mark": flat([80], 64), "wide": wide, "tall": tall, "odd": odd}
    page = write_rows(tmp_path / "r.png", rows)
    top, left, size, _ = box(page, 80)
    step = size + 38
    assert box(page, 200) == (top + step + size // 4, left, size // 2, size)
    assert box(page, 190) == (top + 2 * step, left + 3 * size // 8, size, size // 4)
    assert box(page, 180) == (top + 3 * step, left + size // 4, size, size // 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_drawn_and_says_so(tmp_path, bad):
    broken = flat([80, 90], 32).clone()
    broken[1] = bad
    page = write_rows(tmp_path / "r.png", {"real": flat([50, 60], 32), "from the map": broken})
    assert (page == (128 if np.isnan(bad) else 255 if bad > 0 else 0)).all(2).sum() >= 192 * 192
    first, second = box(page, 50), box(page, 80)
    warm = np.flatnonzero((page == grid.WARN).all(2).any(1))
    assert first[0] + 192 < warm.min() and warm.max() < second[0]


def test_long_labels_and_titles_fit_on_the_page(tmp_path):
    label = "from that quadrant of the 16x16 map, which is a rather long label for a row of one picture"
    nan = torch.full((1, 3, 32, 32), float("nan"))
    for rows, title in (({label: nan}, "fastgan"), ({"real": nan}, "a title " * 10)):
        page = write_rows(tmp_path / "r.png", rows, title)
        assert (page[:, -20:] == grid.BACKGROUND).all()


def test_labels_are_in_letters_that_the_font_has_and_no_wider_than_the_pictures(tmp_path, written):
    for width, count in ((352, 1), (3 * 192 + 2 * 4, 3)):
        rows = {"猫 für Zoë " + "w" * 200: flat([50] * count, 32)}
        sheets.save_reconstructions(rows, tmp_path / "r.png", "projection", 1)
        (label,) = [words for _, words in written if words.startswith("? fur Zoe www")]
        assert label.endswith("...") and width - 20 < grid.find_font(13).getlength(label) <= width
        assert read(tmp_path / "r.png").shape[1] == width + 2 * grid.MARGIN
        del written[:]


def test_the_head_of_the_reconstructions_names_the_run_and_the_step(tmp_path):
    rows = {"real": flat([50], 32)}
    heads = {write_rows(tmp_path / "r.png", rows, *w)[:40].tobytes() for w in (("a", 1), ("b", 1), ("a", 2))}
    assert len(heads) == 3


def strip(page, top, left, width=192, height=14):
    """How many pixels beneath a picture differ from the background."""
    part = page[top:top + height, left:left + width]
    return (np.abs(part - grid.BACKGROUND).max(2) > 40).sum()


def test_captions_stand_beneath_the_pictures_of_their_row(tmp_path, written):
    levels = [[50, 60, 70], [80, 90, 100], [110, 120, 130]]
    rows = {f"row {i}": flat(row, 32) for i, row in enumerate(levels)}
    captions = {"row 1": ["0.25", "", "a third"]}
    sheets.save_reconstructions(rows, tmp_path / "r.png", "fastgan", 1, captions)
    page = read(tmp_path / "r.png")
    boxes = [[box(page, level) for level in row] for row in levels]
    under = [[strip(page, top + size + 3, left) for top, left, size, _ in row] for row in boxes]
    assert under[1][0] > 10 and under[1][1] == 0 and under[1][2] > under[1][0]
    # beneath the other rows there is at most the next row's label, in the first column
    assert under[0][1:] == [0, 0] and under[2] == [0, 0, 0]
    assert [words for _, words in written if words in ("0.25", "a third")] == ["0.25", "a third"]
    for (x, y), words in written:
        if words in ("0.25", "a third"):
            top, left, size, _ = boxes[1][0 if words == "0.25" else 2]
            assert x == left and top + size + 8 < y < top + size + 24
    [label] = [y for (_, y), words in written if words == "row 2"]
    [caption] = [y for (_, y), words in written if words == "0.25"]
    assert label - 13 - caption > boxes[2][0][0] - label > 0, "the next label is nearer to its own row"
    sheets.save_reconstructions(rows, tmp_path / "none.png", "fastgan", 1)
    assert read(tmp_path / "none.png").shape[0] < page.shape[0]


def test_captions_of_the_last_row_stay_clear_of_the_legend(tmp_path, written):
    rows = {"a": flat([50], 32), "b": flat([60], 32)}
    sheets.save_reconstructions(rows, tmp_path / "r.png", "fastgan", 1, {"a": ["1.00"], "b": ["2.00"]}, "the legend")
    page = read(tmp_path / "r.png")
    places = {words: y for (_, y), words in written}
    assert places["b"] - places["1.00"] > 14 and places["the legend"] - places["2.00"] > 14
    assert places["the legend"] < page.shape[0] - 4


def test_texts_beside_narrow_pictures_neither_overlap_nor_end_at_the_edge(tmp_path, written):
    def check(name):
        assert (np.abs(read(tmp_path / name)[:, -12:] - grid.BACKGROUND).max(2) < 40).all(), "nothing is cut off"
        for texts in map(sorted, written.lines.values()):
            assert all(right <= left for (_, right), (left, _) in zip(texts, texts[1:], strict=False))
        written.lines.clear()

    narrow = torch.zeros(2, 3, 64, 16)
    sheets.save_reconstructions({"a": narrow}, tmp_path / "r.png", "t", 1, {"a": ["a long caption, 0.25"] * 2},
                                "a legend that is a good deal wider than the pictures are, and than their title, too")
    check("r.png")
    write_masks(tmp_path / "m.png", narrow, {"slae4": hill(2, 4, 4, 0, 0), "slae8": hill(2, 4, 4, 0, 0, 0.5, 0.51)})
    check("m.png")


def test_columns_of_narrow_pictures_stay_where_they_are_whatever_their_captions(tmp_path):
    sizes = {sheets.mask_sheet(torch.zeros(1, 3, 64, 16), {"slae4": hill(1, 4, 4, 0, 0, *levels)}, "t", 1).size
             for levels in ((0.5, 0.5), (0.5, 0.51), (0.0, 0.9))}
    assert len(sizes) == 1, "else a film would jump"


def test_the_legend_says_what_is_asked(tmp_path, written):
    rows = {"real": flat([50], 32)}
    write_rows(tmp_path / "r.png", rows)
    assert "each column belongs to one image" in [words for _, words in written]
    del written[:]
    sheets.save_reconstructions(rows, tmp_path / "r.png", "fastgan", 1, legend="numbers are LPIPS")
    assert "numbers are LPIPS" in [words for _, words in written]
    assert "each column belongs to one image" not in [words for _, words in written]


def test_without_a_step_none_is_written(tmp_path, written):
    write_rows(tmp_path / "r.png", {"real": flat([50], 32)}, step=0)
    assert "step 0" in [words for _, words in written]
    del written[:]
    write_rows(tmp_path / "r.png", {"real": flat([50], 32)}, step=None)
    words = [words for _, words in written]
    assert "fastgan" in words and not any("step" in text or "None" in text for text in words)


@pytest.mark.parametrize(
    "shapes",
    [
        [],
        [(0, 3, 8, 8)],
        [(2, 3, 8, 8), (3, 3, 8, 8)],
        [(2, 3, 8, 8), (2, 2, 8, 8)],
        [(2, 3, 8, 8), (2, 3, 0, 8)],
        [(3, 8, 8)],
        [()],
    ],
)
def test_reconstructions_of_shapes_that_do_not_fit_are_refused(tmp_path, shapes):
    with pytest.raises(ValueError, match="save_reconstructions"):
        write_rows(tmp_path / "r.png", {str(i): torch.zeros(shape) for i, shape in enumerate(shapes)})
    assert not list(tmp_path.iterdir())


# ---- files ----


def draw_grid(path, level=200):
    grid.save_grid(flat([level], 64), path)


def draw_attention(path, level=200):
    write_attention(path, flat([level], 64), uniform(1, 1, 4, 4), [(0.5, 0.5)])


def draw_masks(path, level=200):
    sheets.save_masks(flat([level], 64), {"slae8": hill(1, 8, 8, 0, 0)}, path, "fastgan", 1)


def draw_rows(path, level=200):
    sheets.save_reconstructions({"real": flat([level], 64)}, path, "fastgan", 1)


DRAWERS = [draw_grid, draw_attention, draw_masks, draw_rows]


@pytest.mark.parametrize("draw", DRAWERS)
def test_missing_folders_are_made_and_nothing_else_is_left(tmp_path, draw):
    path = tmp_path / "samples" / "v1" / "picture.png"
    draw(str(path))
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]


@pytest.mark.parametrize(("draw", "error"), [
    *((draw, OSError(28, "No space left on device")) for draw in DRAWERS), (draw_rows, KeyboardInterrupt())])
def test_a_write_that_fails_half_way_leaves_the_old_picture(tmp_path, monkeypatch, draw, error):
    path = tmp_path / "picture.png"
    draw(path)
    before = path.read_bytes()

    def break_off(image, target, *args, **kwargs):
        with open(target, "wb") as file:
            file.write(b"half a picture")
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(Image.Image, "save", break_off)
        draw(path, level=90)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["picture.png"]
    draw(path, level=90)
    assert path.read_bytes() != before
