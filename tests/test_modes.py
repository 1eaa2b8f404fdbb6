"""Videos and style grids from a checkpoint, made by the real command; plain sampling is tested in test_train.py."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_OF_ANY, state
from PIL import Image

import families
import fastgan_models
import main
from errors import UsageError
from gallery import film
from generate import modes
from generate.classes import Classes
from generate.latents import Latents
from layers.norms import ConditionalBatchNorm
from parameter import resolve
from storage import checkpoint

FASTGAN = (*TINY_OF_ANY, "--model", "fastgan", "--imsize", "64", "--metadata", "false", "--recon",
           "l1")


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A folder with two runs: "a" of one step, with attention in G, and "n" of three, without, each with its record."""
    home = tmp_path_factory.mktemp("before")
    with pytest.MonkeyPatch.context() as there:
        there.chdir(home)
        assert main.main([*TINY, "--g_attn", "16", "--version", "a", "--total_step", "1"]) == 0
        assert main.main([*TINY, "--g_attn", "none", "--version", "n", "--total_step", "3", "--sample_step", "1"]) == 0
    return home


@pytest.fixture
def trained(run, before, tmp_path):
    """Copy that folder to where `run` works."""
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)


def frames(path):
    with Image.open(path) as video:
        shown = []
        for number in range(video.n_frames):
            video.seek(number)
            shown.append(np.asarray(video.convert("RGB")).astype(int))
        return shown, video.info


def test_a_walk_passes_all_latents_in_a_loop_and_keeps_their_variance():
    latents = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    path = modes.walk(latents, 40)
    assert path.shape == (40, 3000)
    assert torch.allclose(path[::10], latents, atol=1e-5)
    assert (path.var(1) - 1).abs().max() < 0.15, "straight lines would fall to 0.5"
    steps = (path - path.roll(1, 0)).norm(dim=1)
    assert steps.max() < 1.2 * steps.min(), "even steps, from the last frame to the first too"


@pytest.mark.parametrize("flags", [(), pytest.param(FASTGAN, marks=pytest.mark.soak)], ids=["sagan", "fastgan"])
def test_a_video_loops_and_follows_the_seed(run, trained, flags):
    if flags:
        run(*flags, "--version", "a", "--total_step", 1, "--restart", "true", tiny=False)
    code, out, _ = run("--version", "a", "--mode", "interpolate", "--num_frames", 4, tiny=False)
    path = Path("samples/a/0000001_interpolation_seed0.webp")
    assert code == 0 and str(path) in out
    first, info = frames(path)
    assert len(first) == 4 and info["loop"] == 0
    assert flags or first[0].shape[1::-1] == (1013, 212), "an image and five queries' overlays"
    assert any((one != other).any() for one, other in zip(first, first[1:], strict=False))
    path.unlink()
    assert run("--version", "a", "--mode", "interpolate", "--num_frames", 4, tiny=False)[0] == 0
    assert all((one == other).all() for one, other in zip(first, frames(path)[0], strict=True))
    assert run("--version", "a", "--mode", "interpolate", "--num_frames", 4, "--seed", 1, tiny=False)[0] == 0
    assert (frames("samples/a/0000001_interpolation_seed1.webp")[0][0] != first[0]).any()


def test_more_classes_than_frames_are_refused():
    latents = Latents(4, classes=Classes(("a", "b", "c"), (1, 1, 1)))
    config = SimpleNamespace(latents=None, num_frames=2, classes=("all",))
    with pytest.raises(UsageError, match="^--num_frames 2: fewer than the 3 classes to walk between; give more, or"):
        modes._corners(config, latents, torch.Generator())
    config.num_frames = 3
    assert modes._corners(config, latents, torch.Generator()).labels.tolist() == [0, 1, 2]


def test_frames_of_a_video_are_padded_to_the_largest(tmp_path):
    film.save([Image.new("RGB", size, "white") for size in ((20, 30), (40, 20))], tmp_path / "a.gif", "gif")
    first, second = frames(tmp_path / "a.gif")[0]
    assert first.shape == second.shape == (30, 40, 3)
    assert first[29, 19].min() > 250 > 60 > first[29, 20].max() and second[19, 39].min() > 250 > 60 > second[20].max()


