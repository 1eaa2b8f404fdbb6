"""What LPIPS says of samples: copies of training pictures are found, and what G can draw is drawn.

Where VGG-16 is not the point, a network of one small layer takes its place: `Plain`.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import two_processes

from data_loader import to_images
from device.distributed import Place
from generate.latents import Latents
from generate.metadata import Bank
from metrics import backtrack, nearest
from metrics.backtrack import Backtracked, backtrack
from metrics.nearest import Neighbours, find_neighbours
from pretrained import lpips, vgg

CPU = Place(torch.device("cpu"))


class Plain:
    """In the place of vgg.Lpips: 192 numbers of each image. Remembers the shapes of the images that it has seen."""

    def __init__(self):
        self.seen = []

    def embed(self, images):
        self.seen.append(tuple(images.shape))
        return F.adaptive_avg_pool2d(images, 8).flatten(1) / 10

    def __call__(self, a, b):
        return (self.embed(a) - self.embed(b)).square().sum(1)


@pytest.fixture(scope="module")
def lpips():
    return lpips.load_lpips("random")


def smooth(n, size=16, seed=0):
    """Random pictures of one kind, uint8 (n, 3, size, size)."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def touched(pictures, seed=0):
    """The pictures, of which each number is changed by 3 at the most."""
    noise = torch.randint(-3, 4, pictures.shape, generator=torch.Generator().manual_seed(seed))
    return (pictures.int() + noise).clamp(0, 255).to(torch.uint8)


def table(lpips, a, b):
    """The distances of all pairs (len(a), len(b)) in double precision, straight from the definition."""
    a, b = (lpips.embed(to_images(pictures)).double() for pictures in (a, b))
    return (a[:, None] - b).square().sum(2)


def others(distances):
    """A square table in which nothing is near to itself."""
    return distances.fill_diagonal_(torch.inf)


# ---------------------------------------------------------------- nearest neighbours


def test_a_copy_is_found_at_distance_zero():
    real, fake = smooth(67), smooth(70, seed=1)
    copies = {0: 66, 63: 64, 64: 0, 69: 63}                             # at both sides of the chunks' borders
    for sample, picture in copies.items():
        fake[sample] = real[picture]
    found = find_neighbours(Plain(), real, fake, CPU)
    usual = found.real.median()
    assert {sample: found.index[sample].item() for sample in copies} == copies
    assert (found.distance >= 0).all() and (found.distance[list(copies)] < 1e-5 * usual).all()
    assert ((found.distance < 0.1 * usual).nonzero()[:, 0] == torch.tensor(sorted(copies))).all()


@pytest.mark.parametrize(("M", "N"), [(67, 70), (64, 64), (1, 3), (130, 1)])
def test_everybody_finds_who_is_nearest_of_all(M, N):
    real, fake = smooth(M), smooth(N, seed=1)
    found = find_neighbours(Plain(), real, fake, CPU)
    distances = table(Plain(), fake, real)
    assert found.index.dtype == torch.long and torch.equal(found.index, distances.argmin(1))
    assert torch.allclose(found.distance.double(), distances.min(1).values, rtol=2e-3)
    assert torch.allclose(found.real.double(), others(table(Plain(), real, real)).min(1).values, rtol=2e-3)


def test_a_training_picture_is_not_its_own_neighbour_but_its_duplicate_is():
    real = smooth(67)
    assert (find_neighbours(Plain(), real, smooth(3, seed=1), CPU).real > 0.01).all()
    real[65] = real[2]
    alone = torch.ones(67, dtype=torch.bool).index_fill(0, torch.tensor([2, 65]), False)
    distances = find_neighbours(Plain(), real, smooth(3, seed=1), CPU).real
    assert (distances[alone] > 0.01).all() and (distances[~alone] < 1e-5).all()


