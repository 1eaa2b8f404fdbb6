"""The sliced Wasserstein distance is 0 for equal sets and grows as the fake pictures get worse."""

import pytest
import torch
from PIL import Image

from metrics import swd
from metrics.swd import sliced_wasserstein


def noise(n, size=64, seed=0):
    """Smooth random pictures, uint8 (n, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 8, 8, generator=generator)
    fine = torch.rand(n, 3, size, size, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    return ((smooth + 0.3 * fine).clamp(0, 1) * 200 + 20).to(torch.uint8)


def distance(a, b):
    return sliced_wasserstein(a, b, count=4096, directions=64)


def blurred(pictures):
    return torch.nn.functional.avg_pool2d(pictures.float(), 3, 1, 1).to(torch.uint8)


def test_the_same_set_is_at_distance_zero_and_the_number_is_repeatable():
    real, fake = noise(40), noise(30, seed=1)
    assert distance(real, real) == 0
    assert distance(real, fake) == distance(real, fake) > 0


def test_the_distance_grows_with_blur():
    real, other = noise(60), noise(60, seed=1)
    plain, once, twice = (distance(real, fake) for fake in (other, blurred(other), blurred(blurred(other))))
    assert plain * 2 < once < twice


def test_the_distance_grows_with_a_shift_of_one_colour():
    real, other = noise(60), noise(60, seed=1)

    def shifted(by):
        return other + torch.tensor([by, 0, 0], dtype=torch.uint8).view(3, 1, 1)

    plain, little, much = (distance(real, shifted(by)) for by in (0, 10, 30))
    assert plain * 1.5 < little < much


def test_every_level_counts_alike_however_weak_its_signal(monkeypatch):
    def fainter(images):
        finest, *others = pyramid(images)
        return [finest / 4, *others]

    real, other, pyramid = noise(60), blurred(noise(60, seed=1)), swd.laplacian_pyramid
    expected = distance(real, other)
    monkeypatch.setattr(swd, "laplacian_pyramid", fainter)
    assert distance(real, other) == pytest.approx(expected, rel=1e-3)


def test_one_picture_many_times_is_far_from_the_set_that_it_comes_from():
    real = noise(60)
    assert distance(real, real[:1].expand(60, -1, -1, -1)) > 3 * distance(real, noise(60, seed=1))


def test_chunks_do_not_change_descriptors(monkeypatch):
    pictures = noise(20, size=32)
    found = swd.descriptors(pictures, 50)
    assert [rows.shape for rows in found] == [(50, 3, 49)] * 2
    monkeypatch.setattr(swd, "CHUNK", 3 * 32**2)
    assert all(torch.equal(a, b) for a, b in zip(found, swd.descriptors(pictures, 50), strict=True))


def test_descriptors_are_patches_of_the_pictures_own_levels_in_equal_shares():
    flat = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 32, 32).to(torch.uint8) * 50
    detail, coarse = swd.descriptors(flat, 10)
    assert detail.abs().max() < 1e-3
    assert torch.allclose(coarse.mean((1, 2)), torch.tensor([0, 50, 100, 150, 0, 50, 100, 150, 0, 50.0]))
    _, coarse = swd.descriptors(flat, 2)
    assert torch.allclose(coarse.mean((1, 2)), torch.tensor([0, 100.0])), "of more pictures than patches evenly spread"


def test_transparent_parts_of_files_are_white(tmp_path):
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "0.png")
    Image.new("L", (16, 16), 40).save(tmp_path / "1.png")
    assert swd.PictureFiles.below(tmp_path)[0:2].unique(sorted=False).tolist() in ([255, 40], [40, 255])


def test_the_pyramid_adds_up_to_the_picture_and_a_flat_picture_has_no_detail():
    levels = swd.laplacian_pyramid(torch.full((1, 3, 64, 64), 80.0))
    assert [level.size(-1) for level in levels] == [64, 32, 16]
    assert torch.allclose(levels[0], torch.zeros(1), atol=1e-3) and torch.allclose(levels[2], torch.tensor(80.0))


def test_the_floor_is_small_but_not_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(swd, "sliced_wasserstein", distance)
    for number, picture in enumerate(noise(41)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    real = swd.PictureFiles.below(tmp_path)
    one, other = real.halves(0)
    assert len(one) == len(other) == 20 and not set(one.paths) & set(other.paths)
    floor = swd.floor(real)
    assert 0 < floor < distance(real, blurred(noise(41, seed=1)))
