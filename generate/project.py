"""--mode project: the closest that G can draw to a given picture, and the latent of it.

Adam optimizes latents from the nearest of some samples, on LPIPS + 0.2 MSE (FastGAN section 4); where VGG-16 is not to
be had, on the pixels at several sizes. `search` serves `--metrics lpips`, too.
"""

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from data_loader import to_images
from dataset.check import sample_levels
from dataset.decode import (
    NO_LEVELS,
    UnusablePicture,
    look,
    measure_levels,
    picture_size,
    printable,
    read_picture,
)
from dataset.images import EncodedDataset
from dataset.table import CELEBA_CROP, DATASETS
from device.distributed import progress, say
from errors import DataError, UsageError, first_line
from flags.pictures import PictureShape
from gallery import film, grid, sheets
from generate.classes import require_classes
from generate.latents import Inputs, save_latents
from generate.trained import as_file_part, load_generator
from pretrained import lpips
from utils import Adam, as_rgb

FALLBACK_HINT = "--vgg_weights PATH"
CANDIDATES = 256        # samples whose nearest ones are starts
STARTS = 4              # searches for each target; the best one counts
RATE, MSE_WEIGHT = 0.1, 0.2
FRAMES = 60             # of the film of a search, about
CHUNK = 16              # candidates at once
CELEBA_SIZE = 178, 218  # of an aligned picture of CelebA, in pixels


@dataclass
class Found:
    """G's best image for each of B targets: its `inputs`, `images` (B, C, H, W) in [-1, 1], their `lpips` (B,) and mean
    squared error `mse` (B,), on the scale of [-1, 1]. On the CPU.
    """

    inputs: Inputs
    images: torch.Tensor
    lpips: torch.Tensor
    mse: torch.Tensor


def search(G, net, start, target, steps, free, advance, watch=lambda step, images: None):
    """Optimize the first `free` dimensions of the latents of `start`, B Inputs, each for its target (B, C, H, W).

    G is frozen, in eval mode; `net` is an Lpips, or Pixels. Return `Found`, the step of lowest distance of each. Each
    step calls `advance()` and `watch(step, images)`.
    """
    with torch.no_grad():
        target_embedding = net.embed(target)                            # (B, D)
    optimized, fixed = start.z[:, :free].clone().requires_grad_(True), start.z[:, free:]
    optimizer = Adam([optimized], RATE)
    best = torch.full((len(target),), torch.inf, device=target.device)
    images, errors, latents = torch.zeros_like(target), torch.zeros_like(best), start.z.clone()
    for step in range(steps):
        latent = Inputs(torch.cat([optimized, fixed], 1), start.labels)
        fake = G(**latent.as_arguments())[0]                            # (B, C, H, W)
        distance = (net.embed(fake) - target_embedding).square().sum(1)     # (B,): LPIPS
        error = (fake - target).square().mean((1, 2, 3))                # (B,): MSE
        with torch.no_grad():
            better = distance < best
            best = torch.where(better, distance, best)
            errors = torch.where(better, error, errors)
            images = torch.where(better[:, None, None, None], fake, images)
            latents = torch.where(better[:, None], latent.z, latents)
            watch(step, fake)
        # sum, not mean: a picture's gradient does not depend on the batch size
        (gradient,) = torch.autograd.grad((distance + MSE_WEIGHT * error).sum(), optimized)
        optimized.grad = gradient
        optimizer.step()
        advance()
    return Found(replace(start, z=latents).to("cpu"), images.cpu(), best.cpu(), errors.cpu())


def project(config, place, precision):
    """Find what G draws closest to each `--target`: write a picture target | found | difference, a film of the search
    and the latent as .npz, for `--latents`. Return exit code 0.

    Raise UsageError, DataError, CheckpointError.
    """
    if not config.target:
        raise UsageError("--mode project: say which pictures, with --target a.jpg b.jpg ...")
    film.require(config.film)
    targets = {path: _read(path, config) for path in config.target}
    trained = load_generator(config, place, precision)
    trained.G.requires_grad_(False)
    candidates = _candidates(config, trained)
    net, measure = _load_distance(config)
    net.to(place.device)
    trained.create_folder()
    with progress(len(targets) * config.backtrack_steps, "step", "projecting") as bar:
        paths = [_project(config, trained, (net, measure), candidates, *target, bar) for target in targets.items()]
    trained.finish(config, f"{len(paths)} picture{'s' * (len(paths) > 1)} projected by step {trained.step}: "
                   f"{', '.join(map(str, paths))}; as pictures, and as latents for --latents, beside them")
    return 0


class Pixels(torch.nn.Module):
    """A distance that needs no weights: the mean squared error of images at full, half, ... 1/16 size. As Lpips."""

    def embed(self, images):
        """Return embeddings (B, D) of images (B, C, H, W) whose squared Euclidean distances are that error."""
        images, parts = as_rgb(images), []
        for scale in (1, 2, 4, 8, 16):
            small = torch.nn.functional.avg_pool2d(images, scale).flatten(1)
            parts.append(small / (5 * small.size(1)) ** 0.5)
        return torch.cat(parts, 1)


def _load_distance(config):
    """Return (what `search` minimizes, its name): LPIPS, or if VGG-16 is not to be had, which it says, Pixels. Raise
    UsageError, DataError of `--vgg_weights PATH`.
    """
    try:
        net = lpips.load_lpips(config.vgg_weights, FALLBACK_HINT)
    except (DataError, UsageError) as error:
        if config.vgg_weights != "imagenet":
            raise
        say(f"note: without LPIPS, by pixels alone, which finds colours rather than contents: {first_line(error)}")
        return Pixels(), "pixel distance"
    return net, "LPIPS of random weights" if config.vgg_weights == "random" else "LPIPS"


