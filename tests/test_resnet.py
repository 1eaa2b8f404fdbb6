"""The SAGAN paper's own networks: the public parameter counts, the blocks' formulas, where spectral norm is."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from layers import norms
from layers.norms import ClassTable, ConditionalBatchNorm
from parameter import parse, resolve
from resnet_models import Discriminator, DownBlock, Generator, UpBlock, build


def count(net):
    return sum(weight.numel() for weight in net.parameters())


@pytest.mark.parametrize(("imsize", "classes", "attention", "published"), [
    (32, 10, 16, (4_386_308, 1_075_586)), (64, 10, 32, (12_292_996, 19_558_082)),
    (64, 200, 32, (13_387_396, 19_752_642)), (128, 1000, 64, (42_017_412, 39_448_258)),
    (128, 1000, 32, (42_078_852, 39_463_618)),
])
def test_parameters_are_as_many_as_in_public_logs(imsize, classes, attention, published):
    flags = ("--arch", "resnet", "--imsize", str(imsize), "--g_attn", str(attention), "--d_attn", str(attention))
    with torch.device("meta"):
        assert tuple(map(count, build(resolve(parse(flags)), classes))) == published


@pytest.mark.parametrize(("imsize", "classes"), [(32, 0), (64, 3), (128, 0),
                                                 pytest.param(256, 3, marks=pytest.mark.soak)])
def test_every_size_has_its_shapes(imsize, classes):
    config = resolve(parse(("--arch", "resnet", "--imsize", str(imsize), "--g_conv_dim", "2", "--d_conv_dim", "2")))
    G, D = build(config, classes)
    labels = torch.tensor([0, 2]) if classes else None
    (images,) = G(torch.randn(2, 128), labels)
    queries = torch.tensor([[0.2, 0.5]])
    half = min(32, imsize // 2) // 2                    # keys are pooled
    assert images.shape == (2, 3, imsize, imsize) and D(images, labels).shape == (2,)
    for maps in (G.attention_maps(torch.randn(2, 128), queries, labels), D.attention_maps(images, queries)):
        ((layer, of_layer),) = maps.items()
        assert of_layer.shape == (2, 1, half, half) and torch.allclose(of_layer.sum((2, 3)), torch.ones(2, 1))


@pytest.mark.parametrize("side", [4, 16])
def test_blocks_compute_the_published_formulas(side):
    """There the 1x1 convolution of a skip comes after upsampling, and before pooling, and so does the 3x3 one."""
    def wrap(layer):
        return nn.init.normal_(layer.bias) is None or layer

    def conv(x, layer):
        return F.conv2d(x, layer.weight, layer.bias, padding=1)

    x, labels = torch.randn(2, 3, side, side), torch.tensor([1, 0])
    up = UpBlock(3, 5, 2, wrap).eval()
    nn.init.normal_(up.norm1.scale.weight)
    h = conv(F.interpolate(F.relu(up.norm1(x, labels)), scale_factor=2), up.conv1)
    expected = up.conv2(F.relu(up.norm2(h, labels))) + up.skip(F.interpolate(x, scale_factor=2))
    assert torch.allclose(up(x, labels), expected, atol=1e-5)
    for first, ahead in ((True, x), (False, F.relu(x))):
        down = DownBlock(3, 5, wrap, first=first)
        expected = F.avg_pool2d(conv(F.relu(down.conv1(ahead)), down.conv2), 2) + F.avg_pool2d(down.skip(x), 2)
        assert torch.allclose(down(x), expected, atol=1e-5)
    keep = DownBlock(3, 3, wrap, down=False)
    assert torch.allclose(keep(x), keep.conv2(F.relu(keep.conv1(F.relu(x)))) + x, atol=1e-5)


def test_the_skip_gets_what_the_block_got():
    """A ReLU in place would cut x before the skip reads it."""
    x = torch.randn(2, 4, 8, 8)
    for block in (UpBlock(4, 4, 0, lambda layer: layer), DownBlock(4, 4, lambda layer: layer)):
        before = x.clone()
        block(x)
        assert torch.equal(x, before)


def test_spectral_norm_is_everywhere_but_on_batch_norm():
    for net, tables in ((Generator(32, 8, 4, (16,), True, 3), 12), (Discriminator(32, 4, (16,), True, 3), 0)):
        layers = [layer for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.Linear, nn.Embedding))]
        plain = [layer for layer in layers if not parametrize.is_parametrized(layer, "weight")]
        assert len(plain) == tables < len(layers) and all(type(layer) is ClassTable for layer in plain)


def test_a_class_has_its_own_scale_and_shift():
    norm = ConditionalBatchNorm(2, 3).eval()
    with torch.no_grad():
        norm.scale.weight.copy_(torch.tensor([[1., 1.], [2., 3.], [0., 0.]]))
        norm.shift.weight[1] = 5
    x = torch.randn(2, 2, 4, 4)
    plain, own = norm(x, torch.tensor([0, 1]))
    assert torch.allclose(plain, x[0], atol=1e-4)
    assert torch.allclose(own, x[1] * torch.tensor([2., 3.]).view(2, 1, 1) + 5, atol=1e-4)
    between = norm(x, torch.tensor([[0.5, 0.5, 0], [0, 0.25, 0.75]]))      # shares of the classes
    assert torch.allclose(between[0], x[0] * torch.tensor([1.5, 2]).view(2, 1, 1) + 2.5, atol=1e-4)
    assert torch.allclose(between[1], x[1] * torch.tensor([0.5, 0.75]).view(2, 1, 1) + 1.25, atol=1e-4)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_training_with_classes_is_batch_norm_and_each_images_scale_and_shift(dtype, tolerance, one_by_one, monkeypatch):
    monkeypatch.setattr(norms, "ONE_BY_ONE_FROM", 0 if one_by_one else 10**6)
    norm, plain = ConditionalBatchNorm(8, 5), nn.BatchNorm2d(8, affine=False)
    for table in (norm.scale, norm.shift):
        nn.init.normal_(table.weight)
    for net in (norm, plain):
        net.to(torch.float64 if dtype == torch.float64 else torch.float32)
    labels, up = torch.randint(5, (6,)), torch.randn(6, 8, 4, 5).to(dtype)
    x = (torch.randn(6, 8, 4, 5) * 3 + 2).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    weights = [norm.scale.weight, norm.shift.weight]
    scale, shift = (weight[labels][:, :, None, None].to(dtype) for weight in weights)
    expected, got = plain(x) * scale + shift, norm(x, labels)
    pairs = [(got, expected), *zip(torch.autograd.grad(got, [x, *weights], up),
                                   torch.autograd.grad(expected, [x, *weights], up), strict=True)]
    for a, b in pairs:
        assert a.dtype == b.dtype and a.stride() == b.stride() and (a - b).abs().max() <= tolerance * b.abs().max()
    for a, b in zip(norm.norm.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double())
