"""`nearest` finds memorized training pictures among samples, and does not flag new pictures.

Most tests use `SmallLpips` instead of LPIPS on VGG-16.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill, lines, two_processes
from stand_ins import CPU, SmallLpips, pair_distances, random_lpips, smooth, to_others

from data_loader import to_images
from metrics import nearest
from metrics.nearest import Neighbours, find_neighbours
from pretrained import lpips


def touched(pictures, seed=0):
    """The pictures with noise of at most 3 levels."""
    noise = torch.randint(-3, 4, pictures.shape, generator=torch.Generator().manual_seed(seed))
    return (pictures.int() + noise).clamp(0, 255).to(torch.uint8)


def test_a_copy_is_found_at_distance_zero():
    real, fake = smooth(67), smooth(70, seed=1)
    copies = {0: 66, 63: 64, 64: 0, 69: 63}                             # on both sides of chunk boundaries
    for sample, picture in copies.items():
        fake[sample] = real[picture]
    found = find_neighbours(SmallLpips(), real, fake, CPU)
    usual = found.real.median()
    assert {sample: found.index[sample].item() for sample in copies} == copies
    assert (found.distance >= 0).all() and (found.distance[list(copies)] < 1e-5 * usual).all()
    assert ((found.distance < 0.1 * usual).nonzero()[:, 0] == torch.tensor(sorted(copies))).all()


@pytest.mark.parametrize(("M", "N"), [(67, 70), (64, 64), (1, 3), (130, 1)])
def test_every_sample_finds_the_nearest_of_all(M, N):
    real, fake = smooth(M), smooth(N, seed=1)
    found = find_neighbours(SmallLpips(), real, fake, CPU)
    distances = pair_distances(SmallLpips(), fake, real)
    assert found.index.dtype == torch.long and torch.equal(found.index, distances.argmin(1))
    assert torch.allclose(found.distance.double(), distances.min(1).values, rtol=2e-3)
    apart = to_others(pair_distances(SmallLpips(), real, real))
    assert torch.allclose(found.real.double(), apart.min(1).values, rtol=2e-3)


def test_a_training_picture_is_not_its_own_neighbour_but_its_duplicate_is():
    real = smooth(67)
    assert (find_neighbours(SmallLpips(), real, smooth(3, seed=1), CPU).real > 0.01).all()
    real[65] = real[2]
    alone = torch.ones(67, dtype=torch.bool).index_fill(0, torch.tensor([2, 65]), False)
    distances = find_neighbours(SmallLpips(), real, smooth(3, seed=1), CPU).real
    assert (distances[alone] > 0.01).all() and (distances[~alone] < 1e-5).all()


def test_what_is_compared_is_bounded_and_evenly_spread(monkeypatch):
    monkeypatch.setattr(nearest, "SAMPLES", 5)
    monkeypatch.setattr(nearest, "REAL", 10)
    real, fake, net = smooth(67), smooth(70, seed=1), SmallLpips()
    found = find_neighbours(net, real, fake, CPU)
    assert sum(shape[0] for shape in net.seen) == 5 + 10 + 67, "each picture is embedded once"
    whole = pair_distances(SmallLpips(), fake[:5], real)
    assert torch.equal(found.index, whole.argmin(1)), "among all training pictures"
    asked = [i * 67 // 10 for i in range(10)]
    expected = to_others(pair_distances(SmallLpips(), real, real)).min(1).values[asked]
    assert torch.allclose(found.real.double(), expected, rtol=2e-3)


def test_what_is_usual_need_not_be_sought_twice():
    real, fake, net = smooth(67), smooth(9, seed=1), SmallLpips()
    first = find_neighbours(SmallLpips(), real, smooth(4, seed=2), CPU)
    found, whole = find_neighbours(net, real, fake, CPU, first.real), find_neighbours(SmallLpips(), real, fake, CPU)
    assert torch.equal(found.index, whole.index) and torch.allclose(found.distance, whole.distance, rtol=1e-3)
    assert torch.equal(found.real, first.real) and found.scores() == pytest.approx(whole.scores(), rel=1e-3)
    assert sum(shape[0] for shape in net.seen) <= 9 + 67 + 1


def test_large_pictures_are_reduced_before_they_are_compared():
    real, net = smooth(4, size=96), SmallLpips()
    stripes = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    stripes[..., ::2] = 200                                             # uniform grey after anti-aliased downscaling
    find_neighbours(net, real, stripes, CPU)
    assert {shape[2:] for shape in net.seen} == {(64, 64)}
    assert (nearest.reduced(to_images(stripes)) - (200 / 255 - 1))[..., 8:-8].abs().max() < 0.15
    for size in (64, 48):
        small = to_images(smooth(2, size=size))
        assert nearest.reduced(small) is small


def test_sets_are_only_ever_sliced():
    """A set may be decoded or generated on demand."""
    class Sliced:
        def __init__(self, pictures):
            self.pictures = pictures

        def __len__(self):
            return len(self.pictures)

        def __getitem__(self, part):
            assert isinstance(part, slice)
            return self.pictures[part]

    real, fake = smooth(67), smooth(9, seed=1)
    expected = find_neighbours(SmallLpips(), real, fake, CPU)
    found = find_neighbours(SmallLpips(), Sliced(real), Sliced(fake), CPU)
    assert torch.equal(found.distance, expected.distance) and torch.equal(found.real, expected.real)
    assert torch.equal(nearest.pictures_at(Sliced(real), [5, 2, 66]), real[[5, 2, 66]])
    assert torch.equal(nearest.pictures_at(Sliced(real), [5, 6, 7]), real[5:8])


def test_scores_tell_copies_from_new_pictures_of_the_same_kind():
    real = smooth(300)
    new = find_neighbours(SmallLpips(), real, smooth(100, seed=1), CPU).scores()
    copied = find_neighbours(SmallLpips(), real, touched(real[:100]), CPU).scores()
    assert new["nearest"] == pytest.approx(1, abs=0.1) and new["nearest_copies"] < 0.1
    assert copied["nearest"] < 0.05 and copied["nearest_copies"] == 1
    assert all(type(number) is float for number in (new | copied).values())


def test_scores_are_medians_and_the_share_below_the_first_percent():
    real = torch.arange(101) + 1.0                                      # median 51, first percentile 2
    real[-1] = 5000
    found = Neighbours(torch.tensor([1.0, 1.5, 2000, 25.5, 60, 4, 70, 80, 3, 5]), torch.zeros(10).long(), real.flip(0))
    assert found.scores() == {"nearest": pytest.approx(5 / 51), "nearest_copies": pytest.approx(0.2)}


def test_copies_are_told_even_where_training_pictures_come_twice():
    real = smooth(100)
    real[97:] = real[:3]                                                # the first percentile is 0
    assert find_neighbours(SmallLpips(), real, real[10:50], CPU).scores()["nearest_copies"] == 1
    assert find_neighbours(SmallLpips(), real, smooth(40, seed=1), CPU).scores()["nearest_copies"] == 0


def test_equal_training_pictures_give_numbers():
    real = smooth(1).expand(5, -1, -1, -1)
    scores = find_neighbours(SmallLpips(), real, smooth(3, seed=1), CPU).scores()
    assert all(np.isfinite(number) for number in scores.values())


def test_with_vgg_distances_are_those_of_lpips():
    net, real, fake = random_lpips(), smooth(3), smooth(2, seed=1)
    fake[1] = real[2]
    with torch.no_grad():
        distances = torch.stack([net(*(to_images(pair) for pair in (real, picture.expand_as(real))))
                                 for picture in fake])                  # (2, 3)
        assert torch.allclose(pair_distances(net, fake, real).float(), distances, rtol=1e-3, atol=1e-6)
        apart = torch.stack([net(to_images(real), to_images(picture.expand_as(real))) for picture in real])
    found = find_neighbours(net, real, fake, CPU)
    assert found.index[1] == 2 and found.distance[1] < 1e-4 * distances.median()
    assert torch.equal(found.index, distances.argmin(1))
    assert torch.allclose(found.distance, distances.min(1).values, rtol=1e-2, atol=1e-5)
    assert torch.allclose(found.real, to_others(apart).min(1).values, rtol=1e-2)


# ---- classes ----


def test_neighbours_are_of_the_same_class():
    real, fake = smooth(67), smooth(9, seed=1)
    fake[0] = real[3]                                                   # a copy, but of a picture of another class
    of_real, of_fake = torch.arange(67) % 3, torch.arange(9) % 3 + (torch.arange(9) == 0)
    of_real[66] = 3                                                     # it has no other of its class
    found = find_neighbours(SmallLpips(), real, fake, CPU, labels=(of_real, of_fake))
    distances = pair_distances(SmallLpips(), fake, real).masked_fill(of_fake[:, None] != of_real, torch.inf)
    assert torch.equal(found.index, distances.argmin(1)) and found.index[0] != 3
    assert torch.allclose(found.distance.double(), distances.min(1).values, rtol=2e-3)
    apart = to_others(pair_distances(SmallLpips(), real, real)).masked_fill(of_real[:, None] != of_real, torch.inf)
    assert torch.allclose(found.real.double(), apart.min(1).values[:66], rtol=2e-3)


TEXT = ("LPIPS on VGG-16 with RANDOM weights (for tests) at 32 px from each of 8 samples to {} all 6 pictures of "
        "folder {}, over that of 6 training pictures to {}; nearest: ratio of the medians, far under 1 is copying; "
        "nearest_copies: share of samples nearer than 99 % of the training pictures are, or than a hundredth of what "
        "is usual")


def test_a_run_with_classes_is_compared_within_them_and_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setattr(lpips, "load_lpips", lambda weights, hint: SmallLpips())
    monkeypatch.setattr(lpips, "require", lambda weights, hint: None)
    for name in ("cat", "dog"):
        fill(tmp_path / "classed" / name, 3)
    run("--version", "a", "--dataset", "folder", "--image_path", "classed", "--total_step", 1, "--arch", "resnet",
        "--g_attn", "none")

    def protocol(*flags):
        code, out, err = run("--version", "a", "--mode", "evaluate", "--metrics", "nearest", "--num_eval", 8,
                             "--vgg_weights", "random", *flags, tiny=False)
        assert code == 0, err
        return lines("a")[-1]["protocol"], out

    asked = []
    monkeypatch.setattr(nearest, "find_neighbours", lambda *given: asked.append(given[-1]) or find_neighbours(*given))
    found, _ = protocol()
    assert found == TEXT.format("the nearest of its class among", "classed", "the nearest other of their class")
    real, fake = asked.pop()
    assert real.tolist() == [0, 0, 0, 1, 1, 1] and len(fake) == 8 and set(fake.tolist()) == {0, 1}
    fill(Path("plain"), 6)
    found, out = protocol("--real_dir", "plain")
    assert found == TEXT.format("the nearest of", "plain", "the nearest other") and asked == [None]
    assert "note: --metrics nearest compares samples with real pictures of all classes" in out


# ---- several processes ----


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from device import distributed
from metrics.nearest import find_neighbours
from parameter import resolve
from stand_ins import SmallLpips, smooth
place = distributed.start(resolve({{"device": "cpu"}}))
assert place.world_size == 2
real, fake = smooth(67), smooth(70, seed=1)
seen = []
for M, N in ((67, 70), (3, 1), (1, 3)):
    found = find_neighbours(SmallLpips(), real[:M], fake[:N], place)
    seen += [found.distance, found.index, found.real]
found = find_neighbours(SmallLpips(), real, fake, place, labels=(torch.arange(67) % 3, torch.arange(70) % 3))
torch.save([*seen, found.distance, found.index, found.real], {str(tmp_path)!r} + f"/{{place.rank}}.pth")
distributed.barrier()
distributed.stop()
""")
    # the exit code is not checked: gloo sometimes aborts a process at exit, after the results are written
    result = two_processes(script)
    assert (tmp_path / "0.pth").exists() and (tmp_path / "1.pth").exists(), result.stderr
    real, fake = smooth(67), smooth(70, seed=1)
    alone = [find_neighbours(SmallLpips(), real[:M], fake[:N], CPU) for M, N in ((67, 70), (3, 1), (1, 3))]
    alone.append(find_neighbours(SmallLpips(), real, fake, CPU, labels=(torch.arange(67) % 3, torch.arange(70) % 3)))
    expected = [tensor for found in alone for tensor in (found.distance, found.index, found.real)]
    for rank in range(2):
        for found, known in zip(torch.load(tmp_path / f"{rank}.pth"), expected, strict=True):
            assert found.dtype == known.dtype and torch.allclose(found, known, rtol=1e-3, atol=1e-5)
