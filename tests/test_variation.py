"""The share of the images' variance that comes from each input of G."""

import pytest
import torch

from fastgan_models import Generator
from gallery import variation
from generate.latents import Inputs


class Sums:
    """A G whose images are sums of its inputs with these weights."""

    def __init__(self, z, metadata, noise):
        self.weights, self.parts = (z, metadata), {"z": slice(4), "metadata": slice(4, None)}
        self.noise, self.strength = [torch.nn.Identity().eval()], noise

    def __call__(self, z):
        sums = [weight * z[:, part].sum(1) for weight, part in zip(self.weights, self.parts.values(), strict=True)]
        noise = torch.randn(len(z)) * self.strength if self.noise[0].training else 0
        return [(sum(sums) + noise)[:, None, None, None].expand(-1, 3, 2, 2)]


@pytest.mark.parametrize(("weights", "expected"), [
    ((1, 0, 0), {"z": 1, "metadata": 0, "noise": 0}),           # metadata are ignored
    ((0, 2, 0), {"z": 0, "metadata": 1, "noise": 0}),           # metadata drown z
    ((1, 1, 0), {"z": 0.5, "metadata": 0.5, "noise": 0}),
    ((1, 3, 0), {"z": 0.1, "metadata": 0.9, "noise": 0}),
    ((1, 0, 2), {"z": 1, "metadata": 0, "noise": 0.5}),         # of a variance of 4 that the fixed noise does not have
])
def test_shares_of_a_known_generator(weights, expected):
    torch.manual_seed(0)
    G, inputs = Sums(*weights), Inputs(torch.randn(20_000, 8))
    found = variation.shares(G, inputs, G(inputs.z)[0], variation.in_pixels)
    assert found == pytest.approx(expected, abs=0.03) and not G.noise[0].training


def test_shares_of_the_real_generator():
    torch.manual_seed(0)
    G, inputs = Generator(64, 16, 4).eval(), Inputs(torch.randn(8, 16 + 512))
    found = variation.shares(G, inputs, G(inputs.z)[0], variation.in_pixels)
    assert 0.2 < found["z"] < 1 and 0.2 < found["metadata"] < 1 and found["noise"] == 0, "the noise starts at 0"
    G.noise[0].weight.data.fill_(1)
    assert variation.shares(G, inputs, G(inputs.z)[0], variation.in_pixels)["noise"] > 0.01
    assert not any(layer.training for layer in G.modules())
    assert Generator(64, 16, 4, metadata=False).parts == {"z": slice(16)}
