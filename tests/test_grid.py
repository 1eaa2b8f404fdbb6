"""Sample grids and the conversion to uint8. The tests open the PNG and check its pixels."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from gallery import grid


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image).astype(int)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def flat(levels, size):
    """Uniform images, one per grey level."""
    return (torch.tensor(levels) / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 3, size, size)



# ---- numbers ----


@pytest.mark.parametrize(
    "imsize, side", [(32, 8), (64, 8), (65, 6), (128, 6), (256, 4), (512, 3), (1024, 2), (2048, 2)]
)
def test_the_grid_has_fewer_pictures_the_larger_they_are(imsize, side):
    assert grid.grid_side(imsize) == side


def test_every_byte_survives_the_way_to_minus_one_to_one_and_back():
    bytes_ = torch.arange(256).repeat(3, 1).view(1, 3, 16, 16)
    images = grid.to_uint8(bytes_ / 127.5 - 1)
    assert images.dtype == np.uint8 and images.shape == (1, 16, 16, 3)
    assert (images[0, :, :, 0].ravel() == np.arange(256)).all()


def test_levels_are_rounded_and_clamped_and_nan_is_grey():
    values = torch.tensor([-7.0, 7.0, float("-inf"), float("inf"), 0.9 / 127.5 - 1, 0.4 / 127.5 - 1])
    images = grid.to_uint8(values.view(1, 1, 1, 6).expand(1, 3, 1, 6))
    assert images[0, 0, :, 1].tolist() == [0, 255, 0, 255, 1, 0]
    nan = grid.to_uint8(torch.full((1, 3, 1, 1), float("nan"), dtype=torch.bfloat16, requires_grad=True))
    assert nan.ravel().tolist() == [128] * 3



# ---- grids ----


def test_a_grid_is_filled_row_by_row_with_a_thin_gap(tmp_path):
    grid.save_grid(flat([60, 100, 140, 180, 220], 64), tmp_path / "grid.png", columns=3)
    page, gap = read(tmp_path / "grid.png"), grid.GAP
    assert 1 <= gap <= 4
    assert page.shape == (2 * (64 + gap) + gap, 3 * (64 + gap) + gap, 3)
    levels = [60, 100, 140, 180, 220, None]
    for i, level in enumerate(levels):
        top, left = gap + i // 3 * (64 + gap), gap + i % 3 * (64 + gap)
        cell = page[top : top + 64, left : left + 64]
        assert (cell == (grid.BACKGROUND if level is None else level)).all()
        page[top : top + 64, left : left + 64] = grid.BACKGROUND
    assert (page == grid.BACKGROUND).all()  # the gaps show the background


@pytest.mark.parametrize("B, columns, rows", [(1, 1, 1), (2, 2, 1), (9, 3, 3), (12, 4, 3), (64, 8, 8)])
def test_a_grid_is_nearly_square_by_default(tmp_path, B, columns, rows):
    grid.save_grid(flat([200] * B, 64), tmp_path / "grid.png")
    height, width, _ = read(tmp_path / "grid.png").shape
    assert (width // 64, height // 64) == (columns, rows)


@pytest.mark.parametrize("H, W, columns, rows", [(64, 256, 2, 8), (256, 64, 8, 2), (64, 96, 4, 4)])
def test_a_grid_of_flat_or_upright_pictures_is_nearly_square_and_full(tmp_path, H, W, columns, rows):
    grid.save_grid(torch.zeros(16, 3, H, W), tmp_path / "grid.png")
    height, width, _ = read(tmp_path / "grid.png").shape
    assert (width // W, height // H) == (columns, rows)
    grid.save_grid(torch.zeros(16, 3, H, W), tmp_path / "grid.png", names=list("abcd"))
    assert read(tmp_path / "grid.png").shape[0] // H == 4, "a row per class"


def test_small_pictures_become_blocks_and_large_ones_keep_their_pixels(tmp_path):
    for size, zoom in ((16, 4), (32, 2), (48, 2), (64, 1), (100, 1)):
        image = noise(1, 3, size, size)
        grid.save_grid(image, tmp_path / "grid.png")
        page, gap = read(tmp_path / "grid.png"), grid.GAP
        shown = page[gap:-gap, gap:-gap]
        assert shown.shape[0] == size * zoom >= 64
        for dy in range(zoom):
            assert (shown[dy::zoom, zoom - 1 :: zoom] == grid.to_uint8(image)[0]).all()


@pytest.mark.parametrize(("numbers", "name"), [
    (range(10, 18), "10-17"), ((3, 5, *range(9, 15)), "3, 5, 9-14"), ((7,), "7"), ((4, 3, 2), "4, 3, 2"),
    (range(100, 900, 100), "100, 200, 300, 400, ..., 800"), ((12345678, 9, 87654321), "12345678, 9, 87654321"),
    ((1234567, 12345678, 8, 87654321), "1234567, ..., 87654321")])
def test_numbers_beside_a_row_tell_the_first_and_the_last(numbers, name):
    assert grid.in_ranges(tuple(numbers)) == name == grid.shortened(name, grid.find_font(13))


def test_a_grid_of_nothing_or_of_no_columns_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no image"):
        grid.save_grid(torch.zeros(0, 3, 8, 8), tmp_path / "grid.png")
    with pytest.raises(ValueError, match="columns"):
        grid.save_grid(torch.zeros(1, 3, 8, 8), tmp_path / "grid.png", columns=0)
    assert not list(tmp_path.iterdir())


def test_a_diverged_sample_still_gives_a_grid(tmp_path):
    images = flat([0, 255], 64).clone()
    images[0] = float("nan")
    grid.save_grid(images, tmp_path / "grid.png")
    page, gap = read(tmp_path / "grid.png"), grid.GAP
    assert (page[gap : gap + 64, gap : gap + 64] == 128).all()
    assert (page[gap : gap + 64, -gap - 64 : -gap] == 255).all()


def test_a_rename_that_fails_leaves_no_litter(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="read-only"):
        grid.save_grid(flat([200], 64), tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())
