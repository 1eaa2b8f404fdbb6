"""From a checkpoint: pictures, a film of a walk between them, a grid of mixed styles.

Needs neither the data set nor, for metadata, VGG. Everything follows from the seed and the checkpoint alone.
"""

import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import checkpoint
import distributed
import drawing
import gallery
import page
import utils
from distributed import say
from failures import CheckpointError, UsageError
from families import FAMILIES, networks
from metadata import Bank, Latents
from precision import Precision

FRAMES_PER_SECOND = 20
FRAMES_PER_LEG = 30             # of the walk from one latent to the next
STYLES = 5                      # rows and columns of a style grid


@dataclass(frozen=True)
class Source:
    """G_ema of a checkpoint in eval mode, what it is fed, in which arithmetic and how many images at once it draws;
    where pictures go.
    """

    G: torch.nn.Module
    latents: Latents
    precision: Precision
    batch: int
    step: int
    folders: utils.RunFolders

    def path(self, what, config):
        """Where a picture of this step and seed goes, without its suffix."""
        return self.folders.samples / f"{self.step:07d}_{what}_seed{config.seed}"

    def tell(self, config, words):
        """Show what was written on the run's page, and say where it is."""
        page.write_pages(self.folders, config)
        say(words)


def open_source(config, place):
    """The Source of `--version` and `--pretrained_model`. Raises CheckpointError."""
    folders = utils.RunFolders.of(config)
    state = checkpoint.load_asked(folders.models, config.pretrained_model)
    if state is None:
        raise CheckpointError(f"--version {config.version}: no checkpoint in {folders.models} to draw from.\n"
                              "Train it first, or name a run with --version (and --model_save_path).")
    G, _ = networks(config, place.device)
    G.load_state_dict(state["G_ema"])
    G.eval()
    batch, precision = drawing.batch_for(config.imsize), Precision(config.precision, place.device)
    latents = Latents(config.z_dim, Bank.from_state(state.get("metadata")), config.metadata_sample, place.device)
    if config.metadata_sample != state["config"].get("metadata_sample"):
        # the batch statistics in the checkpoint belong to the other way to draw metadata
        with utils.forked_random_state(place.device):
            generator = torch.Generator().manual_seed(config.seed)
            z = latents.sampling(drawing.SETTLING_IMAGES, generator).to(place.device)
            drawing.settle_batch_statistics(G, z, precision, batch)
    folders.samples.mkdir(parents=True, exist_ok=True)
    return Source(G, latents, precision, batch, state["step"], folders)


def sample(config, place):
    """Write `--num_samples` pictures and a grid. Returns exit code 0.

    Picture i depends on the seed, i and the checkpoint alone. Raises CheckpointError.
    """
    source = open_source(config, place)
    folder = source.path("generated", config)
    folder.mkdir(exist_ok=True)
    latents = source.latents.of_seed(config.seed)
    shown = []
    with distributed.progress(config.num_samples, "picture") as progress:
        while progress.n < config.num_samples:
            z = next(latents)[:config.num_samples - progress.n]
            images = drawing.draw(source.G, z, source.precision, source.batch)
            for number, picture in enumerate(gallery.to_uint8(images), start=progress.n):
                Image.fromarray(picture).save(folder / f"{number:06d}.png", compress_level=1)
            shown.append(images[:gallery.grid_side(config.imsize) ** 2 - sum(map(len, shown))])
            progress.update(len(images))
    gallery.save_grid(torch.cat(shown), f"{folder}.png")
    source.tell(config, f"{config.num_samples} pictures of step {source.step} in {folder}{os.sep}, "
                f"a grid of them in {folder}.png")
    return 0


# ------------------------------------------------------------------------------------------------------- the film


