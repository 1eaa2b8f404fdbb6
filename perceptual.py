"""What LPIPS says of samples: whether they are copies of training pictures, and whether G can draw pictures that it was
never shown.

Both take an `vgg.Lpips` on the networks' device, and work in the space where LPIPS is a squared Euclidean distance, so
that each picture goes through VGG-16 once.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import distributed
from data_loader import normalize

SIDE = 64               # pixels: larger pictures are reduced to this before neighbours are sought
SAMPLES = 1000          # that are compared with all training pictures, at the most
REAL = 500              # training pictures that are compared with all others, spread evenly
_CHUNK = 64             # pictures at a time
_SCALE = 64.0           # of what is kept as float16, whose smallest numbers would be coarse otherwise


# ---------------------------------------------------------------------------------------------- nearest neighbours


@dataclass
class Neighbours:
    """Each of `samples` samples' LPIPS to the nearest training picture (N,), that picture's index (N,), and the same
    distance of training pictures to their nearest other ones (M,). On the CPU.
    """

    distance: torch.Tensor
    index: torch.Tensor
    real: torch.Tensor

    def scores(self):
        """{name: float}. `nearest`: the median sample's distance over the median training picture's; far under 1 is
        copying. `nearest_copies`: the share of samples nearer to a training picture than all but 1 % of training
        pictures are to each other; 0.01 is what new pictures of the same kind would get. Where more of them come twice
        it is the share nearer than a hundredth of what is usual.
        """
        usual = self.real.median().clamp(min=1e-12)
        copies = (self.distance < torch.maximum(self.real.quantile(0.01), 0.01 * usual)).double().mean()
        return {"nearest": (self.distance.median() / usual).item(), "nearest_copies": copies.item()}


@torch.no_grad()
def nearest(lpips, real, fake, place, usual=None):
    """The `Neighbours` of two sets of uint8 pictures (N, 3, S, S): for the first `SAMPLES` of `fake` among all of
    `real`, and for `REAL` of `real` among the others. Processes share the work, all must call this.

    `usual`: the `real` of earlier Neighbours of the same pictures, which need not be sought again.
    """
    M = len(real)
    asked = torch.arange(min(M, REAL) if usual is None else 0) * M // min(M, REAL)
    mine = [torch.arange(place.rank, count, place.world) for count in (min(len(fake), SAMPLES), len(asked))]
    asked = asked[mine[1]]
    queries = _embed(lpips, ((fake, mine[0].tolist()), (real, asked.tolist())), place)
    itself = torch.cat([torch.full((len(mine[0]),), -1), asked]).to(place.device)
    distance = torch.full((len(queries),), torch.inf, device=place.device)
    index = torch.zeros(len(queries), dtype=torch.long, device=place.device)
    norms = torch.cat([part.float().square().sum(1) for part in queries.split(_CHUNK)])
    with distributed.progress(M, "picture", "neighbours") as progress:
        for start in range(0, M, _CHUNK):
            keys = _embed_chunk(lpips, real[start:start + _CHUNK], place).float()
            square = keys.square().sum(1)
            numbers = torch.arange(start, start + len(keys), device=place.device)
            for part in torch.arange(len(queries), device=place.device).split(_CHUNK):
                apart = norms[part, None] + square - 2 * queries[part].float() @ keys.T         # (64, 64)
                apart = apart.masked_fill(itself[part, None] == numbers, torch.inf)
                best, at = apart.min(1)
                closer = best < distance[part]
                distance[part] = torch.where(closer, best, distance[part])
                index[part] = torch.where(closer, numbers[at], index[part])
            progress.update(len(keys))
    distance = distance.clamp(min=0) / _SCALE**2
    shares = distributed.gather([(number.tolist(), found.cpu(), at.cpu()) for number, found, at in zip(
        mine, distance.split([len(mine[0]), len(mine[1])]), index.split([len(mine[0]), len(mine[1])]), strict=True)])
    (of_fake, at), (of_real, _) = (_in_order([share[k] for share in shares]) for k in (0, 1))
    return Neighbours(of_fake, at, of_real if usual is None else usual)


def _in_order(shares):
    """Several processes' [(numbers, distances, indices)] as (distances, indices) in the order of the numbers."""
    order = torch.tensor([number for numbers, _, _ in shares for number in numbers]).argsort()
    return tuple(torch.cat([share[k] for share in shares])[order] for k in (1, 2))


def _embed(lpips, chosen, place):
    """float16 (N, D) of pictures, from ((set, numbers), ...) in this order. D is some 500,000: no copy is made."""
    total, at, points = sum(len(numbers) for _, numbers in chosen), 0, None
    with distributed.progress(total, "picture", "samples and training pictures") as progress:
        for pictures, numbers in chosen:
            for start in range(0, len(numbers), _CHUNK):
                part = _embed_chunk(lpips, pictures_at(pictures, numbers[start:start + _CHUNK]), place)
                points = part.new_empty(total, part.shape[1]) if points is None else points
                points[at:at + len(part)] = part
                at += len(part)
                progress.update(len(part))
    if points is None:                                  # of many processes one may have nothing to ask
        return _embed_chunk(lpips, chosen[0][0][0:1], place)[:0]
    return points


