"""Does G use what it is fed? The share of its images' variance that comes from each of its inputs.

The share of an input is its total effect (Jansen 1999; Saltelli et al. 2010, doi 10.1016/j.cpc.2009.09.018, table 2):
how far an image moves when this input alone is that of another sample, over how far two samples are apart. An ignored
input has 0, one that decides everything 1. The shares add up to 1 where inputs act independently, and to more where
they act together.
"""

from dataclasses import replace

import torch


@torch.no_grad()
def swaps(G, inputs, draw):
    """Yield (name of an input, G's images with this input alone that of another sample), for each input.

    Inputs are the parts of z in `G.parts`, {name: slice}, the labels if there are any, and the noise maps if
    `G.has_noise`. `draw(inputs)` returns images (N, C, H, W), N >= 2, with G in eval mode.
    """
    if G.has_noise:
        inputs = replace(inputs, noise=inputs.z)                        # holds the maps while z changes
        yield "noise", draw(replace(inputs, noise=inputs.z.roll(1, 0)))
    for name, part in G.parts.items():
        z = inputs.z.clone()
        z[:, part] = inputs.z.roll(1, 0)[:, part]                       # (N, z_dim [+ 512])
        yield name, draw(replace(inputs, z=z))
    if inputs.labels is not None:
        yield "label", draw(replace(inputs, labels=inputs.labels.roll(1, 0)))


def shares(G, inputs, images, draw, distance):
    """Return {input: share} for G's images (N, C, H, W) of `inputs`; see `swaps`.

    `distance(a, b)` returns the squared distances (N,) of images a, b.
    """
    apart = distance(images, images.roll(1, 0)).mean().clamp(min=1e-12)
    return {name: (distance(images, image).mean() / apart).item() for name, image in swaps(G, inputs, draw)}


def in_pixels(a, b):
    """The mean squared differences (N,) of images a, b in [-1, 1]."""
    return (a - b).square().mean((1, 2, 3))
