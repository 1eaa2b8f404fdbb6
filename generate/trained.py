"""The generator of a checkpoint, ready to draw: what every mode but training begins with."""

import hashlib
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from device.distributed import say
from device.precision import Precision
from errors import CheckpointError
from families import build_networks, find_mismatch
from gallery import page
from generate.classes import Classes
from generate.draw import BN_STATS_IMAGES, batch_for, draw, recompute_bn_stats
from generate.latents import Latents
from generate.metadata import Bank
from storage import checkpoint
from storage.folders import RunFolders, step_name
from utils import forked_random_state


@dataclass(frozen=True)
class TrainedGenerator:
    """A checkpoint's G_ema in eval mode, its latents, precision, batch size and step, and the folders of its run;
    `weights`, hex digits that tell it from checkpoints of other runs; `data`, the record of the pictures that it was
    trained on, of older checkpoints None; `own`, the settings of its run, {flag: value}.
    """

    G: torch.nn.Module
    latents: Latents
    precision: Precision
    batch: int
    step: int
    folders: RunFolders
    weights: str
    data: dict | None
    own: dict

    def draw(self, inputs):
        """Generate images (N, C, H, W) in [-1, 1] on the CPU."""
        return draw(self.G, inputs, self.precision, self.batch)

    def create_folder(self):
        """Create the folder of the outputs: nothing can be refused any more. Raises OSError."""
        self.folders.samples.mkdir(parents=True, exist_ok=True)

    def path(self, name, ending="", sampler=True):
        """Path of an output `name` of this step. It names the truncation and, if the output depends on the `sampler` of
        metadata, that one where it is not the run's own: other settings overwrite no file.
        """
        settings = self.latents.settings()
        if sampler and settings.get("metadata_sample") not in (None, self.own.get("metadata_sample")):
            name += f"_metadata-{settings['metadata_sample']}"
        if "truncation" in settings:
            name += f"_truncation{settings['truncation']:g}"
        return self.folders.samples / step_name(self.step, f"_{name}{ending}")

    def finish(self, config, message):
        """Update the run's page and print `message`."""
        classes = self.latents.classes
        page.write_pages(self.folders, config, classes and len(classes))
        say(message)


def load_generator(config, place, precision):
    """Return the TrainedGenerator of `--version` and `--pretrained_model`. Raises CheckpointError."""
    return generator_of(load_state(config), config, place, precision)


def load_state(config):
    """Return what a TrainedGenerator needs of the checkpoint of `--version` and `--pretrained_model`, a dict. Raises
    CheckpointError.
    """
    folders = RunFolders.of(config)
    state = checkpoint.load_step(folders.models, config.pretrained_model, say, partial(find_mismatch, config))
    if state is None:
        raise CheckpointError(f"--version {config.version}: no checkpoint in {folders.models}.\n"
                              "Train it first, or name a run with --version (and --model_save_path).")
    return {key: state.get(key) for key in ("G_ema", "step", "config", "classes", "metadata", "data")}


def generator_of(state, config, place, precision):
    """Return the TrainedGenerator of what `load_state` returned."""
    classes = Classes.from_state(state["classes"])
    G, _ = build_networks(config, place.device, classes)
    G.load_state_dict(state["G_ema"])
    G.eval()
    batch = batch_for(config.imsize)
    latents = Latents(config.z_dim, Bank.from_state(state["metadata"]), config.metadata_sample, place.device,
                      classes, config.truncation)
    if config.truncation is not None or config.metadata_sample != state["config"].get("metadata_sample"):
        # the checkpoint's batch-norm statistics belong to whole z and to the metadata of its own sampler; the same
        # ones for every --seed, so that a picture depends on its own seed alone
        with forked_random_state(place.device):
            generator = torch.Generator().manual_seed(0)
            inputs = latents.for_bn_stats(BN_STATS_IMAGES, generator).to(place.device)
            recompute_bn_stats(G, inputs, precision, batch)
    return TrainedGenerator(G, latents, precision, batch, state["step"], RunFolders.of(config),
                            _digest_of(state["G_ema"]), state["data"], state["config"])


def as_file_part(name):
    """Return the name of a file or folder as a part of other files' names, of at most 60 bytes."""
    return re.sub(r"[^\w.-]", "_", name).encode(errors="replace")[:60].decode(errors="ignore")


def folder_as_file_part(path):
    """Return the name of a folder as a part of files' names, that of its parent before it unless this is the working
    directory: runs have folders of the same names.
    """
    folder = Path(path).resolve()
    parts = [folder.name] if folder.parent == Path.cwd() else [folder.parent.name, folder.name]
    return "_".join(map(as_file_part, parts))


def _digest_of(weights):
    """Return eight hex digits of a state dict: of the first values of each tensor, which takes no time."""
    digest = hashlib.sha256()
    for tensor in weights.values():
        digest.update(tensor.flatten()[:16].cpu().numpy().tobytes())
    return digest.hexdigest()[:8]
