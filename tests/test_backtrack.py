"""LPIPS back-tracking finds the latent of a picture that G can draw, and changes nothing but the latent.

Most tests use `SmallLpips` instead of LPIPS on VGG-16.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import two_processes
from stand_ins import CPU, SmallLpips, pair_distances, random_lpips, smooth, to_others

from data_loader import to_images
from generate.classes import Classes
from generate.latents import Inputs, Latents
from generate.metadata import Bank
from metrics import backtrack
from metrics.backtrack import Backtracked
from pretrained import vgg


class Linear(torch.nn.Module):
    """A linear G. `searched` holds the latents of all search steps."""

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
    """A G whose images fade with every search step, so that the first step is the best."""

    def forward(self, z):
        images = super().forward(z)
        return [image * 0.5 ** len(self.searched) if z.requires_grad else image for image in images]


def plain(z_dim=6):
    return Latents(z_dim)


def drawable(G, width, count, seed=5):
    """Pictures drawn by G from latents that no search starts at."""
    z = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return ((G(z)[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def search(G, latents, pictures, steps=150, net=None, free=None, seed=0):
    return backtrack.backtrack(G, latents, pictures, net or SmallLpips(), steps, free or latents.width, seed, CPU)


def test_what_g_can_draw_is_found_in_the_order_of_the_pictures():
    G = Linear(6)
    pictures = drawable(G, 6, 20)                                       # more than one batch
    found = search(G, plain(), pictures)
    assert found.images.shape == (20, 3, 16, 16) and found.lpips.shape == found.mse.shape == (20,)
    usual = to_others(pair_distances(SmallLpips(), pictures, pictures)).min()
    assert (found.lpips < 1e-3 * usual).all() and (found.mse < 1e-4).all()
    assert (found.images - to_images(pictures)).abs().max() < 0.02
    assert not found.images.requires_grad


def test_what_g_cannot_draw_is_drawn_as_well_as_can_be():
    G, pictures = Linear(6), smooth(3)
    found = search(G, plain(), pictures, 300)
    points = SmallLpips().embed(to_images(pictures)).double()           # (3, 192)
    directions = SmallLpips().embed(G(torch.eye(6))[0]).double()        # (6, 192)
    best = points - points @ torch.linalg.pinv(directions) @ directions
    assert torch.allclose(found.lpips.double(), best.square().sum(1), rtol=1e-2)


def test_the_goal_is_lpips_and_a_fifth_of_the_squared_error():
    class MostlyRed(SmallLpips):
        def embed(self, images):
            return super().embed(images * torch.tensor([1.0, 0.3, 0.1]).view(3, 1, 1))

    def rows(images):                                   # their squared distances are the objective
        return torch.cat([MostlyRed().embed(images), images.flatten(1) * (0.2 / images[0].numel()) ** 0.5], 1).double()

    G, pictures = Linear(6), smooth(3)
    search(G, plain(), pictures, 300, MostlyRed())
    best = rows(to_images(pictures)) @ torch.linalg.pinv(rows(G(torch.eye(6))[0]))
    assert torch.allclose(G.searched[-1].double(), best, atol=0.02)


def test_the_best_step_counts_and_all_numbers_are_its_own():
    G, net = Fading(6), SmallLpips()
    pictures = drawable(G, 6, 3)
    found = search(G, plain(), pictures, 20)
    (first, *_), last = G.searched, G.searched[-1]
    assert len(G.searched) == 20 and not torch.equal(first, last)
    assert torch.allclose(found.images, 0.5 * Linear(6)(first)[0], atol=1e-6), "the first step was the best"
    assert torch.allclose(found.lpips, net(found.images, to_images(pictures)), rtol=1e-4)
    assert torch.allclose(found.mse, (found.images - to_images(pictures)).square().mean((1, 2, 3)), rtol=1e-4)


def test_each_picture_has_a_best_step_of_its_own():
    G = Linear(6)
    pictures = torch.cat([drawable(G, 6, 2), smooth(2)])
    found = search(G, plain(), pictures, 60)
    steps = torch.stack([SmallLpips()(Linear(6)(z)[0], to_images(pictures)) for z in G.searched])       # (60, 4)
    assert len(set(steps.argmin(0).tolist())) > 1
    assert torch.allclose(found.lpips, steps.min(0).values, rtol=1e-4)


def test_a_search_begins_at_the_nearest_of_the_samples():
    G, latents, pictures = Linear(6), plain(), smooth(18)
    search(G, latents, pictures, 1, seed=3)
    batches = latents.seeded_batches(3)
    z = Inputs.cat([next(batches) for _ in range(4)]).z                 # (256, 6)
    distances = (SmallLpips().embed(to_images(pictures))[:, None] - SmallLpips().embed(G(z)[0])).square().sum(2)
    assert torch.equal(torch.cat(G.searched), z[distances.argmin(1)])
    assert distances.argmin(1).max() > 192, "of all 256"


class OfClasses(Linear):
    """A G whose classes draw the same pictures in other colours."""

    def forward(self, z, labels):
        return [image + (labels[:, None, None, None] - 1) / 2 for image in super().forward(z)]


def test_a_search_keeps_to_the_class_of_its_picture():
    G, latents = OfClasses(6), Latents(6, classes=Classes(("dark", "grey", "light"), (5, 5, 5)))
    z, labels = torch.randn(4, 6, generator=torch.Generator().manual_seed(5)), torch.tensor([2, 0, 2, 1])
    pictures = ((G(z, labels)[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    lpips = [backtrack.backtrack(G, latents, pictures, SmallLpips(), 150, 6, 0, CPU, wanted).lpips
             for wanted in (labels, (labels + 1) % 3, None)]
    assert (lpips[1] > 10 * lpips[0].max()).all(), "found in its own class, not in another"
    assert len(lpips[2]) == 4, "and without classes from the nearest of all"


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
    class RedAlone(SmallLpips):
        def embed(self, images):
            return super().embed(images[:, :1])

    G = Linear(30)
    pictures = drawable(G, 30, 2)
    first, last = (search(G, plain(30), pictures, steps, RedAlone()).mse for steps in (1, 200))
    assert (last < 0.02 * first).all()


def test_large_images_go_in_small_batches_and_are_compared_whole():
    G, net, pictures = Linear(6, size=128), SmallLpips(), smooth(5, size=128)
    found = search(G, plain(), pictures, 2, net)
    assert [len(z) for z in G.searched] == [4, 4, 1, 1]
    assert {shape[2:] for shape in net.seen} == {(64, 64), (128, 128)}
    assert found.images.shape == pictures.shape
    assert torch.allclose(found.lpips, SmallLpips()(found.images, to_images(pictures)), rtol=1e-3)


def test_the_scores_are_means_and_the_spread_over_the_pictures():
    found = Backtracked(torch.zeros(2, 3, 16, 16), torch.tensor([0.25, 0.75]), torch.tensor([0.0, 0.5]))
    assert found.scores() == {"lpips": 0.5, "lpips_std": 0.25, "lpips_mse": 0.25}
    single = Backtracked(torch.zeros(1, 3, 16, 16), torch.tensor([0.25]), torch.tensor([0.5]))
    assert single.scores() == {"lpips": 0.25, "lpips_std": 0.0, "lpips_mse": 0.5}


@pytest.mark.soak
def test_with_vgg_a_search_comes_nearer(monkeypatch):
    monkeypatch.setattr(backtrack, "STARTS", 64)
    G, net = Linear(6, size=16), random_lpips()
    pictures = drawable(G, 6, 2)
    first, last = (search(G, plain(), pictures, steps, net) for steps in (1, 8))
    assert (last.lpips < 0.9 * first.lpips).all()
    with torch.no_grad():
        assert torch.allclose(last.lpips, net(last.images, to_images(pictures)), rtol=1e-3)


# ---- several processes ----


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from device import distributed
from metrics.backtrack import backtrack
from parameter import resolve
from stand_ins import SmallLpips, smooth
from test_backtrack import Linear, plain
place = distributed.start(resolve({{"device": "cpu"}}))
assert place.world_size == 2
seen = []
for count in (5, 1):                                    # with a single picture rank 1 has no work
    found = backtrack(Linear(6), plain(), smooth(67)[:count], SmallLpips(), 20, 6, 0, place)
    seen += [found.images, found.lpips, found.mse]
torch.save(seen, {str(tmp_path)!r} + f"/{{place.rank}}.pth")
distributed.barrier()
distributed.stop()
""")
    # the exit code is not checked: gloo sometimes aborts a process at exit, after the results are written
    result = two_processes(script)
    assert (tmp_path / "0.pth").exists() and (tmp_path / "1.pth").exists(), result.stderr
    alone = [search(Linear(6), plain(), smooth(67)[:count], 20) for count in (5, 1)]
    expected = [tensor for found in alone for tensor in (found.images, found.lpips, found.mse)]
    for rank in range(2):
        for found, known in zip(torch.load(tmp_path / f"{rank}.pth"), expected, strict=True):
            assert found.dtype == known.dtype and torch.allclose(found, known, rtol=1e-3, atol=1e-5)