def test_a_video_as_gif_for_the_asked_points(run, trained):
    code, _, _ = run("--version", "a", "--mode", "interpolate", "--num_frames", 4, "--film", "gif",
                     "--attn_queries", "0.5,0.5", tiny=False)
    shown, info = frames("samples/a/0000001_interpolation_seed0.gif")
    assert code == 0 and len(shown) == 4 and info["loop"] == 0
    assert shown[0].shape[1] < 800, "one overlay, not five"


def test_a_video_as_mp4_shows_the_images_alone_where_there_is_no_attention(run, trained):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed")
    code, _, err = run("--version", "n", "--mode", "interpolate", "--num_frames", 5, "--film", "mp4", tiny=False)
    assert code == 0, err
    video = imageio_ffmpeg.read_frames("samples/n/0000003_interpolation_seed0.mp4")
    meta = next(video)
    assert meta["size"] == (32, 32) and meta["fps"] == 20 and len(list(video)) == 5


def test_an_mp4_that_could_not_be_written_whole_leaves_the_old_one(tmp_path):
    pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed")
    resource = pytest.importorskip("resource")
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), np.uint8)
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))          # the disk is full
    try:
        with pytest.raises(OSError, match="could not write it whole"):
            film.save(list(map(Image.fromarray, noise)), path, "mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_style_drives_the_skips_and_nothing_else():
    torch.manual_seed(0)
    G, _ = fastgan_models.build(resolve({"model": "fastgan", "imsize": 64, "g_conv_dim": 8, "d_conv_dim": 8, "z_dim": 8,
                                         "metadata": False}))
    z, style = torch.randn(2, 4, 8)
    G.eval()
    classed = fastgan_models.Generator(64, 8, 8, metadata=False, classes=2).eval()
    for norm in (layer for layer in classed.modules() if isinstance(layer, ConditionalBatchNorm)):
        torch.nn.init.normal_(norm.shift.weight)
    ones, zeros = torch.ones(4, dtype=torch.long), torch.zeros(4, dtype=torch.long)
    mixed = [classed(z, ones, style, style_labels=labels)[0] for labels in (ones, zeros)]
    assert not torch.equal(*mixed), "the style's class is its own"
    own = G(z)[0]
    assert torch.equal(G(z, style=z)[0], own)
    assert not torch.equal(G(z, style=style)[0], own)
    for skip in G.skips.values():
        skip.forward = lambda source, target: target
    assert torch.equal(G(z, style=style)[0], G(z)[0])


def test_a_style_grid(run):
    run(*FASTGAN, "--version", "a", "--total_step", 1, tiny=False)
    code, out, _ = run("--version", "a", "--mode", "style_mix", tiny=False)
    assert code == 0 and "the first row gives the styles" in out
    grid = np.asarray(Image.open("samples/a/0000001_style_mix_seed0.png"))
    assert grid.shape[:2] == (6 * 66 + 2, 6 * 66 + 2)
    corner = grid[2:66, 2:66]
    assert (corner == corner[0, 0]).all(), "the corner is empty"

    def cell(row, column):
        return grid[66 * row + 2:66 * row + 66, 66 * column + 2:66 * column + 66].astype(int)

    def drawn(content, style):
        image = G(z[content - 1:content], style=z[style + 4:style + 5])[0][0]
        return ((image + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(int)

    G, _ = families.build(resolve({"version": "a"}, checkpoint.saved_config))
    G.load_state_dict(state("a", 1)["G_ema"])
    G.eval().requires_grad_(False)
    z = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))      # five contents, then five styles
    assert np.abs(cell(2, 4) - drawn(2, 4)).max() <= 1
    assert np.abs(cell(2, 4) - cell(2, 0)).max() > 2, "the style shows"
    for number in range(1, 6):                                              # own contents, and own styles
        assert np.abs(cell(number, 0) - drawn(number, number - 5)).max() <= 1
        assert np.abs(cell(0, number) - drawn(number + 5, number)).max() <= 1


def test_sagan_has_no_styles_to_mix(run, trained):
    code, _, err = run("--version", "a", "--mode", "style_mix", tiny=False)
    assert code == 2 and "--mode style_mix" in err


# ------------------------------------------------------------------------------------------------------- evolution


def fill_grids(folder, steps, size=(40, 30)):
    """Grids of one colour each, brighter from step to step."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps):
        Image.new("RGB", size, (number % 256,) * 3).save(folder / f"{step:07d}_fake.png")


def test_the_evolution_of_a_run_is_a_video_of_its_grids_in_order_of_their_steps(run, trained):
    code, out, _ = run("--version", "n", "--mode", "evolution", "--film", "gif", tiny=False)
    path = Path("samples/n/0000003_evolution.gif")
    assert code == 0 and f"a video of 3 of 3 grids, up to step 3, in {path}" in out
    assert path.name in Path("samples/n/index.html").read_text()
    shown, _ = frames(path)
    for step, frame in zip((1, 2, 3), [one for one, before in zip(shown, [None, *shown], strict=False)
                                       if before is None or (one != before).any()], strict=True):
        grid = np.asarray(Image.open(f"samples/n/{step:07d}_fake.png")).astype(int)
        assert np.abs(frame[:len(grid)] - grid).mean() < 8, "a GIF has 256 colours"


def test_an_evolution_of_many_grids_shows_some_the_newest_and_leaves_out_what_does_not_fit(run, monkeypatch):
    saved = []
    monkeypatch.setattr(film, "save", lambda frames, path, kind, shown: saved.append((frames, shown)))
    grids = Path("samples/a")
    fill_grids(grids, range(0, 1000, 5))
    Image.new("RGB", (40, 30), "red").save(grids / "0000995_fake.png")
    code, out, _ = run("--version", "a", "--mode", "evolution", "--num_frames", 20, tiny=False)
    assert code == 0 and "a video of 20 of 200 grids, up to step 995" in out
    assert not (grids / "index.html").exists(), "there is no checkpoint, whose settings the page would have"
    assert "a video of" not in run("--version", "a", "--mode", "evolution", "--dry_run", tiny=False)[1]
    frames, shown = saved[0]
    assert {frame.size for frame in frames} == {(40, 60)} and len(frames) == 20
    assert shown == [10] * 19 + [2 * film.FRAMES_PER_SECOND] and frames[-1].getpixel((5, 5)) == (255, 0, 0)
    (grids / "0000005_fake.png").write_bytes(b"no picture")
    fill_grids(grids, [10], size=(80, 30))
    _, out, _ = run("--version", "a", "--mode", "evolution", "--num_frames", 500, tiny=False)
    assert "2 grids, the first that of step 5" in out and "a video of 198 of 200 grids" in out
    fill_grids(grids, [995], size=(80, 30))
    _, out, _ = run("--version", "a", "--mode", "evolution", "--num_frames", 500, tiny=False)
    assert "a video of 197 of 200 grids, up to step 990" in out, "one of another size leaves out none but itself"
    _, out, _ = run("--version", "a", "--mode", "evolution", "--pretrained_model", 102, tiny=False)
    assert "of 21 grids, up to step 100, in" in out
    (grids / "0000000_fake.png").unlink()
    code, _, error = run("--version", "a", "--mode", "evolution", "--pretrained_model", 3, tiny=False)
    assert code == 2 and "--pretrained_model 3: the first sample grid is that of step 5" in error


@pytest.mark.parametrize(("flags", "expected", "words"), [
    ((), 3, "there is no sample grid"), (("--pretrained_model", "best"), 2, "name one"),
    (("--truncation", 1), 2, "has no effect with --mode evolution"),
])
def test_an_evolution_without_grids_is_refused(run, flags, expected, words):
    code, _, error = run("--version", "a", "--mode", "evolution", *flags, tiny=False)
    assert code == expected and words in error and not Path("samples").exists()
