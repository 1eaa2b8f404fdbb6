"""Pictures from a checkpoint: needs neither the data set nor, for metadata, VGG."""

import os

import torch
from PIL import Image
from tqdm import tqdm

import checkpoint
import gallery
import utils
from distributed import say
from families import FAMILIES
from metadata import Bank, Latents
from parameter import CheckpointError


def sample(config, place):
    """Write `--num_samples` pictures and a grid by G_ema of a checkpoint. Returns exit code 0.

    Picture i depends on the seed, i and the checkpoint alone. Raises CheckpointError.
    """
    folders = utils.RunFolders.of(config)
    state = checkpoint.load_asked(folders.models, config.pretrained_model)
    if state is None:
        raise CheckpointError(f"--version {config.version}: no checkpoint in {folders.models} to sample from.\n"
                              "Train it first, or name a run with --version (and --model_save_path).")
    G, _ = FAMILIES[config.model].build(config)
    G.load_state_dict(state["G_ema"])
    G.to(place.device).eval()
    batch = utils.drawing_batch(config.imsize)
    latents = Latents(config.z_dim, Bank.from_state(state.get("metadata")), config.metadata_sample, place.device)
    if config.metadata_sample != state["config"].get("metadata_sample"):
        # the batch statistics in the checkpoint belong to the other way to draw metadata
        with utils.forked_random_state(place.device):
            generator = torch.Generator().manual_seed(config.seed)
            z = latents.sampling(utils.SETTLING_IMAGES, generator).to(place.device)
            utils.settle_batch_statistics(G, z, batch)
    name = f"{state['step']:07d}_generated_seed{config.seed}"
    folder = folders.samples / name
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(config.seed)
    shown = []
    with tqdm(total=config.num_samples, unit="picture", dynamic_ncols=True) as progress:
        while progress.n < config.num_samples:
            z = latents.sampling(64, generator)                         # always 64: z i is the same for any number
            images = utils.draw(G, z[:config.num_samples - progress.n], place.device, batch)
            for number, picture in enumerate(gallery.to_uint8(images), start=progress.n):
                Image.fromarray(picture).save(folder / f"{number:06d}.png", compress_level=1)
            shown.append(images[:gallery.grid_side(config.imsize) ** 2 - sum(map(len, shown))])
            progress.update(len(images))
    gallery.save_grid(torch.cat(shown), folders.samples / f"{name}.png")
    say(f"{config.num_samples} pictures of step {state['step']} in {folder}{os.sep}, a grid of them in {folder}.png")
    return 0
