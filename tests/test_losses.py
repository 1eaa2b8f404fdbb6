"""Objectives against manually computed values."""

import pytest
import torch
from torch import nn

from layers.blocks import FeatureHeads
from losses import Hinge, OnFeatures, WassersteinGP, gradient_penalty, hinge
from pretrained import vgg
from sagan_models import Discriminator


class LinearD(nn.Module):
    """D(x) = w . x + 1"""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x, labels=None):
        return (x * self.weight).flatten(1).sum(1) + 1


def test_penalty_of_a_linear_d_has_the_closed_form():
    torch.manual_seed(0)
    D = LinearD(torch.randn(3, 4, 4))
    norm = D.weight.detach().norm()
    penalty = gradient_penalty(D, torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4))
    assert penalty.item() == pytest.approx((norm.item() - 1) ** 2, rel=1e-5)
    penalty.backward()
    assert torch.allclose(D.weight.grad, 2 * (norm - 1) * D.weight.detach() / norm, atol=1e-4)


def test_penalty_is_per_sample_not_of_the_batch():
    class TwoSlopes(nn.Module):
        def forward(self, x, labels=None):       # slope 0 where x < 0, slope 2 per pixel elsewhere
            return torch.where(x[:, 0, 0, 0] < 0, 0 * x.sum((1, 2, 3)), 2 * x[:, 0, 0, 0])

    x = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    assert gradient_penalty(TwoSlopes(), x, x).item() == pytest.approx(1.0)    # mean of (0-1)^2 and (2-1)^2


def test_hinge_by_hand():
    D = LinearD(torch.ones(1, 1, 1))
    real, fake = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1), torch.tensor([-3.0, -0.5]).view(2, 1, 1, 1)
    loss, stats = Hinge().d_loss(D, real, [fake])       # D: real 2, 0; fake -2, 0.5
    assert loss.item() == pytest.approx((0 + 1) / 2 + (0 + 1.5) / 2)
    assert stats["d_real"].item() == 1 and stats["d_fake"].item() == -0.75
    assert Hinge().g_loss(D, None, [fake])[0].item() == 0.75


def test_wgan_gp_is_one_loss():
    D = LinearD(torch.tensor([[[3.0]]]))
    real, fake = torch.tensor([1.0]).view(1, 1, 1, 1), torch.tensor([0.5]).view(1, 1, 1, 1)
    loss, stats = WassersteinGP(10.0).d_loss(D, real, [fake])
    assert stats["gp"].item() == pytest.approx(4)
    assert loss.item() == pytest.approx(2.5 - 4 + 10 * 4)


def test_d_is_trained_on_the_features_beside_its_own_loss_and_the_frozen_network_is_not():
    torch.manual_seed(0)
    maps = vgg.FrozenMaps(vgg.load_vgg("random", ""), "vgg16")
    real, fake = torch.rand(2, 3, 64, 64) * 2 - 1, (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_(True)
    assert [tuple(x.shape[1:3]) for x in maps(real)] == vgg.features_shapes("vgg16", 64) == [(256, 8), (512, 4)]

    D, own = LinearD(torch.full((3, 64, 64), 1e-4)), Hinge()
    D.feature_heads = FeatureHeads(vgg.features_shapes("vgg16", 64), lambda layer: layer)
    both = OnFeatures(own, maps, label_noise=0)
    on_real, on_fake = (D.feature_heads(maps(images)) for images in (real, fake))
    assert on_real.shape == (2, 25 + 1)
    loss, stats = both.d_loss(D, real, [fake])
    assert loss.item() == pytest.approx((own.d_loss(D, real, [fake])[0] + hinge(on_real, on_fake, 0)[0]).item())
    assert {"d_real", "features/d_real", "features/d_fake"} <= stats.keys()
    loss, _ = both.g_loss(D, real, [fake])
    assert loss.item() == pytest.approx(-(D(fake).mean() + on_fake.mean()).item(), abs=1e-6)
    loss.backward()
    assert fake.grad.abs().sum() > 0 and all(weight.grad is None for weight in maps.parameters())

    light = OnFeatures(own, maps, label_noise=0, weight=0.1, share=0.5)
    loss, _ = light.d_loss(D, real, [fake])
    of_heads, _ = hinge(on_real[:1], on_fake[:1], 0)
    assert loss.item() == pytest.approx((own.d_loss(D, real, [fake])[0] + 0.1 * of_heads).item())
    loss, _ = light.g_loss(D, real, [fake])
    assert loss.item() == pytest.approx(-(D(fake).mean() + 0.1 * on_fake[:1].mean()).item(), abs=1e-6)


def test_only_fine_features_see_a_pattern_of_single_pixels():
    plain = torch.zeros(1, 3, 64, 64)
    mesh = plain + (torch.arange(64) % 2 - 0.5) * (torch.arange(64) % 2 * 2 - 1)[:, None]      # a chessboard
    for name, sees, shapes in (("vgg16", False, [(256, 8), (512, 4)]), ("vgg16_fine", True, [(128, 32), (256, 16)])):
        maps = vgg.FrozenMaps(vgg.load_vgg("random", ""), name)
        assert [tuple(x.shape[1:3]) for x in maps(mesh)] == vgg.features_shapes(name, 64) == shapes
        assert all(torch.allclose(*pair) != sees for pair in zip(maps(plain), maps(mesh), strict=True))
    assert vgg.features_shapes("vgg16_fine", 1024) == [(128, 128), (256, 64)]


def test_the_penalty_reaches_through_large_attention():
    """32 x 32 positions take the fused kernel elsewhere, which has no second derivative."""
    D = Discriminator(64, 4, attention=(32,), sn=False)
    with torch.no_grad():
        D.attention["d32"].gamma.fill_(0.5)
    gradient_penalty(D, torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)).backward()
    assert D.attention["d32"].query.weight.grad.abs().sum() > 0
