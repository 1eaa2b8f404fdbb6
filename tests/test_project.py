"""--mode project and --latents, by the real command; the tests of soak with a random VGG-16."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import SmallLpips

from generate import project
from pretrained import lpips

RUN = ("--version", "a", "--vgg_weights", "random", "--device", "cpu")


@pytest.fixture
def trained(run, monkeypatch):
    """trained(*flags): a run of two steps, and searches from few samples, with short films."""
    monkeypatch.setattr(project, "CANDIDATES", 64)
    monkeypatch.setattr(project, "FRAMES", 10)

    def command(*flags):
        run(*RUN, "--total_step", 2, *flags)
        return lambda *more: run(*RUN, *more, tiny=False)

    return command


def as_array(path):
    return np.asarray(Image.open(path).convert("RGB"), int)


def test_a_search_comes_nearer_and_its_latent_draws_what_it_found(trained, monkeypatch):
    command = trained()
    command("--mode", "sample", "--num_samples", 2)
    target = Path("samples/a/0000002_generated_seed0/000001.png")
    net = SmallLpips()                                  # to load a VGG-16 takes seconds
    monkeypatch.setattr(lpips, "load_lpips", lambda *_: net)
    watching, search = [], project.search
    monkeypatch.setattr(project, "search", lambda *words: (watching.append(words[-1]), search(*words))[1])
    code, out, err = command("--mode", "project", "--target", target, "--seed", 3, "--backtrack_steps", 40)
    assert code == 0 and "1 picture projected by step 2" in out and "LPIPS of random weights" in out and net.seen, err
    kept = inspect.getclosurevars(watching[0]).nonlocals["frames"]
    assert len(kept) == 10 and {frame.dtype for frame in kept} == {np.dtype(np.uint8)}, "a quarter of the memory"
    found = Path("samples/a/0000002_project_000001.png")
    assert found.is_file()
    with Image.open(found.with_suffix(".webp")) as film:
        assert 2 <= film.n_frames <= 10 and film.height >= 256
    code, _, err = command("--mode", "sample", "--latents", found.with_suffix(".npz"))
    assert code == 0, err
    folder, = Path("samples/a").glob("0000002_latents_????????")
    drawn = as_array(folder / "000000.png")
    code, _, err = command("--like", folder / "000000.png")
    assert code == 2 and "was drawn from latents" in err
    command("--mode", "sample", "--seed", 3, "--num_samples", 64)
    others = [as_array(path) for path in Path("samples/a/0000002_generated_seed3").glob("*.png")]
    nearest = min(abs(other - as_array(target)).mean() for other in others)
    assert abs(drawn - as_array(target)).mean() < nearest, "nearer than any sample that it began with"


def test_without_vgg16_pixels_are_searched_and_it_is_said(trained, monkeypatch):
    command = trained()
    command("--mode", "sample", "--num_samples", 1)
    target = "samples/a/0000002_generated_seed0/000000.png"
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    monkeypatch.setenv("TORCH_HOME", str(Path("empty").absolute()))
    code, out, err = command("--mode", "project", "--target", target, "--backtrack_steps", 30, "--vgg_weights",
                             "imagenet")
    assert code == 0 and "note: without LPIPS, by pixels alone" in out and "pixel distance 0.0" in out, err
    code, _, err = command("--mode", "project", "--target", target, "--vgg_weights", "gone.pth")
    assert code == 2 and "--vgg_weights gone.pth" in err


@pytest.mark.soak
def test_several_pictures_of_any_size_become_files_to_morph_between(trained):
    command = trained("--arch", "resnet", "--conditional", "true", "--g_lr", 0.1)
    rng = np.random.default_rng(0)
    for name, size in (("a b.png", (300, 41)), ("c.jpg", (20, 70))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(name)
    Path("x").mkdir()
    Image.open("c.jpg").save("x/c.jpg")
    code, out, err = command("--mode", "project", "--target", "a b.png", "c.jpg", "--target", "x/c.jpg",
                             "--backtrack_steps", 2, "--classes", "bob,beard")
    assert code == 0 and "3 pictures projected" in out, err
    latents = sorted(Path("samples/a").glob("*.npz"))
    assert [path.name for path in latents] == [f"0000002_project_{name}.npz" for name in ("a_b", "c", "c_2")]
    assert all(np.load(path)["classes"][0] in ("bob", "beard") for path in latents)
    code, _, err = command("--mode", "interpolate", "--latents", *latents, "--num_frames", 6)
    assert code == 0 and list(Path("samples/a").glob("0000002_interpolation_latents_????????.webp")), err
    assert command("--mode", "sample", "--latents", *latents)[0] == 0
    folder, = Path("samples/a").glob("0000002_latents_????????")
    assert len(list(folder.iterdir())) == 3
    assert command("--mode", "sample", "--latents", latents[0])[0] == 0
    assert len(list(folder.iterdir())) == 3, "other latents have a folder of their own"
    assert "--truncation leaves the latents" in command("--mode", "sample", "--latents", *latents, "--truncation", 1)[1]


def test_a_difference_is_of_colours_or_of_transparency():
    white, clear = torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    clear[:, 3] = -1
    black = torch.tensor([-1, -1, -1, 1.0]).view(1, 4, 1, 1).expand_as(white)
    assert (project._difference(white, white) == black).all() and (project._difference(white, clear) == 1).all()
    assert (project._difference(-white[:, :3], white[:, :3]) == 1).all()


@pytest.mark.soak
def test_a_target_of_twelve_bits_is_as_bright_as_the_training_pictures_are(trained, tmp_path, monkeypatch):
    deep = np.full((32, 32), 2048, np.uint16)
    deep[0, 0] = 4095
    Path("deep").mkdir()
    for number in range(4):
        Image.fromarray(deep).save(f"deep/{number}.png")
    Image.fromarray(np.full((32, 32), 1023, np.uint16)).save("dim.png")
    seen = []
    monkeypatch.setattr(project, "_project", lambda config, trained, net, candidates, path, target, bar:
                        [seen.append(target.mean().item()), path][1])
    command = trained("--dataset", "folder", "--image_path", "deep")
    _, out, _ = command("--mode", "project", "--target", "dim.png", "--backtrack_steps", 1)
    assert "mapped to 0..255 as the training pictures are" in out and seen[0] == pytest.approx(63 / 127.5 - 1, abs=0.02)
    Path("deep").rename("gone")
    _, out, _ = command("--mode", "project", "--target", "dim.png", "--backtrack_steps", 1)
    assert "by its own range" in out and seen[1] > 0.9


MISTAKES = [                # flags, exit code, what is said
    (("--mode", "project"), 2, "--mode project: say which pictures, with --target"),
    (("--mode", "project", "--target", "gone.png"), 3, "--target gone.png: cannot read gone.png"),
    (("--mode", "project", "--target", "text.png"), 3, "--target text.png: it is not a JPEG"),
    (("--mode", "sample", "--target", "text.png"), 2, "--target text.png: has no effect with --mode sample"),
    (("--mode", "sample", "--latents", "text.png"), 3, "--latents text.png: "),
    (("--mode", "sample", "--latents", "wide.npz"), 2, "has latents of 999 numbers, this run's have 8"),
    (("--mode", "sample", "--latents", "nan.npz"), 3, "no array of finite numbers"),
    (("--mode", "sample", "--latents", "large.npz"), 3, "no array of finite numbers"),
    (("--mode", "sample", "--latents", "none.npz"), 3, "no array of finite numbers"),
    (("--mode", "sample", "--latents", "damaged.npz"), 3, "--latents damaged.npz: "),
    (("--mode", "interpolate", "--latents", "one.npz", "one.npz", "one.npz", "--num_frames", 2), 2, "--num_frames 2: "),
    (("--mode", "sample", "--latents", "wide.npz", "--seeds", "3"), 2, "--seeds 3: has no effect with --latents"),
    (("--mode", "interpolate", "--latents", "one.npz"), 2, "walks between two or more"),
]


def test_what_cannot_be_done_is_said_in_a_line(trained):
    command = trained()
    Path("text.png").write_text("text")
    np.savez("wide.npz", z=np.zeros((1, 999), np.float32))
    np.savez("nan.npz", z=np.full((1, 4), np.nan))
    np.savez("one.npz", z=np.zeros((1, 8), np.float32))
    np.savez("large.npz", z=np.full((1, 8), 1e300))
    np.savez("none.npz", z=np.zeros((0, 8), np.float32))
    np.savez_compressed("damaged.npz", z=np.zeros((50, 8), np.float32))
    whole = bytearray(Path("damaged.npz").read_bytes())
    whole[60:70] = bytes(10)
    Path("damaged.npz").write_bytes(whole)
    for flags, code, told in MISTAKES:
        found, _, err = command(*flags)
        assert found == code and told in err and err.count("\n") <= 2, (flags, err)