def pictures_at(pictures, numbers):
    """Those of a set: uint8 (len(numbers), 3, S, S)."""
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return pictures[numbers[0]:numbers[0] + len(numbers)]           # at once: decoders run beside each other
    return torch.cat([pictures[number:number + 1] for number in numbers])


def _embed_chunk(lpips, pictures, place):
    # both sides of every comparison are rounded alike: copies are at distance 0
    return (_SCALE * lpips.embed(reduced(normalize(pictures.to(place.device))))).half()


def reduced(images):
    """Images in [-1, 1], at most SIDE px: as large as neighbours are sought at."""
    if images.shape[-1] <= SIDE:
        return images
    return F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True)


# --------------------------------------------------------------------------------------------------- back-tracking

STARTS = 256            # samples of which the one nearest to a picture is where its search starts
RATE, MSE_WEIGHT = 0.1, 0.2


@dataclass
class Backtracked:
    """For each of N pictures what G came closest with: `images` (N, 3, S, S) in [-1, 1], their LPIPS and mean squared
    error (N,), the latter in [-1, 1]'s units. On the CPU.
    """

    images: torch.Tensor
    lpips: torch.Tensor
    mse: torch.Tensor

    def scores(self):
        """{name: float}; lpips_std is the standard deviation over the pictures, 0 for a single one."""
        return {"lpips": self.lpips.mean().item(), "lpips_std": self.lpips.std(correction=0).item(),
                "lpips_mse": self.mse.mean().item()}


def backtrack(G, latents, pictures, lpips, steps, free, seed, place):
    """`Backtracked` of a set of uint8 pictures: Adam on the latent of each, LPIPS + 0.2 MSE (FastGAN section 4).

    G: in eval mode, frozen. `free`: how many of the latent's first numbers Adam may change (z_dim: not the metadata).
    Each search starts at the nearest of `STARTS` samples of `seed`, and the best step counts. Processes share the
    pictures, all must call this.
    """
    z = torch.cat([next(chunks) for chunks in [latents.of_seed(seed)] for _ in range(STARTS // 64)]).to(place.device)
    mine = list(range(place.rank, len(pictures), place.world))
    S = pictures[0:1].shape[-1]
    batch = max(1, min(16, 16 * 64**2 // S**2))
    groups = [mine[start:start + batch] for start in range(0, len(mine), batch)]
    seen = _of_samples(lpips, G, z, batch) if groups else None
    found = []
    with distributed.progress(len(groups) * steps, "step", "back-tracking") as progress:
        for group in groups:
            target = normalize(pictures_at(pictures, group).to(place.device))
            start = _nearest_samples(lpips, seen, target)
            found.append(_search(G, lpips, z[start], target, steps, free, progress))
    shares = distributed.gather([mine, *(torch.cat(parts) for parts in zip(*found, strict=True))] if found else None)
    shares = [share for share in shares if share is not None]
    order = torch.tensor([number for share in shares for number in share[0]]).argsort()
    return Backtracked(*(torch.cat([share[k] for share in shares])[order] for k in (1, 2, 3)))


@torch.no_grad()
def _of_samples(lpips, G, z, batch):
    """The points (STARTS, D) float16 of G's images of z, on the CPU."""
    return torch.cat([(_SCALE * lpips.embed(reduced(G(part)[0]))).half().cpu() for part in z.split(batch)])


@torch.no_grad()
def _nearest_samples(lpips, seen, target):
    """For each target image the number of the sample nearest to it, (B,) on the CPU."""
    points = (_SCALE * lpips.embed(reduced(target))).half().float().cpu()
    distances = [points.square().sum(1)[:, None] + part.float().square().sum(1) - 2 * points @ part.float().T
                 for part in seen.split(_CHUNK)]
    return torch.cat(distances, 1).argmin(1)


def _search(G, lpips, start, target, steps, free, progress):
    """(images, LPIPS, MSE) of the best step for each target image, on the CPU."""
    with torch.no_grad():
        points = lpips.embed(target)                                                # (B, D)
    moving, still = start[:, :free].clone().requires_grad_(True), start[:, free:]
    optimizer = torch.optim.Adam([moving], RATE)
    best = torch.full((len(target),), torch.inf, device=target.device)
    images, errors = torch.zeros_like(target), torch.zeros_like(best)
    for _ in range(steps):
        drawn = G(torch.cat([moving, still], 1))[0]                                 # (B, 3, S, S)
        apart = (lpips.embed(drawn) - points).square().sum(1)                       # (B,): LPIPS
        error = (drawn - target).square().mean((1, 2, 3))
        with torch.no_grad():
            better = apart < best
            best = torch.where(better, apart, best)
            errors = torch.where(better, error, errors)
            images = torch.where(better[:, None, None, None], drawn, images)
        # a sum: each picture's gradient is its own, whatever else is in the batch
        (gradient,) = torch.autograd.grad((apart + MSE_WEIGHT * error).sum(), moving)
        moving.grad = gradient
        optimizer.step()
        progress.update()
    return images.cpu(), best.cpu(), errors.cpu()
