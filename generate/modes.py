"""The modes that load a checkpoint: samples, a video of an interpolation in latent space, a grid of mixed styles.

They need neither the data set nor, for metadata, VGG-16: the output depends on the seed and the checkpoint alone.
"""

import importlib.util
import math
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset.decode import printable
from device.distributed import progress, say
from device.precision import Precision
from errors import CheckpointError, UsageError
from families import FAMILIES, build_networks, find_mismatch
from gallery import grid, page
from generate.classes import Classes, require_classes
from generate.draw import BN_STATS_IMAGES, batch_for, draw, recompute_bn_stats
from generate.latents import Inputs, Latents
from generate.metadata import Bank
from storage import checkpoint
from storage.folders import RunFolders, step_name
from utils import forked_random_state, spread_indices, write_atomically

FRAMES_PER_SECOND = 20
FRAMES_PER_LEG = 30             # from one latent to the next, about
STYLES = 5                      # styles and contents in a style grid


@dataclass(frozen=True)
class TrainedGenerator:
    """A checkpoint's G_ema in eval mode, its latents, precision, batch size and step, and the folders of its run."""

    G: torch.nn.Module
    latents: Latents
    precision: Precision
    batch: int
    step: int
    folders: RunFolders

    def draw(self, inputs):
        """Generate images (N, 3, imsize, imsize) in [-1, 1] on the CPU."""
        return draw(self.G, inputs, self.precision, self.batch)

    def create_folder(self):
        """Create the folder of the outputs: nothing can be refused any more. Raises OSError."""
        self.folders.samples.mkdir(parents=True, exist_ok=True)

    def path(self, name, config):
        """Path of an output of this step and seed, without suffix."""
        truncation = "" if config.truncation is None else f"_truncation{config.truncation:g}"
        return self.folders.samples / step_name(self.step, f"_{name}_seed{config.seed}{truncation}")

    def finish(self, config, message):
        """Update the run's page and print `message`."""
        classes = self.latents.classes
        page.write_pages(self.folders, config, classes and len(classes))
        say(message)


def load_generator(config, place, precision):
    """Return the TrainedGenerator of `--version` and `--pretrained_model`. Raises CheckpointError."""
    folders = RunFolders.of(config)
    state = checkpoint.load_step(folders.models, config.pretrained_model, say, partial(find_mismatch, config))
    if state is None:
        raise CheckpointError(f"--version {config.version}: no checkpoint in {folders.models}.\n"
                              "Train it first, or name a run with --version (and --model_save_path).")
    classes = Classes.from_state(state.get("classes"))
    G, _ = build_networks(config, place.device, classes)
    G.load_state_dict(state["G_ema"])
    G.eval()
    batch = batch_for(config.imsize)
    latents = Latents(config.z_dim, Bank.from_state(state.get("metadata")), config.metadata_sample, place.device,
                      classes, config.truncation)
    if config.truncation is not None or config.metadata_sample != state["config"].get("metadata_sample"):
        # the checkpoint's batch-norm statistics belong to whole z and to the metadata of its own sampler
        with forked_random_state(place.device):
            generator = torch.Generator().manual_seed(config.seed)
            inputs = latents.sampling(BN_STATS_IMAGES, generator).to(place.device)
            recompute_bn_stats(G, inputs, precision, batch)
    return TrainedGenerator(G, latents, precision, batch, state["step"], folders)


def sample(config, place, precision):
    """Write `--num_samples` pictures and a grid of the first ones; with `--classes` so many of each, into a folder a
    class. Return exit code 0.

    Picture i depends on the seed, i, its class and the checkpoint alone. Raises CheckpointError, UsageError.
    """
    trained = load_generator(config, place, precision)
    side, folder = grid.grid_side(config.imsize), trained.path("generated", config)
    if config.classes is not None:
        return _sample_classes(config, trained, folder, side)
    trained.create_folder()
    folder.mkdir(exist_ok=True)
    with progress(config.num_samples, "picture") as done:
        grid.save_grid(_write_samples(trained, config, folder, side**2, done), f"{folder}.png")
    trained.finish(config, f"{_pictures(config)} of step {trained.step} in {folder}{os.sep}, "
                   f"{_first(side**2, config)} as a grid in {folder}.png{_older(folder, config.num_samples)}")
    return 0


