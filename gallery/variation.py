"""Does G use what it is fed? The share of its images' variance that comes from each of its inputs.

The share of an input is its total effect (Jansen 1999; Saltelli et al. 2010, doi 10.1016/j.cpc.2009.09.018, table 2):
how far an image moves when this input alone is that of another sample, over how far two samples are apart. An ignored
input has 0, one that decides everything 1. The shares add up to 1 where inputs act independently, and to more where
they act together.
"""

import torch


@torch.no_grad()
def shares(G, inputs, images, distance):
    """Return {input: share} for G's images (N, 3, H, W) of `inputs`, N >= 2.

    G is in eval mode; its inputs are the parts of z in `G.parts`, {name: slice}, and the noise maps of the layers
    `G.noise`. `distance(a, b)` returns the mean squared distance of images a, b, a float. Noise is drawn from the
    global random state.
    """
    others = inputs.z.roll(1, 0)                                        # (N, z_dim [+ 512]): that of another sample
    changed = {}
    for name, part in G.parts.items():
        z = inputs.z.clone()
        z[:, part] = others[:, part]
        changed[name] = G(**{**inputs.as_arguments(), "z": z})[0]
    changed["noise"] = _with_other_noise(G, inputs)
    apart = max(distance(images, images.roll(1, 0)), 1e-12)
    return {name: distance(images, image) / apart for name, image in changed.items()}


def _with_other_noise(G, inputs):
    """Return G's images with newly drawn noise maps."""
    for layer in G.noise:
        layer.train()
    try:
        return G(**inputs.as_arguments())[0]
    finally:
        for layer in G.noise:
            layer.eval()


def in_pixels(a, b):
    """The mean squared difference of images a, b in [-1, 1]."""
    return (a - b).square().mean().item()
