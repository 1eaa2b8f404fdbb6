"""Sets of pictures, decoded or drawn when they are asked for, and a distance between sets: zero for the same one,
larger the worse the fake ones are.
"""

from pathlib import Path

import pytest
import torch
from PIL import Image

import data_loader
from dataset import images
from device.distributed import Place
from errors import DataError
from generate import draw, modes
from metrics import swd
from metrics.swd import sliced_wasserstein
from parameter import resolve
from storage import checkpoint


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


def test_every_level_counts_alike_however_weak_its_signal():
    real, other = noise(60), noise(60, seed=1)
    fainter = [((pictures.float() - 100) / 2 + 100).to(torch.uint8) for pictures in (real, other)]
    assert distance(*fainter) == pytest.approx(distance(real, other), rel=0.1)


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


# ---------------------------------------------------------------- what a generator draws


FASTGAN = ("--model", "fastgan", "--imsize", 64, "--recon", "l1", "--vgg_weights", "random")


@pytest.mark.parametrize(("flags", "how"), [((), None), (FASTGAN, "mix"), (FASTGAN, "gauss")],
                         ids=["sagan", "fastgan with metadata", "other metadata than in training"])
def test_what_is_drawn_is_what_the_command_writes(run, pictures, flags, how):
    code, _, err = run("--version", "a", "--total_step", 1, *flags, "--dataset", "folder", "--image_path", pictures)
    assert code == 0, err
    again = {"version": "a", "seed": 3, "device": "cpu"} | ({"metadata_sample": how} if how else {})
    command = [word for flag, value in again.items() for word in (f"--{flag}", value)]
    code, _, err = run("--mode", "sample", "--num_samples", 70, *command, tiny=False)
    assert code == 0, err
    written = swd.PictureFiles.below(Path("samples/a/0000001_generated_seed3"))
    assert len(written) == 70 and len(torch.unique(written[0:70], dim=0)) == 70
    config = resolve(again, checkpoint.saved_config)
    place = Place(torch.device("cpu"))
    source = modes.load_generator(config, place)
    drawn = draw.DrawnSamples(source.G, source.latents, 70, 3, source.precision, config.imsize)
    assert len(drawn) == 70 and drawn[0:70].dtype == torch.uint8
    for part in (slice(0, 70), slice(0, 64), slice(64, 70)):
        assert torch.equal(drawn[part], written[part])
    for part in (slice(5, 12), slice(60, 68), slice(69, 80), slice(-3, None)):
        apart = (drawn[part].int() - written[part]).abs()
        assert apart.max() <= 1 and apart.float().mean() < 1e-3, "but for rounding"
    fewer = draw.DrawnSamples(source.G, source.latents, 6, 3, source.precision, config.imsize)
    assert len(fewer) == 6 and (fewer[0:9].int() - written[0:6]).abs().max() <= 1


# ---------------------------------------------------------------- decoded pictures


def decoded(folder):
    config = resolve({"dataset": "folder", "image_path": str(folder), "imsize": 32, "check_data": "off",
                      "cache": "off"})
    dataset = data_loader.open_dataset(config)
    return images.ThreadedReader(dataset), dataset


def test_a_slice_of_pictures_is_decoded_in_order(pictures):
    found, dataset = decoded(pictures)
    assert len(found) == 12
    whole = torch.stack([dataset[index] for index in range(12)])
    assert len(torch.unique(whole, dim=0)) == 12
    for part in (slice(0, 12), slice(3, 7), slice(10, 20), slice(4, 5)):
        assert found[part].dtype == torch.uint8 and torch.equal(found[part], whole[part])


def test_unreadable_pictures_are_counted_and_the_first_is_named(pictures):
    for name in ("11", "3", "9"):                       # whichever way they are sorted, the last one too
        (pictures / f"{name}.png").write_bytes(b"<html>")
    found, dataset = decoded(pictures)
    damaged = [Path(path).stem in ("11", "3", "9") for path in dataset.sources]
    first = damaged.index(True)
    last = len(damaged) - damaged[::-1].index(True)
    with pytest.raises(DataError) as caught:
        found[last - 1:last]                            # whichever of them is met
    with pytest.raises(DataError) as direct:
        dataset[first]
    assert str(caught.value) == f"3 of 12 pictures cannot be used; the first:\n{direct.value}"
    assert Path(dataset.sources[first]).name in str(caught.value)
    assert caught.value.__suppress_context__, "one error is enough"
    assert len(found[first + 1:first + 2]) == 1, "others can still be read"


def test_a_single_unreadable_picture_speaks_for_itself(pictures):
    (pictures / "7.png").write_bytes(b"<html>")
    found, dataset = decoded(pictures)
    number = [Path(path).name for path in dataset.sources].index("7.png")
    with pytest.raises(DataError) as direct:
        dataset[number]
    with pytest.raises(DataError) as caught:
        found[0:12]
    assert str(caught.value) == str(direct.value) and "7.png" in str(caught.value)


def test_a_picture_that_can_be_read_the_second_time_is_named_all_the_same():
    class Shaky:
        """A disk that fails once."""
        failed = False

        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1 and not self.failed:
                self.failed = True
                raise DataError("cannot read 1.png")
            return torch.zeros(3, 4, 4, dtype=torch.uint8)

    with pytest.raises(DataError, match="^cannot read 1.png$"):
        images.ThreadedReader(Shaky())[0:3]