def _sample_classes(config, trained, folder, side):
    """`sample` for `--classes`; the grid shows one class a row. Picture i of each class has the same z."""
    classes = require_classes(trained.latents.classes)
    chosen, rows = classes.choose(config.classes), {}
    trained.create_folder()
    shown = [chosen[index] for index in spread_indices(side, len(chosen))]
    with progress(config.num_samples * len(chosen), "picture") as done:
        for label, name in zip(chosen, classes.folder_names(chosen), strict=True):
            (folder / name).mkdir(parents=True, exist_ok=True)
            rows[label] = _write_samples(trained, config, folder / name, side, done, label)
    grid.save_grid(torch.cat([rows[label] for label in shown]), f"{folder}.png", min(side, config.num_samples),
                   [classes.names[label] for label in shown])
    which = f"of each of {len(chosen)} classes" if chosen[1:] else f"of class {printable(classes.names[chosen[0]])}"
    trained.finish(config, f"{_pictures(config)} of step {trained.step} {which} in {folder}{os.sep}, "
                   f"{_first(side, config)} as a grid in {folder}.png"
                   f"{_older(folder, config.num_samples * len(set(chosen)))}")
    return 0


def _pictures(config):
    return f"{config.num_samples} picture{'s' * (config.num_samples > 1)}"


def _first(shown, config):
    return "all" if shown >= config.num_samples else f"the first {shown}"


def _older(folder, count):
    """Return a remark on pictures of earlier calls in the folder, where `count` were written now."""
    older = sum(1 for _ in folder.rglob("*.png")) - count
    return f"; {older} of earlier calls are still there" if older > 0 else ""


def _write_samples(trained, config, folder, shown, done, label=None):
    """Write samples 0 to `--num_samples` - 1 of the seed, all of class `label` if there is one; advance `done`.

    Return the first `shown` images.
    """
    batches, count, first = trained.latents.seeded_batches(config.seed), 0, []
    while count < config.num_samples:
        inputs = next(batches)[:config.num_samples - count]
        if label is not None:
            inputs = replace(inputs, labels=torch.full((len(inputs),), label))
        images = trained.draw(inputs)
        for number, picture in enumerate(grid.to_uint8(images), start=count):
            Image.fromarray(picture).save(folder / f"{number:06d}.png", compress_level=1)
        first.append(images[:max(0, shown - count)])
        count += len(images)
        done.update(len(images))
    return torch.cat(first)


# ------------------------------------------------------------------------------------------------------- interpolate


def walk(latents, frames):
    """latents (K, C) ~ N(0, 1) -> (frames, C): interpolate through all of them in a closed loop.

    From a to b along cos(t) a + sin(t) b, t from 0 to pi/2, which keeps the variance at 1. Linear interpolation would
    pass through points of smaller variance, on which G was not trained.
    """
    position = torch.arange(frames) * len(latents) / frames             # in legs
    leg, t = position.long(), ((position % 1) * math.pi / 2)[:, None]
    return torch.cos(t) * latents[leg] + torch.sin(t) * latents[(leg + 1) % len(latents)]


def walk_classes(labels, classes, frames):
    """labels (K,) -> shares of the `classes` (frames, classes): from each label to the next, linearly, in a loop."""
    position = torch.arange(frames) * len(labels) / frames              # in legs
    leg, t = position.long(), (position % 1)[:, None]
    corners = torch.nn.functional.one_hot(labels, classes).float()      # (K, classes)
    return torch.lerp(corners[leg], corners[(leg + 1) % len(labels)], t)