def walk(latents, frames):
    """latents (K, C), each N(0, 1) -> (frames, C): a closed walk past all of them.

    From a to b along cos(t) a + sin(t) b, t from 0 to pi/2: straight lines would pass through points of less variance,
    where G has never been.
    """
    at = torch.arange(frames) * len(latents) / frames                   # in legs
    leg, t = at.long(), ((at % 1) * math.pi / 2)[:, None]
    return torch.cos(t) * latents[leg] + torch.sin(t) * latents[(leg + 1) % len(latents)]


@torch.no_grad()
def interpolate(config, place):
    """Write a looping film of a walk between random latents: G_ema's image beside what G attends to in it.

    Returns exit code 0. Raises CheckpointError, UsageError.
    """
    if config.film == "mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise UsageError("--film mp4 needs imageio-ffmpeg: pip install imageio-ffmpeg, or use --film webp")
    source = open_source(config, place)
    generator = torch.Generator().manual_seed(config.seed)
    count = max(2, round(config.num_frames / FRAMES_PER_LEG))
    z = walk(source.latents.sampling(count, generator), config.num_frames)
    frames = []
    for part in tqdm(z, unit="frame", dynamic_ncols=True):
        part = part[None].to(place.device)
        with source.precision.arithmetic():
            image = source.G(part)[0]
        shown = FAMILIES[config.model].page(source.G, part, image, config.attn_queries, source.step)
        frames.append(shown or Image.fromarray(gallery.to_uint8(image)[0]))
    path = Path(f"{source.path('interpolation', config)}.{config.film}")
    utils.write_atomically(path, lambda temporary: _save_film(frames, temporary, config.film))
    source.tell(config, f"a film of {len(frames)} frames of step {source.step} in {path}")
    return 0


def _save_film(frames, path, film):
    """Write Pillow pictures as a film of this format; all take the first one's size."""
    frames = [frame if frame.size == frames[0].size else frame.crop((0, 0, *frames[0].size)) for frame in frames]
    if film == "mp4":
        import imageio_ffmpeg

        width, height = (side + side % 2 for side in frames[0].size)    # H.264 takes even sides alone
        writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=FRAMES_PER_SECOND, macro_block_size=1,
                                             output_params=["-f", "mp4"])
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(np.asarray(frame.crop((0, 0, width, height)))))
        writer.close()
    else:
        options = {"quality": 80, "method": 4} if film == "webp" else {}
        frames[0].save(path, film, save_all=True, append_images=frames[1:], duration=1000 // FRAMES_PER_SECOND, loop=0,
                       **options)


# --------------------------------------------------------------------------------------------------- mixed styles


@torch.no_grad()
def style_mix(config, place):
    """Write a grid (FastGAN section 4): what the first column shows in the manner of each image of the first row.

    The low maps of the style's latent drive the skip layers while the other latent is drawn. Returns exit code 0.
    Raises CheckpointError.
    """
    source = open_source(config, place)
    generator = torch.Generator().manual_seed(config.seed)
    contents, styles = source.latents.sampling(2 * STYLES, generator).to(place.device).chunk(2)
    rows = [drawing.draw(source.G, styles, source.precision, STYLES)]   # (STYLES, 3, imsize, imsize)
    blank = torch.full_like(rows[0][:1], 2 * gallery.PAGE[0] / 255 - 1)
    rows = [torch.cat([blank, rows[0]])]
    for content in tqdm(contents, unit="row", dynamic_ncols=True):
        content = content[None]
        with source.precision.arithmetic():
            mixed = source.G(content.expand(STYLES, -1), style=styles)[0]
            rows.append(torch.cat([source.G(content)[0], mixed]).cpu())
    path = f"{source.path('style_mix', config)}.png"
    gallery.save_grid(torch.cat(rows), path, columns=STYLES + 1)
    source.tell(config, f"a grid of mixed styles of step {source.step} in {path}: "
                "the first row gives the styles, the first column what is drawn")
    return 0


MODES = {"sample": sample, "interpolate": interpolate, "style_mix": style_mix}      # --mode
