"""The modes that load a checkpoint: samples, a video of an interpolation in latent space, a grid of mixed styles; and
`load`, which draws samples in one's own code.

They need neither the data set nor, for metadata, VGG-16: the output depends on the seed and the checkpoint alone.
"""

import math
import operator
import os
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import parameter
from device.distributed import place_alone
from device.precision import Precision
from errors import UsageError
from families import FAMILIES
from flags.pictures import PictureShape
from gallery import film, grid
from generate.classes import require_classes
from generate.draw import draw
from generate.latents import Inputs, digest_of, read_latents, save_latents
from generate.project import project
from generate.samples import sample
from generate.trained import load_generator
from pretrained import vgg
from storage import checkpoint, export

FRAMES_PER_LEG = 30             # from one latent to the next, about
STYLES = 5                      # styles and contents in a style grid


def walk(latents, frames):
    """latents (K, C) ~ N(0, 1) -> (frames, C): interpolate through all of them in a closed loop.

    From a to b along cos(t) a + sin(t) b, t from 0 to pi/2, which keeps the variance at 1, divided by what the two have
    in common: those of --latents may be alike. Linear interpolation would pass through points of smaller variance, on
    which G was not trained.
    """
    position = torch.arange(frames) * len(latents) / frames             # in legs
    leg, t = position.long(), ((position % 1) * math.pi / 2)[:, None]
    a, b = latents[leg], latents[(leg + 1) % len(latents)]
    common = torch.nn.functional.cosine_similarity(a, b, dim=1)[:, None]
    length = (1 + 2 * torch.cos(t) * torch.sin(t) * common).clamp(min=0.01).sqrt()
    return (torch.cos(t) * a + torch.sin(t) * b) / length


def walk_classes(labels, classes, frames):
    """labels (K,) -> shares of the `classes` (frames, classes): from each label to the next, linearly, in a loop."""
    position = torch.arange(frames) * len(labels) / frames              # in legs
    leg, t = position.long(), (position % 1)[:, None]
    corners = torch.nn.functional.one_hot(labels, classes).float()      # (K, classes)
    return torch.lerp(corners[leg], corners[(leg + 1) % len(labels)], t)


def _corners(config, latents, generator):
    """Return the Inputs between which a video walks: those of `--latents`, or random ones. Its labels may be others in
    number: those of `--classes`, or a spread.
    """
    if config.latents:
        corners = read_latents(config.latents, latents, config.classes)
        if len(corners) < 2:
            raise UsageError("--latents: --mode interpolate walks between two or more; give several files")
        if len(corners) > config.num_frames:
            raise UsageError(f"--num_frames {config.num_frames}: fewer than the {len(corners)} latents to walk between")
    else:
        count = max(2, round(config.num_frames / FRAMES_PER_LEG))
        corners = Inputs(latents.sampling(count, generator).z)
    if config.classes is None and (latents.classes is None or corners.labels is not None):
        return corners
    classes = require_classes(latents.classes)
    chosen = classes.choose(config.classes, None if config.classes else len(corners))
    if len(chosen) > config.num_frames:                 # most would be skipped
        raise UsageError(f"--num_frames {config.num_frames}: fewer than the {len(chosen)} classes to walk between; "
                         "give more, or fewer --classes")
    return replace(corners, labels=torch.tensor(chosen))


@torch.no_grad()
def interpolate(config, place, precision):
    """Write a looping video of an interpolation between random latents: G_ema's image and its attention maps.

    With classes it walks between them, too: a spread, or those of `--classes`. Return exit code 0. Raises
    CheckpointError, UsageError.
    """
    film.require(config.film)
    trained = load_generator(config, place, precision)
    generator = torch.Generator().manual_seed(config.seed)
    corners = _corners(config, trained.latents, generator)
    inputs = Inputs(walk(corners.z, config.num_frames))
    if corners.labels is not None:
        inputs = replace(inputs, labels=walk_classes(corners.labels, len(trained.latents.classes), config.num_frames))
    trained.create_folder()
    frames = []
    for part in tqdm(inputs.split(1), unit="frame", dynamic_ncols=True):
        part = part.to(place.device)
        with precision.arithmetic():
            image = trained.G(**part.as_arguments())[0]                 # (1, C, H, W)
        names = () if part.labels is None else trained.latents.classes.captions(part.labels)
        sheet = FAMILIES[config.model].sheet(trained.G, part, image, config.attn_queries, trained.step, names)
        frames.append(sheet or Image.fromarray(grid.to_visible(image)[0]))
    name = f"interpolation_latents_{digest_of(corners)}" if config.latents else f"interpolation_seed{config.seed}"
    if config.classes is not None:
        name += trained.latents.classes.suffix(config.classes)
    path = trained.path(name, f".{config.film}")
    film.save(frames, path, config.film)
    trained.finish(config, f"a video of {len(frames)} frames of step {trained.step} in {path}")
    return 0


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
    first_row = draw(trained.G, styles, precision, STYLES)              # (STYLES, C, H, W)
    blank = torch.full_like(first_row[:1], 2 * grid.BACKGROUND[0] / 255 - 1)
    blank[:, 3:] = 1                                                    # not transparent
    rows = [torch.cat([blank, first_row])]
    for content in tqdm(contents.split(1), unit="row", dynamic_ncols=True):
        with precision.arithmetic():
            labels = None if content.labels is None else content.labels.expand(STYLES)
            mixed = trained.G(content.z.expand(STYLES, -1), labels, styles.z, style_labels=styles.labels)[0]
            rows.append(torch.cat([trained.G(**content.as_arguments())[0], mixed]).cpu())
    path = trained.path(f"style_mix_seed{config.seed}", ".png")
    grid.save_grid(torch.cat(rows), path, columns=STYLES + 1)
    trained.finish(config, f"a grid of mixed styles of step {trained.step} in {path}: "
                   "the first row gives the styles, the first column the contents")
    return 0