@torch.no_grad()
def interpolate(config, place, precision):
    """Write a looping video of an interpolation between random latents: G_ema's image and its attention maps.

    With classes it walks between them, too: a spread, or those of `--classes`. Return exit code 0. Raises
    CheckpointError, UsageError.
    """
    if config.film == "mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise UsageError("--film mp4 needs imageio-ffmpeg: pip install imageio-ffmpeg, or use --film webp")
    trained = load_generator(config, place, precision)
    generator = torch.Generator().manual_seed(config.seed)
    count = max(2, round(config.num_frames / FRAMES_PER_LEG))
    inputs = Inputs(walk(trained.latents.sampling(count, generator).z, config.num_frames))
    if trained.latents.classes is not None or config.classes is not None:
        classes = require_classes(trained.latents.classes)
        chosen = torch.tensor(classes.choose(config.classes, None if config.classes else count))
        inputs = replace(inputs, labels=walk_classes(chosen, len(classes), config.num_frames))
    trained.create_folder()
    frames = []
    for part in tqdm(inputs.split(1), unit="frame", dynamic_ncols=True):
        part = part.to(place.device)
        with precision.arithmetic():
            image = trained.G(**part.as_arguments())[0]                 # (1, 3, imsize, imsize)
        names = () if part.labels is None else trained.latents.classes.captions(part.labels)
        sheet = FAMILIES[config.model].sheet(trained.G, part, image, config.attn_queries, trained.step, names)
        frames.append(sheet or Image.fromarray(grid.to_uint8(image)[0]))
    path = Path(f"{trained.path('interpolation', config)}.{config.film}")
    write_atomically(path, lambda temporary: _save_video(frames, temporary, config.film))
    trained.finish(config, f"a video of {len(frames)} frames of step {trained.step} in {path}")
    return 0


def _save_video(frames, path, kind):
    """Write Pillow images as a video in format `kind`; all are cropped or padded to the size of the first."""
    frames = [frame if frame.size == frames[0].size else frame.crop((0, 0, *frames[0].size)) for frame in frames]
    if kind == "mp4":
        import imageio_ffmpeg

        width, height = (side + side % 2 for side in frames[0].size)    # H.264 needs even sides
        writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=FRAMES_PER_SECOND, macro_block_size=1,
                                             output_params=["-f", "mp4"])
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(np.asarray(frame.crop((0, 0, width, height)))))
        writer.close()
    else:
        options = {"quality": 80, "method": 4} if kind == "webp" else {}
        frames[0].save(path, kind, save_all=True, append_images=frames[1:], duration=1000 // FRAMES_PER_SECOND, loop=0,
                       **options)


# --------------------------------------------------------------------------------------------------------- style_mix


@torch.no_grad()
def style_mix(config, place, precision):
    """Write a style-mixing grid (FastGAN section 4): the content of the first column, the style of the first row.

    The skip layers get the low-resolution maps of the style's latent, all other layers the content's latent. Return
    exit code 0. Raises CheckpointError.
    """
    trained = load_generator(config, place, precision)
    trained.create_folder()
    generator = torch.Generator().manual_seed(config.seed)
    contents, styles = trained.latents.sampling(2 * STYLES, generator).to(place.device).split(STYLES)
    first_row = draw(trained.G, styles, precision, STYLES)              # (STYLES, 3, imsize, imsize)
    blank = torch.full_like(first_row[:1], 2 * grid.BACKGROUND[0] / 255 - 1)
    rows = [torch.cat([blank, first_row])]
    for content in tqdm(contents.split(1), unit="row", dynamic_ncols=True):
        with precision.arithmetic():
            labels = None if content.labels is None else content.labels.expand(STYLES)
            mixed = trained.G(content.z.expand(STYLES, -1), labels, styles.z)[0]
            rows.append(torch.cat([trained.G(**content.as_arguments())[0], mixed]).cpu())
    path = f"{trained.path('style_mix', config)}.png"
    grid.save_grid(torch.cat(rows), path, columns=STYLES + 1)
    trained.finish(config, f"a grid of mixed styles of step {trained.step} in {path}: "
                   "the first row gives the styles, the first column the contents")
    return 0


MODES = {"sample": sample, "interpolate": interpolate, "style_mix": style_mix}      # --mode