def test_what_is_compared_is_bounded_and_evenly_spread(monkeypatch):
    monkeypatch.setattr(nearest, "SAMPLES", 5)
    monkeypatch.setattr(nearest, "REAL", 10)
    real, fake, lpips = smooth(67), smooth(70, seed=1), Plain()
    found = find_neighbours(lpips, real, fake, CPU)
    assert sum(shape[0] for shape in lpips.seen) == 5 + 10 + 67, "nothing goes through the network in vain"
    whole = table(Plain(), fake[:5], real)
    assert torch.equal(found.index, whole.argmin(1)), "among all training pictures"
    asked = [i * 67 // 10 for i in range(10)]
    expected = others(table(Plain(), real, real)).min(1).values[asked]
    assert torch.allclose(found.real.double(), expected, rtol=2e-3)


def test_what_is_usual_need_not_be_sought_twice():
    real, fake, lpips = smooth(67), smooth(9, seed=1), Plain()
    first = find_neighbours(Plain(), real, smooth(4, seed=2), CPU)
    found, whole = find_neighbours(lpips, real, fake, CPU, first.real), find_neighbours(Plain(), real, fake, CPU)
    assert torch.equal(found.index, whole.index) and torch.allclose(found.distance, whole.distance, rtol=1e-3)
    assert torch.equal(found.real, first.real) and found.scores() == pytest.approx(whole.scores(), rel=1e-3)
    assert sum(shape[0] for shape in lpips.seen) <= 9 + 67 + 1


def test_large_pictures_are_reduced_before_they_are_compared():
    real, lpips = smooth(4, size=96), Plain()
    stripes = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    stripes[..., ::2] = 200                                             # grey once reduced, whichever way it is shifted
    find_neighbours(lpips, real, stripes, CPU)
    assert {shape[2:] for shape in lpips.seen} == {(64, 64)}
    assert (nearest.reduced(to_images(stripes)) - (200 / 255 - 1))[..., 8:-8].abs().max() < 0.15
    for size in (64, 48):
        small = to_images(smooth(2, size=size))
        assert nearest.reduced(small) is small


def test_sets_are_only_ever_sliced():
    """So that decoders and generators can stand behind them."""
    class Sliced:
        def __init__(self, pictures):
            self.pictures = pictures

        def __len__(self):
            return len(self.pictures)

        def __getitem__(self, part):
            assert isinstance(part, slice)
            return self.pictures[part]

    real, fake = smooth(67), smooth(9, seed=1)
    expected, found = (find_neighbours(Plain(), wrap(real), wrap(fake), CPU) for wrap in (lambda same: same, Sliced))
    assert torch.equal(found.distance, expected.distance) and torch.equal(found.real, expected.real)
    assert torch.equal(nearest.pictures_at(Sliced(real), [5, 2, 66]), real[[5, 2, 66]])
    assert torch.equal(nearest.pictures_at(Sliced(real), [5, 6, 7]), real[5:8])


def test_scores_tell_copies_from_new_pictures_of_the_same_kind():
    real = smooth(300)
    new = find_neighbours(Plain(), real, smooth(100, seed=1), CPU).scores()
    copied = find_neighbours(Plain(), real, touched(real[:100]), CPU).scores()
    assert new["nearest"] == pytest.approx(1, abs=0.1) and new["nearest_copies"] < 0.1
    assert copied["nearest"] < 0.05 and copied["nearest_copies"] == 1
    assert all(type(number) is float for number in (new | copied).values())


def test_scores_are_medians_and_the_share_below_the_first_percent():
    real = torch.arange(101) + 1.0                                      # median 51, first percent 2
    real[-1] = 5000
    found = Neighbours(torch.tensor([1.0, 1.5, 2000, 25.5, 60, 4, 70, 80, 3, 5]), torch.zeros(10).long(), real.flip(0))
    assert found.scores() == {"nearest": pytest.approx(5 / 51), "nearest_copies": pytest.approx(0.2)}


def test_copies_are_told_even_where_training_pictures_come_twice():
    real = smooth(100)
    real[97:] = real[:3]                                                # the first percent is at distance 0
    assert find_neighbours(Plain(), real, real[10:50], CPU).scores()["nearest_copies"] == 1
    assert find_neighbours(Plain(), real, smooth(40, seed=1), CPU).scores()["nearest_copies"] == 0


def test_equal_training_pictures_give_numbers():
    real = smooth(1).expand(5, -1, -1, -1)
    assert all(np.isfinite(number) for number in find_neighbours(Plain(), real, smooth(3, seed=1), CPU).scores().values())


def test_with_vgg_distances_are_those_of_lpips(lpips):
    real, fake = smooth(4, size=32), smooth(3, size=32, seed=1)
    fake[1] = real[3]
    with torch.no_grad():
        distances = torch.stack([lpips(*(to_images(pair) for pair in (real, picture.expand_as(real))))
                                 for picture in fake])                  # (3, 4)
        assert torch.allclose(table(lpips, fake, real).float(), distances, rtol=1e-3, atol=1e-6)
        apart = torch.stack([lpips(to_images(real), to_images(picture.expand_as(real))) for picture in real])
    found = find_neighbours(lpips, real, fake, CPU)
    assert found.index[1] == 3 and found.distance[1] < 1e-4 * distances.median()
    assert torch.equal(found.index, distances.argmin(1))
    assert torch.allclose(found.distance, distances.min(1).values, rtol=1e-2, atol=1e-5)
    assert torch.allclose(found.real, others(apart).min(1).values, rtol=1e-2)


# ---------------------------------------------------------------- back-tracking


class Linear(torch.nn.Module):
    """A G in which every number of the latent moves the image in a direction of its own. Remembers what it was fed."""

    def __init__(self, width, size=16, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(width, 3 * 4 * 4, generator=generator) * 0.2 / width**0.5,
                                         requires_grad=False)
        self.size, self.searched = size, []

    def forward(self, z):
        if z.requires_grad:
            self.searched.append(z.detach().clone())
        image = F.interpolate((z @ self.weight).view(-1, 3, 4, 4), self.size)
        return [image, image[..., ::2, ::2]]


class Fading(Linear):
    """The longer it is asked in a search, the less it draws of what it could."""

    def forward(self, z):
        images = super().forward(z)
        return [image * 0.5 ** len(self.searched) if z.requires_grad else image for image in images]


def plain(z_dim=6):
    return Latents(z_dim)


def drawable(G, width, count, seed=5):
    """Pictures that G draws from latents other than those of the searches' beginnings."""
    z = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return ((G(z)[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def search(G, latents, pictures, steps=150, lpips=None, free=None, seed=0):
    return backtrack(G, latents, pictures, lpips or Plain(), steps, free or latents.width, seed, CPU)


def test_what_g_can_draw_is_found_in_the_order_of_the_pictures():
    G = Linear(6)
    pictures = drawable(G, 6, 20)                                       # more than go into a batch
    found = search(G, plain(), pictures)
    assert found.images.shape == (20, 3, 16, 16) and found.lpips.shape == found.mse.shape == (20,)
    usual = others(table(Plain(), pictures, pictures)).min()
    assert (found.lpips < 1e-3 * usual).all() and (found.mse < 1e-4).all()
    assert (found.images - to_images(pictures)).abs().max() < 0.02
    assert not found.images.requires_grad


def test_what_g_cannot_draw_is_drawn_as_well_as_can_be():
    G, pictures = Linear(6), smooth(3)
    found = search(G, plain(), pictures, 300)
    points = Plain().embed(to_images(pictures)).double()                # (3, 192)
    directions = Plain().embed(G(torch.eye(6))[0]).double()             # (6, 192)
    best = points - points @ torch.linalg.pinv(directions) @ directions
    assert torch.allclose(found.lpips.double(), best.square().sum(1), rtol=1e-2)


def test_the_goal_is_lpips_and_a_fifth_of_the_squared_error():
    class MostlyRed(Plain):
        def embed(self, images):
            return super().embed(images * torch.tensor([1.0, 0.3, 0.1]).view(3, 1, 1))

    def rows(images):                                   # whose squared distances are the goal
        return torch.cat([MostlyRed().embed(images), images.flatten(1) * (0.2 / images[0].numel()) ** 0.5], 1).double()

    G, pictures = Linear(6), smooth(3)
    search(G, plain(), pictures, 300, MostlyRed())
    best = rows(to_images(pictures)) @ torch.linalg.pinv(rows(G(torch.eye(6))[0]))
    assert torch.allclose(G.searched[-1].double(), best, atol=0.02)


def test_the_best_step_counts_and_all_numbers_are_its_own():
    G, lpips = Fading(6), Plain()
    pictures = drawable(G, 6, 3)
    found = search(G, plain(), pictures, 20)
    (first, *_), last = G.searched, G.searched[-1]
    assert len(G.searched) == 20 and not torch.equal(first, last)
    assert torch.allclose(found.images, 0.5 * Linear(6)(first)[0], atol=1e-6), "the first step was the best"
    assert torch.allclose(found.lpips, lpips(found.images, to_images(pictures)), rtol=1e-4)
    assert torch.allclose(found.mse, (found.images - to_images(pictures)).square().mean((1, 2, 3)), rtol=1e-4)


def test_each_picture_has_a_best_step_of_its_own():
    G = Linear(6)
    pictures = torch.cat([drawable(G, 6, 2), smooth(2)])
    found = search(G, plain(), pictures, 60)
    steps = torch.stack([Plain()(Linear(6)(z)[0], to_images(pictures)) for z in G.searched])    # (60, 4)
    assert len(set(steps.argmin(0).tolist())) > 1
    assert torch.allclose(found.lpips, steps.min(0).values, rtol=1e-4)


def test_a_search_begins_at_the_nearest_of_the_samples():
    G, latents, pictures = Linear(6), plain(), smooth(18)
    search(G, latents, pictures, 1, seed=3)
    chunks = latents.seeded_batches(3)
    z = torch.cat([next(chunks) for _ in range(4)])                     # 256
    distances = (Plain().embed(to_images(pictures))[:, None] - Plain().embed(G(z)[0])).square().sum(2)
    assert torch.equal(torch.cat(G.searched), z[distances.argmin(1)])
    assert distances.argmin(1).max() > 192, "of all 256"


@pytest.fixture
def with_metadata():
    rows = torch.randn(5, 512, generator=torch.Generator().manual_seed(2)).half()
    return Latents(6, Bank(rows, "relu5_3", vgg.FILE.sha256, "none"))


@pytest.mark.parametrize(("free", "kept"), [(6, True), (518, False)])
def test_only_what_is_free_moves(with_metadata, free, kept):
    G = Linear(with_metadata.width)
    search(G, with_metadata, smooth(3), 5, free=free)
    first, last = G.searched[0], G.searched[-1]
    assert first.shape == (3, 518) and len(G.searched) == 5
    assert (first[:, :6] != last[:, :6]).all()
    assert torch.equal(first[:, 6:], last[:, 6:]) == kept
    assert kept or (first[:, 6:] != last[:, 6:]).all()


def test_no_picture_depends_on_the_others_of_its_batch():
    G = Linear(6)
    pictures = torch.cat([smooth(2), drawable(G, 6, 15)])
    whole = search(G, plain(), pictures, 40)
    for number in (0, 5, 16):
        alone = search(G, plain(), pictures[number:number + 1], 40)
        assert torch.allclose(alone.images[0], whole.images[number], atol=1e-4)
        assert torch.allclose(alone.lpips[0], whole.lpips[number], rtol=1e-3, atol=1e-7)


def test_the_same_search_gives_the_same_bits_and_another_seed_another_beginning():
    G, pictures = Linear(6), smooth(3)
    before = torch.get_rng_state()
    one, same, other = (search(G, plain(), pictures, 5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.images, same.images) and torch.equal(one.lpips, same.lpips)
    assert torch.equal(one.mse, same.mse) and not torch.equal(one.images, other.images)


def test_what_lpips_does_not_see_is_left_to_the_squared_error():
    class RedAlone(Plain):
        def embed(self, images):
            return super().embed(images[:, :1])

    G = Linear(30)
    pictures = drawable(G, 30, 2)
    first, last = (search(G, plain(30), pictures, steps, RedAlone()).mse for steps in (1, 200))
    assert (last < 0.02 * first).all()


def test_large_images_go_in_small_batches_and_are_compared_whole():
    G, lpips, pictures = Linear(6, size=128), Plain(), smooth(5, size=128)
    found = search(G, plain(), pictures, 2, lpips)
    assert [len(z) for z in G.searched] == [4, 4, 1, 1]
    assert {shape[2:] for shape in lpips.seen} == {(64, 64), (128, 128)}
    assert found.images.shape == pictures.shape
    assert torch.allclose(found.lpips, Plain()(found.images, to_images(pictures)), rtol=1e-3)


def test_the_scores_are_means_and_the_spread_over_the_pictures():
    found = Backtracked(torch.zeros(2, 3, 16, 16), torch.tensor([0.25, 0.75]), torch.tensor([0.0, 0.5]))
    assert found.scores() == {"lpips": 0.5, "lpips_std": 0.25, "lpips_mse": 0.25}
    single = Backtracked(torch.zeros(1, 3, 16, 16), torch.tensor([0.25]), torch.tensor([0.5]))
    assert single.scores() == {"lpips": 0.25, "lpips_std": 0.0, "lpips_mse": 0.5}


def test_with_vgg_a_search_comes_nearer(lpips, monkeypatch):
    monkeypatch.setattr(backtrack, "STARTS", 64)
    G = Linear(6, size=32)
    pictures = drawable(G, 6, 2)
    first, last = (search(G, plain(), pictures, steps, lpips) for steps in (1, 8))
    assert (last.lpips < 0.9 * first.lpips).all()
    with torch.no_grad():
        assert torch.allclose(last.lpips, lpips(last.images, to_images(pictures)), rtol=1e-3)


# ---------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(vgg.__file__.replace("vgg.py", "tests"))!r})
import torch, distributed, test_perceptual as t
from parameter import resolve
place = distributed.start(resolve({{"device": "cpu"}}))
assert place.world_size == 2
real, fake = t.smooth(67), t.smooth(70, seed=1)
seen = []
for M, N in ((67, 70), (3, 1), (1, 3)):
    found = t.nearest(t.Plain(), real[:M], fake[:N], place)
    seen.append([found.distance, found.index, found.real])
for count in (5, 1):                                    # of a single picture the second process has none
    found = t.backtrack(t.Linear(6), t.plain(), real[:count], t.Plain(), 20, 6, 0, place)
    seen.append([found.images, found.lpips, found.mse])
torch.save(seen, {str(tmp_path)!r} + f"/{{place.rank}}.pth")
distributed.barrier()
distributed.stop()
""")
    # not its exit code: gloo's threads now and then abort a process that is ending, when both have written
    result = two_processes(script)
    assert (tmp_path / "0.pth").exists() and (tmp_path / "1.pth").exists(), result.stderr
    one, other = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    real, fake = smooth(67), smooth(70, seed=1)
    alone = [find_neighbours(Plain(), real[:M], fake[:N], CPU) for M, N in ((67, 70), (3, 1), (1, 3))]
    expected = [[found.distance, found.index, found.real] for found in alone]
    alone = [search(Linear(6), plain(), real[:count], 20) for count in (5, 1)]
    expected += [[found.images, found.lpips, found.mse] for found in alone]
    for rank in (one, other):
        for found, known in zip(sum(rank, []), sum(expected, []), strict=True):
            assert found.dtype == known.dtype and torch.allclose(found, known, rtol=1e-3, atol=1e-5)