# ------------------------------------------------------------------------------------------------------------ export


def export_files(config, place, precision):
    """Write G_ema for other programs: a folder with G.onnx, G.safetensors, G.ts.pt and a README. Return exit code 0.

    Raise CheckpointError, UsageError, OSError.
    """
    export.require()
    trained = load_generator(config, place, precision)
    latents, folder = trained.latents, trained.path("export")
    inputs = next(latents.seeded_batches(config.seed))
    trained.create_folder()
    folder.mkdir(exist_ok=True)
    save_latents(inputs, folder / "latents.npz", latents.classes)
    names = list(latents.classes.names) if latents.classes else []
    export.write(trained.G.cpu(), inputs.as_arguments(), folder, {
        "version": config.version, "step": trained.step, "model": config.model, "imsize": config.imsize,
        "channels": config.channels, "z_dim": config.z_dim, "truncation": config.truncation,
        "config": parameter.as_json(config), "classes": names})
    trained.finish(config, f"the generator of step {trained.step} in {folder}{os.sep}; README.md says how to use it")
    return 0


# -------------------------------------------------------------------------------------------------- in one's own code


class Sampler:
    """A run's generator G_ema, to draw pictures with in one's own code: what `load` returns.

    `step` is that of its checkpoint, `imsize` the side of its pictures in pixels, or
    text such as "64x128", height and width, `classes` the names of its classes,
    () if it has none.
    """

    def __init__(self, typed):
        self._typed, self._loaded = typed, {}
        self.step = self._load(None).step
        latents, config = self._loaded[None].latents, self._config
        self.imsize, self.classes = config.imsize, tuple(latents.classes.names if latents.classes else ())

    def _load(self, truncation):
        """Return the TrainedGenerator for a truncation, whose batch-norm statistics belong to it."""
        if truncation not in self._loaded:
            of_step = {"pretrained_model": self.step} if self._loaded else {}       # a run in training has newer ones
            truncated = {} if truncation is None else {"truncation": truncation}
            self._config = parameter.resolve({**self._typed, **of_step, **truncated}, checkpoint.saved_config,
                                             vgg.FILE.is_available)
            place = place_alone(self._config)
            precision = Precision(self._config.precision, place.device)
            self._loaded[truncation] = load_generator(self._config, place, precision)
        return self._loaded[truncation]

    def sample(self, seeds, classes=None, truncation=None):
        """Return pictures (N, H, W, C), uint8, one for each of `seeds`: those of `--mode sample --seeds`.

        `classes`: a name or number for all, or a list of one for each seed; None: each seed has a class of its own, as
        frequent as in the data. `truncation` as in --truncation. Raises UsageError.
        """
        try:
            seeds = [operator.index(seed) for seed in seeds]
            truncation = None if truncation is None else float(truncation)
        except (TypeError, ValueError) as error:
            raise UsageError(f"sample(): seeds are a list of whole numbers, truncation is a number ({error})") from None
        if any(not 0 <= seed < 2**63 for seed in seeds):
            raise UsageError("sample(): seeds are from 0 to 2**63 - 1")
        trained = self._load(truncation)
        wanted = classes if isinstance(classes, (list, tuple)) else [classes] * len(seeds)
        if len(wanted) != len(seeds):
            raise UsageError(f"{len(seeds)} seeds, but {len(wanted)} classes: give one class, or one for each seed")
        pictures = []
        for seed, name in zip(seeds, wanted, strict=True):
            inputs = trained.latents.of_seed(seed)
            if name is not None:
                (label,) = require_classes(trained.latents.classes).choose([str(name)])
                inputs = replace(inputs, labels=torch.tensor([label]))
            pictures.append(grid.to_uint8(trained.draw(inputs))[0])
        channels, *size = PictureShape.of_config(self._config).size
        return np.stack(pictures) if pictures else np.zeros((0, *size, channels), np.uint8)


def load(version, step=None, device="auto", model_save_path="models"):
    """Return the Sampler of a run: of its newest checkpoint, of that of `step`, or of the "best" one.

    `device` as in --device; `model_save_path` is the folder of all runs. Needs neither the pictures nor VGG-16. Raises
    UsageError if there is no such run, CheckpointError if it has no such checkpoint that can be read.
    """
    if not isinstance(version, str) or not (step is None or step == "best" or type(step) is int):
        raise UsageError("load(): give the name of a run and, as step, a whole number, 'best' or None")
    typed = {"version": version, "mode": "sample", "device": device, "model_save_path": str(model_save_path)}
    return Sampler(typed if step is None else {**typed, "pretrained_model": step})


MODES = {"sample": sample, "interpolate": interpolate, "style_mix": style_mix,
         "project": project, "export": export_files}      # --mode
