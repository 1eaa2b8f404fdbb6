"""The network families: in this table, and nowhere else, they differ.

A new model is one file, one objective, one row here, one preset.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import fastgan_models
import gallery
import losses
import sagan_models

RECONSTRUCTED = 8           # real images shown with what D's decoders make of them
ATTENTION_ROWS = 4          # generated images shown in each attention picture


@dataclass(frozen=True)
class View:
    """What a record looks at: `z` (B, ...) and G_ema's images of it, real images, both (·, 3, imsize, imsize) on the
    networks' device; the folders of samples and of attention maps, the step; query points (Q, 2), None for the usual
    ones; whether maps are wanted as numbers too.
    """

    z: torch.Tensor
    images: torch.Tensor
    real: torch.Tensor
    samples: Path
    attention: Path
    step: int
    queries: tuple | None = None
    raw: bool = False

    def name(self, what):
        """File name of a picture of this step."""
        return f"{self.step:07d}_{what}.png"

    def save_raw(self, arrays):
        """Write {name: tensor} into the record's .npz if that was asked for."""
        if self.raw and arrays:
            gallery.save_raw(arrays, self.attention / f"{self.step:07d}_attn.npz")


@dataclass(frozen=True)
class Family:
    """One network family.

    `build(config) -> (G, D)` on the CPU; `objective(config, device)` with d_loss and g_loss; `gammas(G, D) ->
    {layer: (1,) tensor}`, the weight that each attention layer has learned for its output; `write_pictures(G, D, view)
    -> {name: float}` draws what the networks attend to, G and D in evaluation mode, and returns figures on it.
    `page(G, z, images, queries, step)` is a Pillow picture of what G attends to in these images, None if to nothing.
    """

    build: Callable
    objective: Callable
    gammas: Callable
    write_pictures: Callable
    page: Callable


def write_attention(G, D, view):
    """SAGAN: a picture per attention layer, one overlay per query point; of D's layers one on real images too.

    Returns {"entropy/<layer>": 0 to 1}, <layer> of D's on real images ending in _real.
    """
    queries, gammas = _points(view.queries), sagan_models.gammas(G, D)
    generated, real = view.images[:ATTENTION_ROWS], view.real[:ATTENTION_ROWS]
    shown = {layer: (generated, maps) for layer, maps in G.attention_maps(view.z[:ATTENTION_ROWS], queries).items()}
    for suffix, images in (("", generated), ("_real", real)):
        shown |= {layer + suffix: (images, maps) for layer, maps in D.attention_maps(images, queries).items()}
    figures = {f"entropy/{name}": gallery.normalized_entropy(maps).mean().item() for name, (_, maps) in shown.items()}

    def write(name):
        (images, maps), entropy = shown[name], figures[f"entropy/{name}"]
        path, gamma = view.attention / view.name(f"attn_{name}"), gammas[name.removesuffix("_real")].item()
        gallery.save_attention(images, maps, queries, path, name, view.step, gamma, entropy)

    with ThreadPoolExecutor() as pool:              # most of it is compressing, which Pillow does beside other threads
        list(pool.map(write, shown))                # a list, so that what goes wrong is raised here
    view.save_raw({**{name: maps for name, (_, maps) in shown.items()}, "queries": queries} if shown else {})
    return figures


def attention_page(G, z, images, queries, step):
    """SAGAN: G's largest attention layer."""
    queries = _points(queries)
    maps = G.attention_maps(z, queries)
    if not maps:
        return None
    layer = list(maps)[-1]
    return gallery.attention_page(images, maps[layer], queries, layer, step, G.attention[layer].gamma,
                                  gallery.normalized_entropy(maps[layer]).mean())


def _points(queries):
    """(Q, 2): the asked query points, or the usual ones where that is None."""
    return gallery.default_queries() if queries is None else torch.tensor(queries)


def write_masks(G, D, view):
    """SLAE-FastGAN: the masks over generated images, a column per layer; D's reconstructions of real ones.

    Returns {"mask/<layer>": mean, "mask_range/<layer>": largest less smallest} of each layer's masks.
    """
    images, real = view.images[:ATTENTION_ROWS], view.real[:RECONSTRUCTED]
    masks = {**G.attention_maps(view.z[:ATTENTION_ROWS]), **D.attention_maps(images)}
    on_real = {f"{layer}_real": mask for layer, mask in D.attention_maps(real[:ATTENTION_ROWS]).items()}
    view.save_raw({**masks, **on_real})
    for shown, of, name, title in ((images, masks, "attn_slae", "spatial attention"),
                                   (real[:ATTENTION_ROWS], on_real, "attn_slae_real", "D's attention to real images")):
        if of:
            gallery.save_masks(shown, of, view.attention / view.name(name), title, view.step)
    quadrant = torch.arange(len(real), device=real.device) % 4          # the same in every record
    rebuilt = D.reconstruct(D(fastgan_models.both_sizes(real)), real, quadrant)
    whole, quarter = rebuilt["last"][1], rebuilt["middle"][1]
    gallery.save_reconstructions({
        "real": whole, "from D's 8x8 map": rebuilt["last"][0], "from the small path": rebuilt["small"][0],
        "one quadrant": quarter, "from its part of the 16x16 map": rebuilt["middle"][0],
    }, view.samples / view.name("recon"), "reconstructions", view.step)
    return {**{f"mask/{layer}": mask.mean().item() for layer, mask in masks.items()},
            **{f"mask_range/{layer}": (mask.max() - mask.min()).item() for layer, mask in masks.items()}}


def masks_page(G, z, images, queries, step):
    """SLAE-FastGAN: a column per mask of G; they ask no queries."""
    masks = G.attention_maps(z)
    return gallery.masks_page(images, masks, "spatial attention", step) if masks else None


FAMILIES = {
    "sagan": Family(sagan_models.build, losses.adversarial, sagan_models.gammas, write_attention, attention_page),
    "fastgan": Family(fastgan_models.build, losses.self_supervised, lambda G, D: {}, write_masks, masks_page),
}


def networks(config, device):
    """[G, D] of the config, freshly initialized, on the device. Channels-last: convolutions are fastest so."""
    return [net.to(device, memory_format=torch.channels_last) for net in FAMILIES[config.model].build(config)]
