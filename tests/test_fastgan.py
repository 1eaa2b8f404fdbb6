"""SLAE-FastGAN's networks and objective: published sizes, every imsize, layers against the published formulas."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from families import build_shapes
from fastgan_models import (
    Discriminator,
    Generator,
    Noise,
    SpatialAttention,
    _Layers,
    _pool_to,
    build,
    downscale,
    noise_coefficients,
    small_size,
    take_quadrant,
)
from layers.convolutions import Upsample2x
from layers.norms import ConditionalBatchNorm, batch_statistics
from losses import SelfSupervisedHinge, hinge, l1
from parameter import resolve
from spectral import spectral_norm


def count(net):
    return sum(weight.numel() for weight in net.parameters())


def networks(**flags):
    """Tiny (G, D) at 64 px."""
    torch.manual_seed(0)
    return build(resolve({"model": "fastgan", "imsize": 64, "g_conv_dim": 8, "d_conv_dim": 8, "z_dim": 16, **flags}))


@pytest.mark.parametrize(("imsize", "g", "d"), [(256, 29.13e6, 11.53e6), (1024, 29.18e6, 11.53e6)])
def test_parameter_counts_are_fastgans_and_slae_adds_next_to_nothing(imsize, g, d):
    plain = {"model": "fastgan", "imsize": imsize, "slae": False, "metadata": False}
    G, D = build_shapes(resolve(plain))
    assert count(G) == pytest.approx(g, rel=1e-3) and count(D) == pytest.approx(d, rel=1e-3)
    with_slae = build_shapes(resolve({**plain, "slae": True, "slae_d": True}))
    assert 0 < count(with_slae[0]) - count(G) < count(G) / 1000
    assert 0 < count(with_slae[1]) - count(D) < count(D) / 1000


@pytest.mark.parametrize(("imsize", "slae_kernel"), [
    (64, 7), pytest.param(128, 3, marks=pytest.mark.soak), (256, 3), pytest.param(512, 7, marks=pytest.mark.soak),
    (1024, 3)])
def test_every_size_gives_two_images_masks_logits_and_reconstructions(imsize, slae_kernel):
    G, D = build(resolve({"model": "fastgan", "imsize": imsize, "g_conv_dim": 2, "d_conv_dim": 4, "z_dim": 6,
                          "slae_d": True, "slae_kernel": slae_kernel, "metadata_weight": 0.3}))
    kernels = {skip.attention.conv.kernel_size for net in (G, D) for skip in net.skips.values()}
    assert kernels == {(slae_kernel, slae_kernel)} and G.metadata_weight == 0.3
    z, small = torch.randn(2, 6 + 512), min(imsize // 2, 128)
    images = G(z)
    assert [image.shape for image in images] == [(2, 3, imsize, imsize), (2, 3, small, small)]
    assert all(image.abs().max() <= 1 for image in images)
    judgement = D(images)
    assert judgement.logits.shape == (2, 50)
    rebuilt = D.reconstruct(judgement, images[0])
    assert [image.shape for pair in rebuilt.values() for image in pair] == 6 * [(2, 3, small, small)]
    masks = {name: tuple(mask.shape) for name, mask in {**G.attention_maps(z), **D.attention_maps(images[0])}.items()}
    expected = [("slae", size) for size in ((4, 8, 16) if imsize <= 256 else (4, 8, 16, 32))]
    expected += [("slae_d", size) for size in (256, 128, 64) if size <= imsize]
    assert masks == {f"{name}{size}": (2, 1, size, size) for name, size in expected}


def test_what_networks_with_and_without_the_additions_have_in_common_starts_the_same():
    """So that an ablation compares pairs."""
    plain = networks(slae=False, metadata=False)
    of_slae, of_metadata = {f"skips.{size}.attention.conv.weight" for size in (16, 32, 64)}, {"mix.weight"}
    for slae, metadata, added in (
            (True, False, of_slae), (False, True, of_metadata), (True, True, of_slae | of_metadata)):
        changed = networks(slae=slae, metadata=metadata)
        assert changed[0].state_dict().keys() - plain[0].state_dict().keys() == added
        for before, after in zip(plain, changed, strict=True):
            before, after = before.state_dict(), after.state_dict()
            assert before.keys() <= after.keys()
            assert [name for name in before if not torch.equal(before[name], after[name])] == []
    masks = [weight for name, weight in changed[0].named_parameters() if ".attention." in name]
    assert len(masks) == 3 and not torch.equal(masks[0], masks[1])


def test_a_batch_of_one_trains_every_weight():
    G, D = networks(slae_d=True)
    fake = G(torch.randn(1, 16 + 512))
    objective, real = SelfSupervisedHinge(l1, 1.0, 0.2), torch.rand(1, 3, 64, 64)
    loss, _ = objective.d_loss(D, real, [image.detach() for image in fake])
    loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in D.parameters())
    objective.g_loss(D, real, fake)[0].backward()
    assert all(weight.grad.abs().sum() > 0 for weight in G.parameters())


def test_the_mask_is_two_poolings_and_one_convolution():
    torch.manual_seed(0)
    attention, x = SpatialAttention(3), torch.randn(2, 5, 6, 7)
    mask = attention(x)
    assert [tuple(weight.shape) for weight in attention.parameters()] == [(1, 2, 3, 3)], "no bias"
    pooled = torch.stack([x.mean(1), x.amax(1)], 1)
    for y, at in ((0, 0), (3, 4), (5, 6)):
        total = torch.tensor(0.0)
        for dy in range(3):
            for dx in range(3):
                row, column = y + dy - 1, at + dx - 1
                if 0 <= row < 6 and 0 <= column < 7:
                    total = total + (attention.conv.weight[0, :, dy, dx] * pooled[1, :, row, column]).sum()
        assert mask[1, 0, y, at].item() == pytest.approx(torch.sigmoid(total).item(), abs=1e-6)


def test_a_skip_scales_the_targets_channels_by_what_the_masked_source_says():
    G, _ = networks(sn="none")
    skip = G.skips["32"]
    source, target = torch.randn(2, 64, 8, 8), torch.randn(2, 16, 32, 32)
    scale = skip(source, target) / target
    assert scale.std((2, 3)).max() < 1e-5, "one factor per image and channel"
    masked = source * skip.attention(source)
    pooled = masked.view(2, 64, 4, 2, 4, 2).mean((3, 5))                            # (2, 64, 4, 4)
    first, second = (layer.weight for layer in skip.gate if isinstance(layer, nn.Conv2d))
    hidden = (pooled.flatten(1) @ first.flatten(1).T)                               # (2, 16)
    hidden = hidden * torch.sigmoid(hidden)
    assert torch.allclose(scale[:, :, 0, 0], torch.sigmoid(hidden @ second.flatten(1).T), atol=1e-5)


def test_without_slae_it_is_fastgans_excitation():
    G, D = networks(slae=False)
    assert all(skip.attention is None for net in (G, D) for skip in net.skips.values())
    assert G.attention_maps(torch.randn(1, 16 + 512)) == {} == D.attention_maps(torch.randn(1, 3, 64, 64))


def test_low_maps_drive_the_last_three():
    of_imsize = {imsize: build_shapes(resolve({"model": "fastgan", "imsize": imsize})) for imsize in (64, 256, 1024)}
    assert of_imsize[64][0].sources == {16: 4, 32: 8, 64: 16}
    assert of_imsize[256][0].sources == {64: 4, 128: 8, 256: 16}
    assert of_imsize[1024][0].sources == {64: 4, 128: 8, 256: 16, 512: 32}
    assert of_imsize[256][1].sources == {32: 256, 16: 128, 8: 64}


def test_spectral_norm_is_everywhere_but_on_the_masks_and_the_mixture():
    G, D = networks(slae_d=True)
    plain = {name for net, letter in ((G, "G."), (D, "D.")) for name, layer in net.named_modules(prefix=letter)
             if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
             and not parametrize.is_parametrized(layer)}
    assert plain == {"G..mix", *(f"G..skips.{size}.attention.conv" for size in (16, 32, 64)),
                     "D..skips.8.attention.conv"}
    G, D = networks(sn="none")
    assert not any(parametrize.is_parametrized(layer) for net in (G, D) for layer in net.modules())


def test_noise_begins_without_effect_and_in_evaluation_depends_on_z_alone():
    noise, x = Noise(1), torch.zeros(3, 2, 8, 8)
    assert torch.equal(noise(x), x)
    with torch.no_grad():
        noise.weight.fill_(0.5)
    first = noise(x)
    assert torch.equal(first[:, 0], first[:, 1]), "one map for all channels"
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, noise(x))
    assert first.std().item() == pytest.approx(0.5, rel=0.2)
    noise.eval()
    x, z = torch.zeros(64, 2, 16, 16), torch.randn(64, 16)
    still = noise(x, noise_coefficients(z))[:, 0]                       # (64, 16, 16)
    assert torch.equal(still, noise(x, noise_coefficients(z))[:, 0])
    assert still.std(0).mean().item() == pytest.approx(0.5, rel=0.1), "over the images, as in training"
    assert still.flatten(1).std(1).mean().item() == pytest.approx(0.5, rel=0.1), "over an image"
    close = noise(x, noise_coefficients(z + 0.01 * torch.randn(64, 16)))[:, 0]
    assert (close - still).abs().max() < 0.1, "it changes smoothly with z"


def test_layers_draw_their_initial_weights_one_after_the_other():
    """So that a seed begins as it did in earlier versions."""
    torch.manual_seed(0)
    block = _Layers(True, classes=3).deep_up(6, 4)
    torch.manual_seed(0)
    for conv, norm, channels in ((block[0], block[2], 6), (block[4], block[6], 4)):
        again = spectral_norm(nn.Conv2d(channels, 8, 3, padding=1, bias=False)), ConditionalBatchNorm(8, 3)
        for layer, other in zip((conv, norm), again, strict=True):
            for name, tensor in other.state_dict().items():
                assert torch.equal(layer.state_dict()[name], tensor), name


def test_every_layer_has_noise_of_its_own_in_evaluation():
    """As in training. With one map for both layers of a block, G added up the same noise twice."""
    layers = [layer.eval() for layer in networks()[0].modules() if isinstance(layer, Noise)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.fill_(1)
        coefficients = noise_coefficients(torch.randn(1, 16))
        maps = torch.stack([layer(torch.zeros(1, 1, 32, 32), coefficients).flatten() for layer in layers])
    assert len(layers) == 4 and (torch.corrcoef(maps) - torch.eye(4)).abs().max() < 0.2


def test_a_record_sees_d_as_it_is_in_training_and_leaves_its_statistics():
    _, D = networks()
    images = torch.rand(8, 3, 64, 64) * 2 - 1
    expected, before = D(images).logits, {name: value.clone() for name, value in D.named_buffers()}
    with torch.no_grad(), batch_statistics(D.eval()):
        shown = D(images).logits
    assert torch.allclose(shown, expected, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in D.named_buffers())


def test_a_sample_depends_on_no_batch_mate_and_leaves_the_random_state():
    G, _ = networks()
    with torch.no_grad():
        for layer in G.modules():
            if isinstance(layer, Noise):
                layer.weight.fill_(0.3)
    G(torch.randn(4, 16 + 512))
    G.eval()
    z, before = torch.randn(4, 16 + 512), torch.get_rng_state()
    assert torch.allclose(G(z)[0][2:3], G(z[2:3])[0], atol=1e-5)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_and_metadata_mix_at_variance_one_whatever_the_mixture_learns():
    z, metadata = torch.randn(5000, 16), torch.randn(5000, 512)
    for weight, scale in ((0.0, 20.0), (0.25, 0.1), (0.5, 20.0), (0.9, 0.1)):
        G = Generator(64, 16, 2, metadata_weight=weight)
        with torch.no_grad():
            G.mix.weight.normal_(std=scale)
        latent = G.latent(torch.cat([z, metadata], 1))
        assert latent.shape == (5000, 16)
        assert latent.var().item() == pytest.approx(1, rel=0.05)
        of_z = (latent * z).mean().item() ** 2
        assert of_z == pytest.approx(1 - weight, abs=0.06), "z's share of the variance"
    assert torch.equal(Generator(64, 16, 2, metadata=False).latent(z), z)


def test_metadata_reach_the_image():
    G, _ = networks()
    images = G(torch.cat([torch.randn(1, 16).expand(8, -1), torch.randn(8, 512)], 1))[0]
    assert images.std(0).mean() > 0.5 * G(torch.randn(8, 16 + 512))[0].std(0).mean(), "of one z and eight metadata"


def test_downscaling_is_anti_aliased():
    stripes = torch.tensor([-1.0, 1.0, 1.0, -1.0]).repeat(16).expand(1, 3, 64, 64)
    assert downscale(stripes, 16)[..., 2:-2].abs().max() < 0.3, "mean grey; the pixels next to each centre are white"
    assert downscale(stripes, 64) is stripes
    assert [small_size(imsize) for imsize in (64, 128, 256, 512, 1024)] == [32, 64, 128, 128, 128]


def test_quadrants_in_reading_order():
    x = torch.arange(16.0).view(1, 1, 4, 4).repeat(4, 1, 1, 1)
    corners = take_quadrant(x, torch.arange(4))[:, 0]
    assert corners.tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]], [[8, 9], [12, 13]], [[10, 11], [14, 15]]]


def test_a_quadrant_is_rebuilt_from_its_own_quarter_of_the_map():
    _, D = networks()
    real, quadrant = torch.rand(4, 3, 64, 64), torch.tensor([3, 0, 2, 1])
    judgement = D([real, downscale(real, 32)])
    seen = []
    D.decode_middle.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    _, target = D.reconstruct(judgement, real, quadrant)["middle"]
    assert torch.equal(target[0], real[0, :, 32:, 32:]) and torch.equal(target[3], real[3, :, :32, 32:])
    assert torch.equal(seen[0][0], judgement.middle[0, :, 8:, 8:])
    assert torch.equal(seen[0][3], judgement.middle[3, :, :8, 8:])


def test_whole_images_are_rebuilt_from_the_deep_and_from_the_small_path():
    _, D = networks()
    real = torch.rand(2, 3, 64, 64)
    judgement = D([real, downscale(real, 32)])
    rebuilt = D.reconstruct(judgement, real)
    for name, decoder in (("last", D.decode_last), ("small", D.decode_small)):
        assert torch.allclose(rebuilt[name][0], decoder(getattr(judgement, name)), atol=1e-5)
        assert torch.equal(rebuilt[name][1], downscale(real, 32))


def test_the_drawn_quadrants_differ_between_images_and_follow_the_seed():
    _, D = networks()
    real = torch.rand(32, 3, 64, 64)
    judgement = D([real, downscale(real, 32)])
    targets = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        targets.append(D.reconstruct(judgement, real)["middle"][1])
    assert torch.equal(targets[0], targets[1]) and not torch.equal(targets[0], targets[2])
    corners = {next(q for q in range(4) if torch.equal(target, take_quadrant(image[None], torch.tensor([q]))[0]))
               for target, image in zip(targets[0], real, strict=True)}
    assert corners == {0, 1, 2, 3}


def test_margins_are_softened_by_the_label_noise():
    zeros = torch.zeros(4000)
    assert hinge(zeros, zeros, 0.0)[0].item() == 2
    loss = hinge(zeros, zeros, 0.2)[0].item()
    assert loss == pytest.approx(2 * 0.9, rel=0.01), "margins uniform in 0.8 to 1"
    on_real, on_fake = torch.tensor([0.75]), torch.tensor([-0.75])
    assert 0 < hinge(on_real, on_fake, 0.2)[0] < 0.5
    assert hinge(torch.tensor([1.0]), torch.tensor([-1.0]), 0.2)[0] == 0


def test_d_loss_is_the_hinge_of_both_paths_and_three_reconstructions():
    _, D = networks()
    real, fake = torch.rand(3, 3, 64, 64), [torch.rand(3, 3, 64, 64), torch.rand(3, 3, 32, 32)]
    loss, stats = SelfSupervisedHinge(l1, 2.0, 0.0).d_loss(D, real, fake)
    on_real = D([real, downscale(real, 32)]).logits         # alone: batch norm must not have mixed real and fake
    on_fake = D(fake).logits
    expected = (1 - on_real).relu().mean() + (1 + on_fake).relu().mean()
    apart = sum(stats[f"recon/{name}"] for name in ("last", "middle", "small"))
    assert loss.item() == pytest.approx((expected + 2 * apart).item(), rel=1e-4)
    assert stats["recon/last"].item() == pytest.approx(
        nn.functional.l1_loss(D.decode_last(D([real, downscale(real, 32)]).last), downscale(real, 32)).item(), rel=1e-4)


def test_without_their_weight_no_reconstructions_are_made():
    _, D = networks()
    real, fake = torch.rand(3, 3, 64, 64), [torch.rand(3, 3, 64, 64), torch.rand(3, 3, 32, 32)]
    D.decode_last = D.decode_middle = D.decode_small = None             # calling one would raise
    loss, stats = SelfSupervisedHinge(l1, 0.0, 0.0).d_loss(D, real, fake)
    assert loss.isfinite() and stats.keys() == {"d_real", "d_fake"}


def test_real_images_with_labels_of_others_count_as_fakes():
    D = Discriminator(64, 4, classes=3)
    nn.init.normal_(D.projection.table.parametrizations.weight.original)
    real, fake = torch.rand(3, 3, 64, 64), [torch.rand(3, 3, 64, 64), torch.rand(3, 3, 32, 32)]
    labels, others = torch.tensor([0, 1, 2]), torch.tensor([1, 1, 0])
    objective = SelfSupervisedHinge(l1, 0.0, 0.0)
    loss, stats = objective.d_loss(D, real, fake, (labels, others))
    wrong = (1 + D(real, others).logits[:, :25]).relu()                 # the deep path's; the small path has no labels
    assert stats["mismatch"].item() == pytest.approx((wrong[[0, 2]].sum() / (3 * 25)).item(), rel=1e-4)
    hinges, _ = hinge(D(real, labels).logits, D(fake, others).logits, 0.0)
    assert loss.item() == pytest.approx((hinges + objective.MISMATCH_WEIGHT * stats["mismatch"]).item(), rel=1e-4)
    assert (D(real, labels).logits != D(real, others).logits).any()


def test_the_weight_of_the_reconstruction_does_not_grow_with_the_batch():
    _, D = networks()
    D.eval()
    real, fake = torch.rand(2, 3, 64, 64), [torch.rand(2, 3, 64, 64), torch.rand(2, 3, 32, 32)]
    objective = SelfSupervisedHinge(l1, 1.0, 0.0)
    once = objective.d_loss(D, real, fake)[1]["recon/last"]
    thrice = objective.d_loss(D, real.repeat(3, 1, 1, 1), [x.repeat(3, 1, 1, 1) for x in fake])[1]["recon/last"]
    assert once.item() == pytest.approx(thrice.item(), rel=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_maps_that_autocast_began_in_bf16_stay_so(device):
    """A map in fp32 takes twice the memory, and the time to turn it over before each convolution and after.

    Of its own accord autocast doubles in fp32 on a GPU alone.
    """
    G = networks()[0].to(device)
    found, x = {}, torch.randn(2, 128, 4, 4, device=device)
    with torch.autocast(device, torch.bfloat16):
        for layer in G.blocks["8"]:                 # the deep block: noise, batch norm, gate, twice
            x = layer(x)
            found[type(layer).__name__.removeprefix("Parametrized")] = x.dtype
        found["next"] = G.blocks["16"][0](x).dtype
    assert set(found) >= {"UpConv", "Noise", "BatchNorm2d", "GLU"}
    assert set(found.values()) == {torch.bfloat16}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_the_compiler_sees_doubles_to_the_same_maps_and_gradients(layout):
    double, found = Upsample2x(), []
    for layer in (double, torch.compile(double, backend="eager")):
        torch.manual_seed(0)
        x = torch.randn(2, 5, 3, 4).to(memory_format=layout).requires_grad_()
        maps = layer(x)
        (maps * torch.randn(2, 5, 6, 8)).sum().backward()
        found.append((maps, x.grad))
    assert found[1][0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.gpu
def test_a_gpu_pools_to_the_same_means():
    x = torch.randn(2, 5, 32, 64)
    torch.testing.assert_close(_pool_to((4, 8), x.cuda()).cpu(), _pool_to((4, 8), x))