def _read(path, config):
    """Return a target (1, C, H, W) in [-1, 1], decoded as training pictures are. Raise DataError."""
    of_celeba = False
    if config.dataset == "celeb":                       # an aligned one is cropped, other photographs are not
        with contextlib.suppress(OSError), open(path, "rb") as file:
            of_celeba = picture_size(file) == CELEBA_SIZE
    try:
        picture = read_picture(path, PictureShape.of_config(config), CELEBA_CROP if of_celeba else None,
                               config.max_pixels, _levels(path, config))
    except UnusablePicture as error:
        raise DataError(f"--target {printable(path)}: {error.reason}") from None
    except DataError as error:
        raise DataError(f"--target {printable(path) or repr(path)}: {error}") from None
    return to_images(picture[None])


def _levels(path, config):
    """Return what maps the values of a target to 0..255: if it has more than 8 bits the Levels of the training
    pictures, which it says, or its own where these are not at hand. Raise DataError.
    """
    try:
        with open(path, "rb") as file:
            traits = look(file, os.path.getsize(path), max_pixels=config.max_pixels)
    except OSError:
        return NO_LEVELS                                # said when it is read
    if not traits.kind:
        return NO_LEVELS
    with contextlib.suppress(DataError):
        dataset = DATASETS[config.dataset](config)
        levels = isinstance(dataset, EncodedDataset) and sample_levels(dataset)
        if levels:
            say(f"{printable(path)}: has more than 8 bits, mapped to 0..255 as the training pictures are")
            return levels
    say(f"{printable(path)}: has more than 8 bits, mapped to 0..255 by its own range, as the training pictures have 8 "
        "or are not at hand")
    return measure_levels([traits])


def _candidates(config, trained):
    """Return the Inputs of CANDIDATES samples of `--seed`, of all classes or of those of `--classes`."""
    batches = trained.latents.seeded_batches(config.seed)
    candidates = Inputs.cat([next(batches) for _ in range(CANDIDATES // 64)])
    if config.classes is None:
        return candidates
    chosen = torch.tensor(require_classes(trained.latents.classes).choose(config.classes))
    return replace(candidates, labels=chosen.repeat(-(-CANDIDATES // len(chosen)))[:CANDIDATES])


def _project(config, trained, distance, candidates, path, target, bar):
    """Search for one target (1, C, H, W) and write what was found. Return the path of the picture."""
    device, frames = trained.precision.device, []
    net, measure = distance
    target = target.to(device)
    start = candidates[_nearest(trained, net, candidates, target)].to(device)
    every = max(1, config.backtrack_steps // FRAMES)

    def watch(step, images):
        if step % every == 0:
            frames.append(grid.to_uint8(images))        # (STARTS, H, W, C): a quarter of the bytes

    found = search(trained.G, net, start, target.expand(len(start), -1, -1, -1), config.backtrack_steps,
                   trained.latents.width, bar.update, watch)
    best = found.lpips.argmin().item()
    latent = found.inputs[best:best + 1]
    image, target = trained.draw(latent), target.cpu()                  # as --latents will draw it
    out = _unused(trained.path(f"project_{as_file_part(Path(path).stem)}", ".png"))
    found_at, error = f"{measure} {found.lpips[best].item():.3f}", f"MSE {found.mse[best].item():.4f}"
    name = printable(Path(path).name)
    sheets.save_reconstructions(
        {name: torch.cat([target, image, _difference(image, target)])}, out,
        "projection", trained.step, {name: ["target", "closest image of G", "difference"]},
        f"{found_at}, {error}; difference: black where equal" + ", transparency, too" * (image.size(1) == 4))
    shown = (to_images(torch.from_numpy(frame[best:best + 1]).permute(0, 3, 1, 2)) for frame in frames)
    film.save([_frame(target, image) for image in shown], out.with_suffix(f".{config.film}"), config.film)
    save_latents(latent, out.with_suffix(".npz"), trained.latents.classes)
    say(f"{printable(path)}: {found_at}, {error}")
    return out


def _difference(image, target):
    """Return |image - target| as an opaque image (1, C, H, W); of transparent ones that of the colours on white or, if
    it is larger, that of transparency.
    """
    if image.size(1) != 4:
        return (image - target).abs() - 1
    colours = (as_rgb(image) - as_rgb(target)).abs()
    difference = torch.maximum(colours, (image[:, 3:] - target[:, 3:]).abs()) - 1
    return torch.cat([difference, torch.ones_like(image[:, 3:])], 1)


def _frame(target, image):
    """Return target and image (1, C, H, W) side by side, as a Pillow image of at least 256 px in height."""
    zoom = max(1, 256 // image.size(-2))
    pixels = grid.to_visible(torch.cat([target, image], 3))[0]          # (H, 2W, 3)
    return Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1))


@torch.no_grad()
def _nearest(trained, net, candidates, target):
    """Return the numbers of the STARTS candidates whose images are nearest to the target by LPIPS."""
    wanted = net.embed(target)
    distances = [(net.embed(trained.G(**part.to(target.device).as_arguments())[0]) - wanted).square().sum(1).cpu()
                 for part in candidates.split(CHUNK)]
    return torch.cat(distances).argsort()[:STARTS]


def _unused(path):
    """Return the path, with a number behind its name if a file of it is there, whatever the ending."""
    number, free = 2, path
    while any(free.with_suffix(ending).exists() for ending in (".png", ".npz", ".webp", ".gif", ".mp4")):
        free, number = path.with_stem(f"{path.stem}_{number}"), number + 1
    return free
