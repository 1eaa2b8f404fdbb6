"""SAGAN's networks: published sizes, every imsize, attention against the published formula."""

import copy

import pytest
import torch

from device.precision import Precision
from generate.draw import recompute_bn_stats
from generate.latents import Inputs
from layers.attention import SelfAttention, attend, gammas
from parameter import resolve
from sagan_models import Discriminator, Generator, build

FP32 = Precision("fp32", torch.device("cpu"))


def count(net):
    return sum(weight.numel() for weight in net.parameters())


def test_attention_on_a_bf16_map_gives_one():
    with torch.autocast("cpu", torch.bfloat16):
        assert SelfAttention(16)(torch.randn(1, 16, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_parameter_counts_are_the_published_models():
    G, D = build(resolve({}))
    assert (count(G), count(D)) == (3_832_885, 3_175_299)


@pytest.mark.parametrize("imsize", [32, 128, pytest.param(256, marks=pytest.mark.soak)])
def test_every_size_gives_pictures_and_one_logit_each(imsize):
    config = resolve({"imsize": imsize, "g_conv_dim": 3, "d_conv_dim": 5, "z_dim": 7})
    G, D = build(config)
    (image,) = G(torch.randn(2, 7))
    assert image.shape == (2, 3, imsize, imsize) and image.abs().max() <= 1
    assert D(image).shape == (2,)


def test_a_batch_of_one_trains():
    torch.manual_seed(0)
    G, D = build(resolve({"imsize": 32, "g_conv_dim": 4, "d_conv_dim": 4}))
    for gamma in gammas(G, D).values():
        gamma.fill_(0.5)                                # 0 at first: then nothing is learned behind it
    logits = D(G(torch.randn(1, 128))[0])
    assert logits.shape == (1,)
    logits.sum().backward()
    for name, weight in G.named_parameters():
        # a constant that is added before batch norm, or to all keys, changes nothing
        assert weight.grad is not None and (name.endswith("bias") or weight.grad.abs().sum() > 0), name


def test_attention_sits_where_the_flags_say():
    G = Generator(64, 8, 4, attention=(8, 32))
    D = Discriminator(64, 4, attention=(16,))
    queries = torch.tensor([[0.5, 0.5]])
    image = G(torch.randn(2, 8))[0]
    assert {name: tuple(maps.shape) for name, maps in G.attention_maps(torch.randn(2, 8), queries).items()} == {
        "g8": (2, 1, 8, 8), "g32": (2, 1, 32, 32)}
    assert {name: tuple(maps.shape) for name, maps in D.attention_maps(image, queries).items()} == {
        "d16": (2, 1, 16, 16)}


def written_formula(layer, x):
    """SAGAN section 3, position by position."""
    B, C, H, W = x.shape
    out = torch.zeros_like(x)
    for b in range(B):
        q, k, v = (conv(x[b:b + 1])[0].reshape(-1, H * W) for conv in (layer.query, layer.key, layer.value))
        for j in range(H * W):
            scores = torch.stack([torch.dot(q[:, j], k[:, i]) for i in range(H * W)])
            beta = torch.exp(scores - scores.max())
            beta = beta / beta.sum()
            out[b, :, j // W, j % W] = (v * beta).sum(1)
    return layer.gamma * out + x


def test_attention_equals_the_written_formula():
    torch.manual_seed(0)
    layer, x = SelfAttention(16), 2 * torch.randn(2, 16, 5, 4)
    assert torch.equal(layer(x), x), "gamma starts at 0"
    with torch.no_grad():
        layer.gamma.fill_(0.7)
        assert torch.allclose(layer(x), written_formula(layer, x), atol=1e-5)


def test_the_fused_kernel_gives_the_plain_numbers_and_gradients():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 1024, 4), torch.randn(2, 1024, 4), torch.randn(2, 1024, 32)
    weight = torch.randn(2, 1024, 32)
    results = []
    for formula in (attend, lambda q, k, v: torch.softmax(q @ k.transpose(1, 2), -1) @ v):
        inputs = [t.clone().requires_grad_(True) for t in (q, k, v)]
        out = formula(*inputs)
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for fused, plain in zip(*results, strict=True):
        assert torch.allclose(fused, plain, atol=2e-5)


def test_training_never_holds_the_square_matrix():
    """Attention at 64 x 64: nothing that is kept for the backward pass has N * N elements, N = 4096."""
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    layer, x = SelfAttention(16), torch.randn(1, 16, 64, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x).sum().backward()
    assert max(kept) < 4096 * 4096 / 8


def test_a_map_is_what_the_forward_pass_weighs_with():
    torch.manual_seed(0)
    layer, x = SelfAttention(8), torch.randn(2, 8, 6, 6)
    queries = torch.tensor([[0.0, 0.0], [0.99, 0.5], [1.0, 1.0]])
    maps = layer.maps(x, queries)                                       # (2, 3, 6, 6)
    assert torch.allclose(maps.sum((2, 3)), torch.ones(2, 3), atol=1e-6)
    with torch.no_grad():
        layer.gamma.fill_(1.0)
        looked_at = (layer(x) - x).flatten(2)                           # (2, 8, 36)
        value = layer.value(x).flatten(2)
    for number, position in enumerate((0, 5 * 6 + 3, 35)):
        expected = (value * maps[:, number].flatten(1)[:, None]).sum(2)
        assert torch.allclose(looked_at[:, :, position], expected, atol=1e-5)


def test_recomputed_batch_norm_statistics_are_those_of_the_net_itself():
    """Afterwards eval mode gives what the same net gives in training mode on a large batch."""
    torch.manual_seed(0)
    G, z = Generator(32, 8, 8, attention=(8,)), torch.randn(256, 8)
    for _ in range(3):
        G(5 * torch.randn(16, 8))                       # statistics of something else
    recompute_bn_stats(G.eval(), Inputs(z), FP32, batch=256)
    assert not any(layer.training for layer in G.modules())
    with torch.no_grad():
        recomputed, own = G(z)[0], G.train()(z)[0]
    assert (recomputed - own).abs().max() < 0.02 * own.abs().max()


def test_sampling_does_not_depend_on_batch_mates_and_changes_nothing():
    G = Generator(32, 8, 4, attention=(8,)).eval()
    before = copy.deepcopy(G.state_dict())
    z = torch.randn(5, 8)
    with torch.no_grad():
        alone, together = G(z[:1])[0], G(z)[0][:1]
    assert torch.allclose(alone, together, atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in G.state_dict().items())


def test_pooled_keys_cover_maps_of_odd_sides():
    torch.manual_seed(0)
    layer, x = SelfAttention(16, pool=True), torch.randn(1, 16, 4, 5)
    torch.nn.init.ones_(layer.gamma)
    changed = x.clone()
    changed[..., 4] += 1
    assert layer.maps(x, torch.tensor([[0.1, 0.1]])).shape == (1, 1, 2, 3)
    assert not torch.equal(layer(x)[..., :4], layer(changed)[..., :4]), "the last column is attended to"
