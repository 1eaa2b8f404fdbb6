"""What a reader of a run's pictures can see in them: every check below opens the PNG and looks at pixels."""

import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import gallery


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image).astype(int)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def one_hot(B, Q, h, w, y, x):
    maps = torch.zeros(B, Q, h, w)
    maps[:, :, y, x] = 1
    return maps


def uniform(B, Q, h, w):
    return torch.full((B, Q, h, w), 1 / (h * w))


def write_attention(path, images, maps, queries, gamma=0.5):
    gallery.save_attention(images, maps, queries, path, "g16", 100, gamma, 0.83)
    return read(path)


def runs(flags):
    """[(start, stop)] of the stretches of True in a 1-D array."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return list(zip(edges[::2], edges[1::2], strict=True))


def framed(page, colour):
    """[(top, left, size)], downwards, of the insides of the square frames of exactly this colour."""
    same = (page == colour).all(2)
    # Only a frame's upper and lower bars hold 128 px of one colour side by side.
    bars = [max(runs(row), key=lambda r: r[1] - r[0], default=(0, 0)) for row in same]
    bars = runs(np.array([b - a >= 128 for a, b in bars]))
    found = []
    for (_, top), (bottom, _) in zip(bars[::2], bars[1::2], strict=True):
        left, right = max(runs(same[top - 1]), key=lambda r: r[1] - r[0])
        thick = top - bars[2 * len(found)][0]
        assert bottom - top == right - left - 2 * thick
        # The sides as well, but where a dot lies over them.
        assert same[top:bottom, left].mean() > 0.8 and same[top:bottom, right - 1].mean() > 0.8
        found.append((top, left + thick, bottom - top))
    return found


def inside(page, place):
    top, left, size = place
    return page[top : top + size, left : left + size]


def luminance(pixels):
    return pixels @ np.array([0.299, 0.587, 0.114])


def dot_at(pixels, colour):
    """The centre (y, x) of all pixels of exactly this colour, None without any."""
    found = np.argwhere((pixels == colour).all(2))
    return found.mean(0) if len(found) else None


@pytest.fixture
def written(monkeypatch):
    """[((x, y), words)] of all the text that is drawn, in order; y is the line that the letters stand on."""
    texts = []
    text = ImageDraw.ImageDraw.text

    def note(self, xy, words, *args, **kwargs):
        texts.append((xy, words))
        return text(self, xy, words, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    return texts


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "imsize, side", [(32, 8), (64, 8), (65, 6), (128, 6), (256, 4), (512, 3), (1024, 2), (2048, 2)]
)
def test_the_grid_has_fewer_pictures_the_larger_they_are(imsize, side):
    assert gallery.grid_side(imsize) == side


def test_every_byte_survives_the_way_to_minus_one_to_one_and_back():
    bytes_ = torch.arange(256).repeat(3, 1).view(1, 3, 16, 16)
    images = gallery.to_uint8(bytes_ / 127.5 - 1)
    assert images.dtype == np.uint8 and images.shape == (1, 16, 16, 3)
    assert (images[0, :, :, 0].ravel() == np.arange(256)).all()


def test_levels_are_rounded_and_clamped_and_nan_is_grey():
    values = torch.tensor([-7.0, 7.0, float("-inf"), float("inf"), 0.9 / 127.5 - 1, 0.4 / 127.5 - 1])
    images = gallery.to_uint8(values.view(1, 1, 1, 6).expand(1, 3, 1, 6))
    assert images[0, 0, :, 1].tolist() == [0, 255, 0, 255, 1, 0]
    nan = gallery.to_uint8(torch.full((1, 3, 1, 1), float("nan"), dtype=torch.bfloat16, requires_grad=True))
    assert nan.ravel().tolist() == [128] * 3


def test_entropy_is_one_for_uniform_zero_for_one_hot_and_between_otherwise():
    two_of_sixteen = one_hot(1, 1, 4, 4, 0, 0) / 2 + one_hot(1, 1, 4, 4, 3, 3) / 2
    maps = torch.cat([uniform(1, 1, 4, 4), one_hot(1, 1, 4, 4, 2, 1), two_of_sixteen], 1)
    entropy = gallery.normalized_entropy(maps)
    assert entropy.shape == (1, 3)
    assert torch.allclose(entropy, torch.tensor([[1.0, 0.0, 0.25]]), atol=1e-6)


def test_entropy_of_one_key_of_zeros_and_of_nan_is_zero():
    assert gallery.normalized_entropy(torch.ones(2, 3, 1, 1)).tolist() == [[0] * 3] * 2
    assert gallery.normalized_entropy(torch.zeros(1, 1, 4, 4)).item() == 0
    assert gallery.normalized_entropy(torch.full((1, 1, 4, 4), float("nan"))).item() == 0


def test_the_default_queries_are_five_different_points_of_the_image():
    queries = gallery.default_queries()
    assert queries.shape == (5, 2) and queries.min() >= 0 and queries.max() <= 1
    assert len({tuple(q) for q in queries.tolist()}) == 5
    left_eye, right_eye, mouth, hair, corner = queries.tolist()
    assert left_eye[1] < 0.5 < right_eye[1] and left_eye[0] == right_eye[0]
    assert hair[0] < left_eye[0] < mouth[0] and max(corner) < 0.2


# ---------------------------------------------------------------- grids


def flat(levels, size):
    """Plain pictures, one per grey level."""
    return (torch.tensor(levels) / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 3, size, size)


def test_a_grid_is_filled_row_by_row_with_a_thin_gap(tmp_path):
    gallery.save_grid(flat([60, 100, 140, 180, 220], 64), tmp_path / "grid.png", columns=3)
    page, gap = read(tmp_path / "grid.png"), gallery.GAP
    assert 1 <= gap <= 4
    assert page.shape == (2 * (64 + gap) + gap, 3 * (64 + gap) + gap, 3)
    levels = [60, 100, 140, 180, 220, None]
    for i, level in enumerate(levels):
        top, left = gap + i // 3 * (64 + gap), gap + i % 3 * (64 + gap)
        cell = page[top : top + 64, left : left + 64]
        assert (cell == (gallery.PAGE if level is None else level)).all()
        page[top : top + 64, left : left + 64] = gallery.PAGE
    assert (page == gallery.PAGE).all()  # nothing but the page in the gaps


@pytest.mark.parametrize("B, columns, rows", [(1, 1, 1), (2, 2, 1), (9, 3, 3), (12, 4, 3), (64, 8, 8)])
def test_a_grid_is_nearly_square_by_default(tmp_path, B, columns, rows):
    gallery.save_grid(flat([200] * B, 64), tmp_path / "grid.png")
    height, width, _ = read(tmp_path / "grid.png").shape
    assert (width // 64, height // 64) == (columns, rows)


def test_small_pictures_become_blocks_and_large_ones_keep_their_pixels(tmp_path):
    for size, zoom in ((16, 4), (32, 2), (48, 2), (64, 1), (100, 1)):
        image = noise(1, 3, size, size)
        gallery.save_grid(image, tmp_path / "grid.png")
        page, gap = read(tmp_path / "grid.png"), gallery.GAP
        shown = page[gap:-gap, gap:-gap]
        assert shown.shape[0] == size * zoom >= 64
        for dy in range(zoom):
            assert (shown[dy::zoom, zoom - 1 :: zoom] == gallery.to_uint8(image)[0]).all()


def test_a_grid_of_nothing_or_of_no_columns_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no image"):
        gallery.save_grid(torch.zeros(0, 3, 8, 8), tmp_path / "grid.png")
    with pytest.raises(ValueError, match="columns"):
        gallery.save_grid(torch.zeros(1, 3, 8, 8), tmp_path / "grid.png", columns=0)
    assert not list(tmp_path.iterdir())


def test_a_diverged_sample_still_gives_a_grid(tmp_path):
    images = flat([0, 255], 64).clone()
    images[0] = float("nan")
    gallery.save_grid(images, tmp_path / "grid.png")
    page, gap = read(tmp_path / "grid.png"), gallery.GAP
    assert (page[gap : gap + 64, gap : gap + 64] == 128).all()
    assert (page[gap : gap + 64, -gap - 64 : -gap] == 255).all()


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("size, cell", [(32, 192), (48, 192), (64, 192), (100, 200), (128, 256), (512, 256)])
def test_every_query_has_a_frame_of_its_colour_around_each_image(tmp_path, size, cell):
    page = write_attention(
        tmp_path / "a.png", noise(2, 3, size, size), uniform(2, 4, 8, 8), gallery.default_queries()[:4]
    )
    frames = [framed(page, colour) for colour in gallery.QUERY_COLOURS[:4]]
    assert all([f[2] for f in column] == [cell, cell] for column in frames)
    tops = [[f[0] for f in column] for column in frames]
    assert tops.count(tops[0]) == 4 and tops[0][0] < tops[0][1]  # same rows, one per image
    lefts = [column[0][1] for column in frames]
    assert lefts == sorted(set(lefts)) and all(a[1] == b[1] for a, b in frames)


@pytest.mark.parametrize("ground", [-1.0, 0.0, 1.0])
def test_dots_have_the_right_colour_at_the_right_place(tmp_path, ground):
    queries = [(0.25, 0.75), (0.5, 0.1), (0.9, 0.4)]
    images = torch.full((1, 3, 64, 64), ground)
    page = write_attention(tmp_path / "a.png", images, uniform(1, 3, 8, 8), queries)
    colours = gallery.QUERY_COLOURS[:3]
    places = [framed(page, colour)[0] for colour in colours]
    first = (places[0][0], gallery.MARGIN, places[0][2])  # the image stands at the page's margin
    for (y, x), colour, place in zip(queries, colours, places, strict=True):
        for spot in (first, place):
            pixels, size = inside(page, spot), spot[2]
            assert np.abs(dot_at(pixels, colour) - (y * size, x * size)).max() <= 1
            # Rings of white and of black around it: it shows on any ground.
            near = pixels[int(y * size) - 8 : int(y * size) + 9, int(x * size) - 8 : int(x * size) + 9]
            assert near.min(2).max() > 225 and near.max(2).min() < 30
        others = set(colours) - {colour}
        assert all(dot_at(inside(page, place), other) is None for other in others)


def test_a_dot_in_the_very_corner_is_whole(tmp_path):
    page = write_attention(tmp_path / "a.png", noise(1, 3, 64, 64), uniform(1, 2, 4, 4), [(0.5, 0.5), (0, 0)])
    dots = page[:, : gallery.MARGIN + 192]
    sizes = [(dots == colour).all(2).sum() for colour in gallery.QUERY_COLOURS[:2]]
    assert sizes[0] == sizes[1] > 40


def test_the_first_column_is_the_untouched_image(tmp_path):
    images = noise(1, 3, 64, 64)
    page = write_attention(tmp_path / "a.png", images, uniform(1, 1, 8, 8), [(0.9, 0.9)])
    top, _, size = framed(page, gallery.QUERY_COLOURS[0])[0]
    shown = inside(page, (top, gallery.MARGIN, size))[1::3, 1::3]
    assert (shown[:50] == gallery.to_uint8(images)[0, :50]).all()


@pytest.mark.parametrize(
    "h, w, y, x", [(4, 4, 0, 3), (8, 8, 6, 1), (16, 16, 3, 12), (64, 64, 40, 50), (4, 8, 1, 6)]
)
def test_the_overlay_is_brightest_where_the_map_peaks(tmp_path, h, w, y, x):
    page = write_attention(tmp_path / "a.png", noise(1, 3, 64, 64), one_hot(1, 1, h, w, y, x), [(0.98, 0.02)])
    light = luminance(inside(page, framed(page, gallery.QUERY_COLOURS[0])[0]))
    size = len(light)
    light[-16:, :16] = 0  # the query's own dot
    peak_y, peak_x = np.unravel_index(light.argmax(), light.shape)
    assert y / h <= peak_y / size < (y + 1) / h and x / w <= peak_x / size < (x + 1) / w
    # Far from the peak the picture is only dimmed.
    far = np.abs(np.arange(size)[:, None] / size - (y + 0.5) / h) > 2.1 / h
    assert light[np.broadcast_to(far, light.shape)].max() < 110


@pytest.mark.parametrize("ground", [-1.0, 0.0, 1.0])
def test_more_attention_is_never_darker(tmp_path, ground):
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
    page = write_attention(
        tmp_path / "a.png", torch.full((1, 3, 64, 64), ground), ramp / ramp.sum(), [(0.98, 0.02)]
    )
    line = luminance(inside(page, framed(page, gallery.QUERY_COLOURS[0])[0])[10])
    assert (np.diff(line) >= -1).all()  # bytes round
    assert line[-1] - line[0] > 100


def test_a_map_is_measured_by_its_own_maximum_and_belongs_to_its_own_image(tmp_path):
    left, right = one_hot(1, 1, 8, 8, 4, 0), one_hot(1, 1, 8, 8, 4, 7)
    maps = torch.cat([torch.cat([left, right], 1), torch.cat([right, left], 1)])
    maps[0, 0] *= 0.01  # much weaker, and drawn just as bright
    page = write_attention(tmp_path / "a.png", torch.zeros(2, 3, 64, 64), maps, [(0.05, 0.5), (0.05, 0.5)])
    for i, expected in ((0, [0, 1]), (1, [1, 0])):
        for place, side in zip(framed(page, gallery.QUERY_COLOURS[i]), expected, strict=True):
            light = luminance(inside(page, place))[40:]
            halves = light[:, :96].max(), light[:, 96:].max()
            assert halves[side] > 180 > 100 > halves[1 - side]


def test_every_row_shows_its_own_image_and_attention_does_not_bury_it(tmp_path):
    images = torch.full((2, 3, 64, 64), -1.0)
    images[0, :, :, 32:] = images[1, :, :, :32] = 1
    page = write_attention(tmp_path / "a.png", images, uniform(2, 1, 8, 8), [(0.05, 0.5)])
    for (top, left, size), sign in zip(framed(page, gallery.QUERY_COLOURS[0]), (1, -1), strict=True):
        for x in (gallery.MARGIN, left):
            light = luminance(inside(page, (top, x, size)))[40:]
            assert sign * (light[:, 96:] - light[:, :96]).min() > 30


def test_one_broken_key_does_not_hide_the_others(tmp_path):
    maps = one_hot(1, 1, 8, 8, 6, 6) / 4
    maps[0, 0, 0, 0] = float("nan")
    page = write_attention(tmp_path / "a.png", torch.zeros(1, 3, 64, 64), maps, [(0.05, 0.5)])
    light = luminance(inside(page, framed(page, gallery.QUERY_COLOURS[0])[0]))
    assert light[144:168, 144:168].max() > 180 > 100 > light[:24, :24].max()


def test_beneath_each_overlay_stand_its_peak_and_its_entropy(tmp_path, written):
    two = one_hot(1, 1, 4, 4, 0, 0) / 2 + one_hot(1, 1, 4, 4, 3, 3) / 2
    maps = torch.cat([uniform(1, 1, 4, 4), one_hot(1, 1, 4, 4, 2, 1), two, two / 0 * 0], 1)
    page = write_attention(tmp_path / "a.png", noise(1, 3, 64, 64), maps, gallery.default_queries()[:4])
    expected = ["1.00x to 1.0x   H 1.00", "0.00x to 16.0x   H 0.00", "0.00x to 8.0x   H 0.25", "map is not finite"]
    for colour, words in zip(gallery.QUERY_COLOURS, expected, strict=False):
        top, left, size = framed(page, colour)[0]
        [(x, y)] = [xy for xy, w in written if w == words]
        assert left - 6 <= x <= left and top + size < y < top + size + 30


def header(page):
    """The pixels above the column of images."""
    return page[: framed(page, gallery.QUERY_COLOURS[0])[0][0] - 30]


def test_the_header_warns_when_the_map_has_no_effect(tmp_path):
    images, queries = torch.zeros(1, 3, 64, 64), gallery.default_queries()

    def warns(gamma):
        page = write_attention(tmp_path / "a.png", images, uniform(1, 5, 4, 4), queries, gamma)
        return (header(page) == gallery.WARN).all(2).sum() > 20

    assert warns(0.0) and warns(-0.0049) and warns(torch.nn.Parameter(torch.zeros(1)))
    assert not warns(0.0051) and not warns(-0.3) and not warns(float("nan"))


def test_the_header_changes_with_what_it_says(tmp_path):
    images, maps, queries = torch.zeros(1, 3, 64, 64), uniform(1, 5, 4, 4), gallery.default_queries()

    def shown(layer="g16", step=100, gamma=0.5, entropy=0.83, maps=maps):
        gallery.save_attention(images, maps, queries, tmp_path / "a.png", layer, step, gamma, entropy)
        return header(read(tmp_path / "a.png")).tobytes()

    heads = [shown(), shown(layer="g32"), shown(step=200), shown(gamma=-0.5), shown(entropy=0.1)]
    heads.append(shown(maps=uniform(1, 5, 8, 8)))
    assert len(set(heads)) == len(heads) and shown() == heads[0]


@pytest.mark.parametrize("Q, size", [(1, 32), (1, 130), (8, 32), (9, 32)])
def test_one_to_eight_queries_and_all_text_fit_on_the_page(tmp_path, Q, size):
    queries = [(0.5, (i + 1) / 12) for i in range(Q)]
    page = write_attention(
        tmp_path / "a.png", noise(1, 3, size, size), uniform(1, Q, 4, 4), queries, gamma=0.0
    )
    for edge in (page[:12], page[-12:], page[:, :20], page[:, -20:]):
        assert (edge == gallery.PAGE).all()
    columns = sum(len(framed(page, c)) for c in gallery.QUERY_COLOURS[:Q]) if Q <= 8 else Q
    assert columns == Q


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_diverged_run_still_gives_its_overlay(tmp_path, bad):
    images, maps = noise(2, 3, 64, 64), uniform(2, 2, 8, 8)
    images[0], maps[0] = bad, bad
    maps[1, 1] = 0
    with np.errstate(all="raise"):
        page = write_attention(tmp_path / "a.png", images, maps, [(0.9, 0.9), (0.2, 0.2)], gamma=bad)
    grey = inside(page, (framed(page, gallery.QUERY_COLOURS[0])[0][0], gallery.MARGIN, 192))[100, 100]
    assert grey.tolist() == [128 if np.isnan(bad) else 255 if bad > 0 else 0] * 3
    empty = framed(page, gallery.QUERY_COLOURS[1])[1]
    assert luminance(inside(page, empty)).mean() < 110  # no attention anywhere: the dimmed picture alone


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    for B, Q, points in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        with pytest.raises(ValueError, match="do not fit"):
            gallery.save_attention(
                torch.zeros(1, 3, 64, 64), uniform(B, Q, 4, 4), [(0.5, 0.5)] * points, tmp_path / "a.png",
                "g16", 1, 0.0, 1.0,
            )  # fmt: skip
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- masks


def hill(B, h, w, y, x, low=0.48, high=0.53):
    """Masks that are `low` everywhere but at one place."""
    masks = torch.full((B, 1, h, w), low)
    masks[:, :, y, x] = high
    return masks


def write_masks(path, images, masks, title="fastgan"):
    gallery.save_masks(images, masks, path, title, 100)
    return read(path)


def mask_places(page):
    """[[(top, left, size) per layer] per image], the insides of all frames."""
    same = (page == gallery.EDGE).all(2)
    return [
        [(top, a + gallery.FRAME, size) for a, b in runs(same[top - 1]) if b - a >= 128]
        for top, _, size in framed(page, gallery.EDGE)
    ]


def quarters(pixels):
    """The brightest pixel of the upper left, upper right, lower left and lower right quarter."""
    half, light = len(pixels) // 2, luminance(pixels)
    return [light[y : y + half, x : x + half].max() for y in (0, half) for x in (0, half)]


def colourful(pixels):
    return (pixels.max(2) - pixels.min(2)).max() > 10


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("h", [4, 8, 256])
@pytest.mark.parametrize("corner", range(4))
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
        shown = inside(page, (row[0][0], gallery.MARGIN, row[0][2]))
        assert (shown == (60, 200)[b]).all()  # the first column is the image as it is
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


@pytest.mark.parametrize("spread", [0.0, 5e-5])
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
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
    apart = torch.cat([torch.full((1, 1, 4, 4), 0.3), torch.full((1, 1, 4, 4), 0.6)])  # constant, but not alike
    masks = {
        "slae4": hill(2, 4, 4, 0, 0, 0.5, 0.56),
        "slae8": hill(2, 8, 8, 0, 0, 0.5, 0.54),
        "slae16": apart,
        "slae32": torch.full((2, 1, 4, 4), 0.5),
    }
    page = write_masks(tmp_path / "m.png", noise(2, 3, 64, 64), masks)
    places = mask_places(page)[0]
    warm = (page == gallery.WARN).all(2)
    above = [warm[: top - 5, left - 5 : left + size].sum() > 20 for top, left, size in places]
    assert above == [False, True, False, True]
    assert warm[: places[0][0]].sum() == warm.sum()  # and nowhere else
    del masks["slae8"], masks["slae32"]
    assert not (write_masks(tmp_path / "m.png", noise(2, 3, 64, 64), masks) == gallery.WARN).all(2).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_diverged_run_still_gives_its_masks(tmp_path, written, bad):
    images = flat([255, 255], 64).clone()
    images[0] = bad
    broken = hill(2, 8, 8, 7, 7)
    broken[0], broken[1, 0, 0, 0] = bad, bad
    masks = {"slae8": broken, "slae16": hill(2, 8, 8, 0, 7)}
    with np.errstate(all="raise"):
        page = write_masks(tmp_path / "m.png", images, masks)
    places = mask_places(page)
    grey = inside(page, (places[0][0][0], gallery.MARGIN, 192))[100, 100]
    assert grey.tolist() == [128 if np.isnan(bad) else 255 if bad > 0 else 0] * 3
    assert not colourful(inside(page, places[0][0]))
    light = quarters(inside(page, places[1][0]))  # one broken place does not hide the others
    assert light[3] > 180 > 120 > max(light[:3])
    assert [w for _, w in written].count("mask is not finite") == 2
    assert [w for _, w in written].count("0.48-0.53  mean 0.48") == 2
    assert not any("constant" in w for (x, _), w in written if x < places[0][1][1] - 9)


def test_the_legend_explains_the_heat(tmp_path, written):
    page = write_masks(tmp_path / "m.png", noise(1, 3, 64, 64), {"slae8": hill(1, 8, 8, 0, 0)})
    top, _, size = mask_places(page)[0][0]
    foot = page[top + size + 30 :]
    assert (foot == gallery._HEAT[255].astype(int)).all(2).any()
    words = " ".join(w for (_, y), w in written if y > top + size + 30)
    assert "least" in words and "most" in words and "multiplies the features" in words


def test_the_head_of_the_masks_names_the_run_and_the_step(tmp_path):
    images, masks = torch.zeros(1, 3, 64, 64), {"slae8": hill(1, 8, 8, 0, 0)}

    def head(title, step):
        gallery.save_masks(images, masks, tmp_path / "m.png", title, step)
        page = read(tmp_path / "m.png")
        return page[: mask_places(page)[0][0][0] - 60].tobytes()

    assert len({head("a", 1), head("b", 1), head("a", 2)}) == 3


@pytest.mark.parametrize("layers", [1, 3, 6])
@pytest.mark.parametrize("size, name", [(64, "slae8"), (130, "slae8"), (256, "a_layer_with_a_rather_long_name")])
def test_masks_of_one_to_six_layers_and_all_text_fit_on_the_page(tmp_path, written, layers, size, name):
    masks = {f"{name}{i}": hill(2, 4, 4, 0, 0, 0.5, 0.503) for i in range(layers)}
    page = write_masks(tmp_path / "m.png", noise(2, 3, size, size), masks, title="a title " * 8)
    for edge in (page[:12], page[-12:], page[:, :20], page[:, -20:]):
        assert (edge == gallery.PAGE).all()
    places = mask_places(page)
    assert [len(row) for row in places] == [layers] * 2
    # No text reaches into its neighbour's.
    lines = {}
    for (x, y), words in written:
        lines.setdefault(y, []).append((x, x + gallery._font(13).getlength(words)))
    for y, spans in lines.items():
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
        ((2, 1, 64, 64), {"a": (2, 1, 4, 4)}),
        ((2, 3, 64, 32), {"a": (2, 1, 4, 4)}),
        ((3, 64, 64), {"a": (3, 1, 4, 4)}),
        ((), {"a": (1, 1, 4, 4)}),
    ],
)
def test_masks_of_shapes_that_do_not_fit_are_refused(tmp_path, images, masks):
    masks = {name: torch.zeros(shape) for name, shape in masks.items()}
    with pytest.raises(ValueError, match="do not fit"):
        gallery.save_masks(torch.zeros(images), masks, tmp_path / "m.png", "fastgan", 1)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- reconstructions


def write_rows(path, rows, title="fastgan", step=100):
    gallery.save_reconstructions(rows, path, title, step)
    return read(path)


def box(page, level):
    """(top, left, height, width) of the one rectangle of exactly this grey."""
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
    assert lefts[0] == gallery.MARGIN and np.diff(lefts).min() > 192 and np.diff(lefts).max() < 200
    floor = 0
    for i, row in enumerate(boxes):
        assert [b[1] for b in row] == lefts and len({b[0] for b in row}) == 1
        [(x, y)] = [xy for xy, words in written if words == f"row {i}"]
        assert x == gallery.MARGIN and floor < y - 13 < y < row[0][0] < y + 20  # nearer to its own row
        floor = row[0][0] + 192
    assert not (page == gallery.WARN).all(2).any()


def test_small_rows_become_blocks_of_the_size_of_the_largest(tmp_path):
    small, large = noise(2, 3, 32, 32), noise(2, 3, 64, 64, seed=1)
    page = write_rows(tmp_path / "r.png", {"small": small, "large": large, "mark": flat([77, 78], 64)})
    top, left, size, _ = box(page, 77)
    pitch = box(page, 78)[1] - left
    for up, images, zoom in ((2, small, 6), (1, large, 3)):
        y = top - up * (size + 38)
        for i in range(2):
            shown = page[y : y + size, left + i * pitch : left + i * pitch + size]
            assert (shown == gallery.to_uint8(images)[i].repeat(zoom, 0).repeat(zoom, 1)).all()


@pytest.mark.parametrize("size, cell", [(8, 192), (32, 192), (64, 192), (128, 128), (256, 230), (512, 230)])
def test_eight_columns_fit_on_a_screen(tmp_path, size, cell):
    page = write_rows(tmp_path / "r.png", {"real": flat([40 + i for i in range(8)], size)})
    assert page.shape[1] <= 1920
    assert {box(page, 40 + i)[2:] for i in range(8)} == {(cell, cell)}
    few = write_rows(tmp_path / "r.png", {"real": flat([90], size)})
    assert box(few, 90)[2] == (256 if size > 64 else cell)
    for edge in (page[:12], page[-12:], page[:, :20], page[:, -20:]):
        assert (edge == gallery.PAGE).all()


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
    warm = np.flatnonzero((page == gallery.WARN).all(2).any(1))
    assert first[0] + 192 < warm.min() and warm.max() < second[0]


def test_long_labels_and_titles_fit_on_the_page(tmp_path):
    label = "from that quadrant of the 16x16 map, which is a rather long label for a row of one picture"
    nan = torch.full((1, 3, 32, 32), float("nan"))
    for rows, title in (({label: nan}, "fastgan"), ({"real": nan}, "a title " * 10)):
        page = write_rows(tmp_path / "r.png", rows, title)
        assert (page[:, -20:] == gallery.PAGE).all()


def test_the_head_of_the_reconstructions_names_the_run_and_the_step(tmp_path):
    rows = {"real": flat([50], 32)}
    heads = {write_rows(tmp_path / "r.png", rows, *w)[:40].tobytes() for w in (("a", 1), ("b", 1), ("a", 2))}
    assert len(heads) == 3


def strip(page, top, left, width=192, height=14):
    """The pixels beneath a picture that are of the colour of captions, or nearly."""
    part = page[top:top + height, left:left + width]
    return (np.abs(part - gallery.PAGE).max(2) > 40).sum()


def test_captions_stand_beneath_the_pictures_of_their_row(tmp_path, written):
    levels = [[50, 60, 70], [80, 90, 100], [110, 120, 130]]
    rows = {f"row {i}": flat(row, 32) for i, row in enumerate(levels)}
    captions = {"row 1": ["0.25", "", "a third"]}
    gallery.save_reconstructions(rows, tmp_path / "r.png", "fastgan", 1, captions)
    page = read(tmp_path / "r.png")
    boxes = [[box(page, level) for level in row] for row in levels]
    under = [[strip(page, top + size + 3, left) for top, left, size, _ in row] for row in boxes]
    assert under[1][0] > 10 and under[1][1] == 0 and under[1][2] > under[1][0]
    # beneath the others are a label of the next row, in the first column alone, or nothing
    assert under[0][1:] == [0, 0] and under[2] == [0, 0, 0]
    assert [words for _, words in written if words in ("0.25", "a third")] == ["0.25", "a third"]
    for (x, y), words in written:
        if words in ("0.25", "a third"):
            top, left, size, _ = boxes[1][0 if words == "0.25" else 2]
            assert x == left and top + size + 8 < y < top + size + 24
    [label] = [y for (_, y), words in written if words == "row 2"]
    [caption] = [y for (_, y), words in written if words == "0.25"]
    assert label - 13 - caption > boxes[2][0][0] - label > 0, "the next label is nearer to its own row"
    gallery.save_reconstructions(rows, tmp_path / "none.png", "fastgan", 1)
    assert read(tmp_path / "none.png").shape[0] < page.shape[0]


def test_captions_of_the_last_row_stay_clear_of_the_legend(tmp_path, written):
    rows = {"a": flat([50], 32), "b": flat([60], 32)}
    gallery.save_reconstructions(rows, tmp_path / "r.png", "fastgan", 1, {"a": ["1.00"], "b": ["2.00"]}, "the legend")
    page = read(tmp_path / "r.png")
    places = {words: y for (_, y), words in written}
    assert places["b"] - places["1.00"] > 14 and places["the legend"] - places["2.00"] > 14
    assert places["the legend"] < page.shape[0] - 4


def test_the_legend_says_what_is_asked(tmp_path, written):
    rows = {"real": flat([50], 32)}
    write_rows(tmp_path / "r.png", rows)
    assert "each column belongs to one image" in [words for _, words in written]
    del written[:]
    gallery.save_reconstructions(rows, tmp_path / "r.png", "fastgan", 1, legend="numbers are LPIPS")
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
        [(2, 3, 8, 8), (2, 1, 8, 8)],
        [(2, 3, 8, 8), (2, 3, 0, 8)],
        [(3, 8, 8)],
        [()],
    ],
)
def test_reconstructions_of_shapes_that_do_not_fit_are_refused(tmp_path, shapes):
    with pytest.raises(ValueError, match="save_reconstructions"):
        write_rows(tmp_path / "r.png", {str(i): torch.zeros(shape) for i, shape in enumerate(shapes)})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- files


def draw_grid(path, level=200):
    gallery.save_grid(flat([level], 64), path)


def draw_attention(path, level=200):
    write_attention(path, flat([level], 64), uniform(1, 1, 4, 4), [(0.5, 0.5)])


def draw_masks(path, level=200):
    gallery.save_masks(flat([level], 64), {"slae8": hill(1, 8, 8, 0, 0)}, path, "fastgan", 1)


def draw_rows(path, level=200):
    gallery.save_reconstructions({"real": flat([level], 64)}, path, "fastgan", 1)


DRAWERS = [draw_grid, draw_attention, draw_masks, draw_rows]


@pytest.mark.parametrize("draw", DRAWERS)
def test_missing_folders_are_made_and_nothing_else_is_left(tmp_path, draw):
    path = tmp_path / "samples" / "v1" / "picture.png"
    draw(str(path))
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("draw", DRAWERS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
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


@pytest.mark.parametrize("error", [OSError("read-only")])
def test_a_rename_that_fails_leaves_no_litter(tmp_path, monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="read-only"):
        draw_grid(tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())
