"""DiffAugment: what each policy does to an image, and that gradients pass through it."""

import numpy as np
import pytest
import torch

from diffaug import augment, color, cutout, mirror, translation


@pytest.mark.parametrize("policy", ["color", "translation", "mirror", "cutout"])
def test_every_image_gets_its_own_amount_and_its_gradient(policy):
    torch.manual_seed(0)
    one = torch.rand(1, 3, 32, 32) - 0.5
    x = one.repeat(8, 1, 1, 1).requires_grad_(True)
    out = augment(x, (policy,))
    assert out.shape == x.shape
    assert len({tuple(image.flatten().tolist()) for image in out}) > 4
    out.sum().backward()
    assert x.grad.abs().sum() > 0


def test_color_keeps_shapes_and_moves_levels_within_bounds():
    torch.manual_seed(0)
    x = torch.zeros(256, 3, 4, 4)
    shifts = color(x)[:, 0, 0, 0]
    assert -0.5 <= shifts.min() < -0.4 and 0.4 < shifts.max() <= 0.5
    edge = torch.zeros(256, 3, 2, 2)
    edge[..., 0] = 1.0                                  # grey: saturation leaves it, contrast stretches it
    stretched = color(edge)
    heights = (stretched[..., 0] - stretched[..., 1])[:, 0, 0]
    assert 0.5 <= heights.min() < 0.6 and 1.4 < heights.max() <= 1.5
    orange = torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1).expand(256, 3, 2, 2)
    coloured = color(orange)
    spans = (coloured[:, 0] - coloured[:, 2])[:, 0, 0]
    assert 0 <= spans.min() < 0.3 and 4 < spans.max() <= 6, "2, times saturation, times contrast"


def test_translation_shifts_by_at_most_an_eighth_and_fills_with_grey():
    torch.manual_seed(0)
    x = torch.zeros(200, 3, 32, 32)
    x[:, :, 16, 16] = 1.0
    spots = translation(x)[:, 0].nonzero()[:, 1:] - 16
    assert len(spots) == 200 and spots.min() == -4 and spots.max() == 4
    assert (translation(torch.ones(200, 3, 32, 32)) == 0).any()


@pytest.mark.parametrize("axis", [2, 3])
def test_mirror_shifts_as_translation_does_and_mirrors_the_edges(axis):
    torch.manual_seed(0)
    side = 32 * (axis - 1)                              # 32 rows, 64 columns
    ramp = torch.arange(float(side))
    x = (ramp[:, None] if axis == 2 else ramp).expand(400, 3, 32, 64)
    padded = torch.from_numpy(np.pad(ramp.numpy(), side // 8, mode="reflect"))
    windows = padded.unfold(0, side, 1)                                 # (1 + side / 4, side)
    lines = mirror(x).movedim(axis, -1)[:, 0, 0]                        # (400, side)
    shifts = (lines[:, None] == windows).all(2)                         # (400, 1 + side / 4)
    assert shifts.any(1).all() and shifts.any(0).all()


def test_cutout_blanks_half_the_side():
    torch.manual_seed(0)
    blank = (cutout(torch.ones(200, 3, 32, 32))[:, 0] == 0).sum((1, 2))
    assert blank.max() == 16 * 16 and blank.min() >= 8 * 8 - 16


def test_none_changes_nothing():
    x = torch.rand(2, 3, 8, 8)
    assert augment(x, ()) is x
