"""Pictures that are not square, grey or transparent: --imsize 64x128, --channels, --fit, from files to outputs."""

import numpy as np
import pytest
import torch
from conftest import TINY_OF_ANY, assert_same_state, data_config, encode, state
from PIL import ExifTags, Image
from stand_ins import small_swd

from data_loader import build_dataset
from dataset.decode import decode
from dataset.toy import draw_face
from diffaug import augment
from families import FAMILIES
from flags.pictures import PictureShape, as_imsize, sides_at
from generate.modes import load
from metrics import swd
from metrics.swd import sliced_wasserstein
from parameter import parse, resolve
from utils import as_rgb

RED, BLUE, WHITE = (200, 0, 0), (0, 0, 200), (255, 255, 255)
SMALL = ("--g_conv_dim", 2, "--d_conv_dim", 2, "--z_dim", 8, "--batch_size", 2)


def three_stripes(width=90, height=30):
    """Left and right third blue, the middle red."""
    pixels = np.full((height, width, 3), BLUE, np.uint8)
    pixels[:, width // 3:2 * width // 3] = RED
    return Image.fromarray(pixels)


def corner_and_middle(picture):
    """The colours (left edge, centre) of uint8 (C, H, W)."""
    _, H, W = picture.shape
    return tuple(picture[:, H // 2, 1].tolist()), tuple(picture[:, H // 2, W // 2].tolist())


@pytest.mark.parametrize("imsize, fit, left", [
    ("64x64", "crop", RED),         # the middle third alone
    ("32x96", "crop", BLUE),        # has the picture's own proportions
    ("32x64", "crop", BLUE), ("64x32", "crop", RED),
    ("64x64", "stretch", BLUE), ("64x32", "stretch", BLUE),
    ("32x96", "pad", BLUE), ("32x128", "pad", WHITE),
])
def test_pictures_are_brought_to_a_size_by_cropping_padding_or_stretching(imsize, fit, left):
    shape = PictureShape.of(as_imsize(imsize), fit=fit)
    picture = decode(encode(three_stripes(), "PNG"), "x", shape)
    assert tuple(picture.shape) == shape.size
    assert corner_and_middle(picture) == (left, RED)


@pytest.mark.parametrize("size", [(1, 500), (2, 300)])
def test_a_very_thin_picture_keeps_its_colour(size):
    picture = decode(encode(Image.new("RGB", size, RED), "PNG"), "x", PictureShape(32, 128))
    assert corner_and_middle(picture) == (RED, RED)


def test_padding_is_above_and_below_a_wide_picture():
    picture = decode(encode(three_stripes(), "PNG"), "x", PictureShape(96, 96, fit="pad"))
    assert picture[:, 31].eq(255).all() and picture[:, 64].eq(255).all()
    assert corner_and_middle(picture) == (BLUE, RED) and not picture[:, 32:64].eq(255).any()


def transparent_left(colour=RED):
    """A picture whose left half is transparent."""
    pixels = np.full((32, 32, 4), (*colour, 255), np.uint8)
    pixels[:, :16, 3] = 0
    return encode(Image.fromarray(pixels), "PNG")


def test_channels_are_grey_or_keep_transparency():
    grey = decode(transparent_left(), "x", PictureShape(32, 32, "grey"))
    assert grey.shape == (1, 32, 32) and corner_and_middle(grey) == ((255,), (60,)), "0.299 * 200, on white"
    rgba = decode(transparent_left(), "x", PictureShape(32, 32, "rgba"))
    assert corner_and_middle(rgba) == ((0, 0, 0, 0), (*RED, 255)), "invisible colours are black"
    padded = decode(transparent_left(), "x", PictureShape(32, 64, "rgba", "pad"))
    assert corner_and_middle(padded)[0] == (0, 0, 0, 0)
    opaque = decode(encode(three_stripes(), "JPEG", quality=95), "x", PictureShape(32, 32, "rgba"))
    assert opaque[3].eq(255).all()
    assert draw_face(3, 32, transparent=True)[0, 0, 3] == 0


def test_networks_that_want_rgb_see_grey_and_what_is_transparent_on_white():
    image = torch.tensor([0.5, -1.0, 0.0, -1.0]).view(1, 4, 1, 1).expand(1, 4, 2, 2).clone().requires_grad_()
    assert as_rgb(image).eq(1).all(), "transparent: white, whatever its colours"
    as_rgb(image).sum().backward()
    assert image.grad[:, 3].abs().sum() > 0
    picture = torch.tensor([200, 0, 100, 128], dtype=torch.uint8).view(1, 4, 1, 1)
    assert as_rgb(picture).flatten().tolist() == [227, 127, 177]
    assert as_rgb(torch.zeros(2, 1, 4, 4)).shape == (2, 3, 4, 4)


def test_colour_augmentation_leaves_transparency():
    images = torch.rand(4, 4, 8, 8)
    changed = augment(images, ("color",))
    assert changed[:, 3].equal(images[:, 3]) and not changed[:, :3].allclose(images[:, :3])


@pytest.mark.parametrize("text, words", [
    ("64x", "neither a number of pixels nor HEIGHTxWIDTH"), ("a", "HEIGHTxWIDTH"),
    ("64x70", "multiple of 16, a quarter of the shorter one, such as 64"),
    ("64x512", "at most 4 times"), ("48x96", "the shorter side must be 32, 64, 128 or 256"),
])
def test_sizes_that_no_network_has_are_refused(run, text, words):
    code, _, error = run("--dataset", "toy", "--imsize", text)
    assert code == 2 and "--imsize" in error and words in error


def test_a_run_that_cuts_most_of_its_pictures_away_says_so(run, tmp_path, capsys):
    (tmp_path / "wide").mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for number in range(4):
        three_stripes(96, 48).save(tmp_path / "wide" / f"{number}.png")
    flags = ("--dataset", "folder", "--image_path", "wide", "--dry_run", *SMALL)
    _, out, _ = run(*flags, "--imsize", "64x32")
    assert "--imsize 64x32 cuts away 75% of a usual picture, such as one of 48x96" in out
    assert "cuts away" not in run(*flags, "--imsize", "32x64")[1]
    assert "cuts away" not in run(*flags, "--imsize", "64x32", "--fit", "pad")[1]
    config = data_config(tmp_path / "wide", imsize=as_imsize("64x32"), fit="crop", check_data="auto", cache="on")
    for words in ("64x32 cuts away 75%", ""):
        build_dataset(config)
        assert ("cuts away" in (out := capsys.readouterr().out)) == bool(words) and words in out, "the first time"
    for number in range(4):     # the same photographs, as a telephone saves them upright
        three_stripes(96, 48).save(tmp_path / "wide" / f"{number}.png", exif=exif)
    assert "cuts away" not in run(*flags, "--imsize", "64x32")[1]


def test_a_square_may_be_written_as_one():
    assert (as_imsize("64x64"), as_imsize("64×128"), as_imsize(64)) == (64, "64x128", 64)


@pytest.mark.parametrize("model, imsize, channels", [
    ("sagan", "32x48", "grey"), ("sagan", "128x64", "rgba"), ("sagan --arch resnet", "32x64", "rgba"),
    ("fastgan --metadata false", "64x96", "rgba"), ("fastgan --metadata false", "256x128", "grey"),
    *(pytest.param(model, imsize, channels, marks=pytest.mark.soak) for channels in ("grey", "rgba")
      for model, imsize in (("sagan --arch resnet", "128x64"), ("fastgan --metadata false", "1024x512"))),
])
def test_networks_of_every_shape(model, imsize, channels):
    config = resolve(parse(["--model", *model.split(), "--imsize", imsize, "--channels", channels, *map(str, SMALL)]))
    G, D = (net.eval() for net in FAMILIES[config.model].build(config))
    z = torch.randn(2, 8)
    with torch.no_grad():
        images = G(z)
        assert tuple(images[0].shape[1:]) == PictureShape.of_config(config).size
        if len(images) > 1:
            assert tuple(images[1].shape[2:]) == sides_at(imsize, G.small_size)
        D(images if len(images) > 1 else images[0])


@pytest.mark.parametrize("model, imsize, channels", [
    ("sagan --g_attn 8 --d_attn none", "32x64", "rgba"),
    pytest.param("fastgan --metadata false --recon l1", "64x96", "grey", marks=pytest.mark.soak),
])
def test_a_run_goes_on_samples_and_is_scored(run, pictures, monkeypatch, model, imsize, channels):
    monkeypatch.setattr(swd, "sliced_wasserstein", small_swd)
    flags = (*TINY_OF_ANY, "--version", "a", "--model", *model.split(), "--imsize", imsize,
             "--channels", channels, *SMALL, "--dataset", "folder", "--image_path", pictures, "--augment",
             "color,mirror,cutout", "--sample_step", 2, "--total_step", 2)
    assert run(*flags, "--model_save_step", 1, tiny=False)[0] == 0
    whole = state("a", 2)
    assert run(*flags, "--pretrained_model", 1, tiny=False)[0] == 0
    assert_same_state(whole, state("a", 2))

    assert run("--mode", "sample", "--version", "a", "--num_samples", 2, tiny=False)[0] == 0
    height, width = map(int, imsize.split("x"))
    with Image.open("samples/a/0000002_generated_seed0/000001.png") as picture:
        assert (picture.size, picture.mode) == ((width, height), {"grey": "L", "rgba": "RGBA"}[channels])
    drawn = load("a").sample([5])
    assert drawn.shape == (1, height, width, {"grey": 1, "rgba": 4}[channels])

    code, out, _ = run("--mode", "evaluate", "--version", "a", "--metrics", "swd", "--num_eval", 4, tiny=False)
    assert code == 0 and f"at {imsize} px" in out and {"grey": "as RGB", "rgba": "as RGB on white"}[channels] in out

    code, _, error = run(*flags, "--channels", "rgb", tiny=False)
    assert code == 2 and f"was started with {channels}" in error
    code, _, error = run(*flags, "--imsize", 64, tiny=False)
    assert code == 2 and f"was started with {imsize}" in error


def test_the_sliced_wasserstein_distance_of_pictures_that_are_not_square():
    pictures = torch.randint(0, 256, (4, 3, 32, 48), dtype=torch.uint8)
    assert sliced_wasserstein(pictures, pictures, count=64, directions=8) == 0
    assert sliced_wasserstein(pictures, pictures.flip(1) // 2, count=64, directions=8) > 0


def test_folders_of_pictures_that_are_not_square_are_scored_at_their_size(run, tmp_path, monkeypatch):
    monkeypatch.setattr(swd, "sliced_wasserstein", small_swd)
    for name in ("fake", "real"):
        (tmp_path / name).mkdir()
        for number in range(3):
            three_stripes(32 + 16, 32).save(tmp_path / name / f"{number}.png")
    code, out, _ = run("--mode", "evaluate", "--fake_dir", "fake", "--real_dir", "real", "--metrics", "swd", tiny=False)
    assert code == 0 and "samples at 32x48 px" in out
