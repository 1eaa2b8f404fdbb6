"""Records: the attention figures written every `--sample_step`. One function for each kind of attention; a family's
row in families.py selects its functions.

    write_...(G, D, record) -> {name: float}                       writes PNGs, returns values for metrics.jsonl
    ..._sheet(G, inputs, images, queries, step) -> Pillow image    a video frame; None if G has no such layer

G and D are in evaluation mode.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gallery import sheets, variation
from storage.folders import step_name
from utils import write_atomically

RECONSTRUCTED = 8           # real images shown with the reconstructions of D's decoders
ATTENTION_ROWS = 4          # images in each attention sheet
SHARED_BY = 16              # images that the shares of G's inputs are measured on
# (y, x) as fractions of the image. On aligned faces: the eyes, the mouth, the hair, a corner of the background; in a
# landscape: two points at the horizon, the foreground, the sky, a corner.
DEFAULT_QUERIES = ((0.45, 0.36), (0.45, 0.64), (0.72, 0.50), (0.20, 0.50), (0.12, 0.10))


@dataclass(frozen=True)
class Record:
    """The inputs and output folders of a record.

    `inputs`: of G. `images`: G_ema's images for them, and `real`: real images, both (·, C, H, W), on the
    networks' device. `samples`, `attention`: folders for samples and attention sheets. `queries`: query points, None
    for DEFAULT_QUERIES. `raw`: whether maps are also saved as arrays. `names`: the class of each image, if there are
    classes.
    """

    inputs: Any
    images: torch.Tensor
    real: torch.Tensor
    samples: Path
    attention: Path
    step: int
    queries: tuple | None = None
    raw: bool = False
    names: tuple = ()

    def name(self, kind):
        """File name of a picture of this step."""
        return step_name(self.step, f"_{kind}.png")

    def save_raw(self, arrays):
        """Write {name: tensor} to the record's .npz if `raw`."""
        if self.raw and arrays:
            save_raw(arrays, self.attention / step_name(self.step, "_attn.npz"))


# ---------------------------------------------------------------------------------------- attention between positions


def write_attention(G, D, record):
    """Write a sheet per self-attention layer, with one overlay per query point; for D's layers also on real images.

    Return {"entropy/<layer>": mean normalized entropy, 0 to 1}; the names of D's layers on real images end in _real.
    """
    queries, layers = _points(record.queries), {**G.attention, **D.attention}
    inputs = record.inputs[:ATTENTION_ROWS]
    generated, real = record.images[:ATTENTION_ROWS], record.real[:ATTENTION_ROWS]
    maps_of_g = G.attention_maps(inputs.z, queries, inputs.labels)
    shown = {layer: (generated, maps) for layer, maps in maps_of_g.items()}
    for suffix, images in (("", generated), ("_real", real)):
        shown |= {layer + suffix: (images, maps) for layer, maps in D.attention_maps(images, queries).items()}
    entropies = {name: sheets.normalized_entropy(maps).mean().item() for name, (_, maps) in shown.items()}

    def write(name):
        (images, maps), gamma = shown[name], layers[name.removesuffix("_real")].gamma.item()
        path = record.attention / record.name(f"attn_{name}")
        sheets.save_attention(images, maps, queries, path, name, record.step, gamma, entropies[name],
                              record.names[:ATTENTION_ROWS])

    with ThreadPoolExecutor() as pool:              # most of the time is PNG compression, which releases the GIL
        list(pool.map(write, shown))                # list(), so that exceptions are raised here
    record.save_raw({**{name: maps for name, (_, maps) in shown.items()}, "queries": queries} if shown else {})
    return {f"entropy/{name}": entropy for name, entropy in entropies.items()}


def attention_sheet(G, inputs, images, queries, step, names=()):
    """Attention sheet of G's self-attention layer of the highest resolution; `names` stand below the images."""
    queries = _points(queries)
    maps = G.attention_maps(inputs.z, queries, inputs.labels)
    if not maps:
        return None
    layer = list(maps)[-1]
    return sheets.attention_sheet(images, maps[layer], queries, layer, step, G.attention[layer].gamma,
                                  sheets.normalized_entropy(maps[layer]).mean(), names)


def _points(queries):
    """Return the query points (Q, 2): those given, or the default ones."""
    return torch.tensor(DEFAULT_QUERIES if queries is None else queries)


# ------------------------------------------------------------------------------------ spatial masks, reconstructions


def write_masks(G, D, record):
    """Write sheets of the spatial attention masks, a column per layer, and of D's reconstructions of real images, if it
    learns these.

    Return {"mask/<layer>": mean, "mask_range/<layer>": maximum - minimum} of each layer's masks on generated images.
    """
    images, real = record.images[:ATTENTION_ROWS], record.real[:RECONSTRUCTED]
    inputs = record.inputs[:ATTENTION_ROWS]
    masks = {**G.attention_maps(inputs.z, labels=inputs.labels), **D.attention_maps(images)}
    on_real = {f"{layer}_real": mask for layer, mask in D.attention_maps(real[:ATTENTION_ROWS]).items()}
    record.save_raw({**masks, **on_real})
    for shown, masks_of_layers, name, title in (
            (images, masks, "attn_slae", "spatial attention"),
            (real[:ATTENTION_ROWS], on_real, "attn_slae_real", "D's attention to real images")):
        if masks_of_layers:
            sheets.save_masks(shown, masks_of_layers, record.attention / record.name(name), title, record.step,
                              record.names[:ATTENTION_ROWS])
    if D.reconstructs:
        sheets.save_reconstructions(D.reconstructions(real), record.samples / record.name("recon"), "reconstructions",
                                    record.step)
    return {**{f"mask/{layer}": mask.mean().item() for layer, mask in masks.items()},
            **{f"mask_range/{layer}": (mask.max() - mask.min()).item() for layer, mask in masks.items()}}


def measure_inputs(G, D, record):
    """Return {"share/<input>": share of the images' variance that comes from this input of G}; see variation.py."""
    # of neighbours one gets the other's input: in the record's order these are of different classes
    order = torch.randperm(len(record.images), generator=torch.Generator().manual_seed(0))[:SHARED_BY]
    inputs, images = record.inputs[order], record.images[order]

    def draw(inputs):
        return G(**inputs.as_arguments())[0]

    found = variation.shares(G, inputs, images, draw, variation.in_pixels) if len(images) > 1 else {}
    return {f"share/{name}": share for name, share in found.items()}


def mask_sheet(G, inputs, images, queries, step, names=()):
    """Mask sheet with a column per spatial attention mask of G; `names` stand below the images. Masks have no queries.
    """
    masks = G.attention_maps(inputs.z, labels=inputs.labels)
    return sheets.mask_sheet(images, masks, "spatial attention", step, names) if masks else None


# ---------------------------------------------------------------------------------------------------- maps as arrays


def save_raw(arrays, path):
    """Write {name: tensor} as arrays to one compressed .npz, readable with `numpy.load`. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in arrays.items()}

    def write(temporary):
        with open(temporary, "wb") as file:             # a file object, because NumPy appends .npz to a path
            np.savez_compressed(file, **arrays)

    write_atomically(path, write, sweep=False)
