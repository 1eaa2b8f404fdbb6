"""Single pictures by the real command: those of chosen seeds, and one drawn again from what its file says."""

import errno
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_OF_ANY
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import main
from errors import CheckpointError, UsageError
from gallery import grid
from generate import samples
from generate.classes import Classes
from generate.latents import Inputs, Latents
from generate.modes import load

METADATA = (*TINY_OF_ANY, "--model", "fastgan", "--imsize", "64", "--recon", "l1", "--vgg_weights",
            "random", "--dataset", "folder", "--image_path", "pictures")


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A folder with the run "a": two steps with classes, each saved."""
    home = tmp_path_factory.mktemp("before")
    with pytest.MonkeyPatch.context() as there:
        there.chdir(home)
        # g_lr: so that the tables of the classes differ at once
        assert main.main([*TINY, "--g_attn", "none", "--arch", "resnet", "--g_lr", "0.1", "--version", "a",
                          "--total_step", "2", "--model_save_step", "1"]) == 0
    return home


@pytest.fixture
def trained(run, before, tmp_path):
    """Copy that folder to where `run` works."""
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("flags", [(), pytest.param(METADATA, marks=pytest.mark.soak)], ids=["classes", "metadata"])
def test_a_seed_draws_the_same_picture_alone_and_among_others(run, trained, pictures, monkeypatch, flags):
    if flags:
        run(*flags, "--version", "a", "--total_step", 2, "--restart", "true", tiny=False)
    folder, beside = Path("samples/a/0000002_seeds"), []
    monkeypatch.setattr(grid, "save_grid", lambda images, path, columns, names: beside.append(names))
    code, out, err = run("--version", "a", "--mode", "sample", "--seeds", "7,0,2-4,9000000000000000000", tiny=False)
    assert code == 0 and "6 pictures" in out, err
    assert beside == [["7, 0, 2", "3-4, 9000000000000000000"]]
    among = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(among) == [*(f"seed00000{seed}.png" for seed in (0, 2, 3, 4, 7)), "seed9000000000000000000.png"]
    assert len(set(among.values())) == 6
    shutil.rmtree(folder)
    run("--version", "a", "--mode", "sample", "--seeds", "9000000000000000000", tiny=False)
    assert [path.read_bytes() for path in folder.iterdir()] == [among["seed9000000000000000000.png"]]


def test_own_code_draws_the_pictures_of_the_command(run, trained):
    run("--version", "a", "--mode", "sample", "--seeds", "3,8", tiny=False)
    run("--version", "a", "--mode", "sample", "--seeds", "3,8", "--classes", "bob", "--truncation", 0.5, tiny=False)
    mine = load("a", device="cpu")
    assert (mine.step, mine.imsize, "bob" in mine.classes) == (2, 32, True)

    def written(folder):
        return np.stack([np.asarray(Image.open(path)) for path in sorted(Path("samples/a", folder).glob("seed*.png"))])

    assert (mine.sample([3, 8]) == written("0000002_seeds")).all()
    truncated = written("0000002_seeds_truncation0.5/bob")
    assert (mine.sample([3, 8], "bob", truncation=0.5) == truncated).all()
    mixed = mine.sample([3, 8], [mine.classes.index("bob"), "beard"], truncation=0.5)
    assert (mixed[0] == truncated[0]).all() and (mixed[1] != truncated[1]).any()
    assert (mine.sample(np.array([8])) == mine.sample([8])).all()
    assert mine.sample([]).shape == (0, 32, 32, 3) and mixed.dtype == np.uint8
    assert (load("a", step=1, device="cpu").sample([3]) != mine.sample([3])).any()
    for wrong in (lambda: load("b"), lambda: mine.sample([1], "all"), lambda: mine.sample([1, 2], ["bob"]),
                  lambda: mine.sample([1], truncation=-1), lambda: mine.sample([-1]), lambda: mine.sample([1.5]),
                  lambda: mine.sample(3)):
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(CheckpointError):
        load("a", step=7)


def test_a_picture_is_drawn_again_from_what_its_file_says(run, trained):
    run("--version", "a", "--train", "false", "--num_samples", 67, tiny=False)
    run("--version", "a", "--train", "false", "--seeds", 5, "--classes", "bob", "--truncation", 0.5, tiny=False)
    for source, again in (("generated_seed0/000065.png", "seed0_picture000065_*.png"),
                          ("seeds_truncation0.5/bob/seed000005.png", "seed000005_bob_truncation0.5.png")):
        picture = Path(f"samples/a/0000002_{source}")
        code, out, err = run("--like", picture, tiny=False)
        path, = Path("samples/a").glob(f"0000002_{again}")
        assert code == 0 and str(path) in out, err
        assert path.read_bytes() == picture.read_bytes()
    recipe = json.loads(Image.open(path).text["parameters"])
    assert re.fullmatch("[0-9a-f]{8}", recipe.pop("weights"))
    assert recipe == {"version": "a", "step": 2, "seed": 5, "class": "bob", "truncation": 0.5}
    run("--like", path, "--classes", "beard,bob", "--truncation", 2, tiny=False)
    changed = [Path(f"samples/a/0000002_seed000005_{name}_truncation2.png") for name in ("beard", "bob")]
    assert len({file.read_bytes() for file in (path, *changed)}) == 3


@pytest.fixture
def drawing(tmp_path, monkeypatch):
    """drawing(*classes) -> a TrainedGenerator's stand-in that draws black images and keeps what it says in `told`."""
    monkeypatch.setattr(samples, "_save", lambda *_: None)

    def stand_in(*classes):
        told = []
        return SimpleNamespace(draw=lambda inputs: torch.zeros(len(inputs), 3, 32, 32) - 1, step=1, told=told,
                               create_folder=lambda: None, finish=lambda config, message: told.append(message),
                               latents=Latents(4, classes=Classes(classes, (1,) * len(classes))))

    return stand_in


def test_of_many_pictures_only_those_of_the_grid_stay_in_memory(drawing, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "cat", list)             # what _write keeps
    batches = [(Inputs(torch.zeros(4, 2)), [{"seed": 0, "number": 0}] * 4) for _ in range(5)]
    kept = samples._write(drawing(), batches, tmp_path, 6, SimpleNamespace(update=lambda count: None))
    assert [len(images) for images in kept] == [4, 2]
    assert sum(images.untyped_storage().nbytes() for images in kept) == 6 * 3 * 32 * 32 * 4


@pytest.mark.parametrize(("count", "imsize", "rows"), [(10, 32, 10), (50, 32, 40), (50, 512, 10)])
def test_a_grid_shows_all_classes_or_says_how_many(drawing, tmp_path, count, imsize, rows):
    trained = drawing(*map(str, range(count)))
    config = SimpleNamespace(classes=("all",), imsize=imsize, seeds=None, seed=0, num_samples=2)
    samples._sample_classes(config, trained, tmp_path / "a", grid.grid_side(imsize), 2, None)
    path, = tmp_path.glob("*.png")
    assert Image.open(path).height == rows * (64 + grid.GAP) + grid.GAP
    (told,) = trained.told
    assert f"of each of {count} classes" in told
    assert ("all as a grid" if rows == count else f"all of each of {rows} of the {count} classes as a grid") in told


def test_a_picture_of_another_run_of_that_name_is_not_drawn_again(run, trained):
    run("--version", "a", "--train", "false", "--seeds", 9, tiny=False)
    Path("samples/a/0000002_seeds/seed000009.png").rename("mine.png")
    assert run("--like", "mine.png", tiny=False)[0] == 0
    run("--version", "a", "--total_step", 2, "--restart", "true", "--seed", 7, "--g_attn", "none")
    code, _, err = run("--like", "mine.png", tiny=False)
    assert code == 2 and "--like mine.png: was drawn by another run that was named 'a', too" in err
    assert run("--like", "mine.png", "--version", "a.old1", tiny=False)[0] == 0
    Path("models/a/0000002.pth").rename("models/a/0000001.pth")
    code, _, err = run("--like", "mine.png", tiny=False)
    assert code == 5 and err.startswith("error: --like mine.png: ")


def test_a_full_disk_leaves_no_half_written_picture(run, trained, monkeypatch):
    save = Image.Image.save

    def full(self, path, *rest, **options):
        save(self, path, *rest, **options)
        if "000003" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    code, _, err = run("--version", "a", "--train", "false", "--num_samples", 5, tiny=False)
    assert code == 5 and "000003.png: No space left on device" in err
    assert sorted(path.name for path in Path("samples/a/0000002_generated_seed0").iterdir()) == [
        "000000.png", "000001.png", "000002.png"]


def test_a_step_that_only_best_pth_has_left_is_found(run, trained):
    Path("models/a/0000001.pth").unlink()
    run("--version", "a", "--train", "false", "--seeds", 1, tiny=False)
    kept, = Path("models/a").glob("*2.pth")
    kept.rename("models/a/best.pth")
    code, _, err = run("--like", "samples/a/0000002_seeds/seed000001.png", tiny=False)
    assert code == 0, err
    code, _, err = run("--version", "a", "--train", "false", "--pretrained_model", 1, tiny=False)
    assert code == 5 and "--pretrained_model 1" in err
    code, _, err = run("--version", "a", "--train", "false", "--seeds", 3, "--num_samples", 5, tiny=False)
    assert code == 2 and "--num_samples 5" in err and "--seeds 3" in err


@pytest.mark.parametrize(("flags", "words"), [
    (("--seeds", "9-3"), ("--seeds", "such as 3,5,9-20")),
    (("--seeds", "1-9999999"), ("--seeds", "more than 1,000,000")),
    (("--seeds", "-1"), ("--seeds", "such as")),
    (("--seeds", "3", "--mode", "train"), ("--seeds 3", "--mode sample")),
    (("--like", "none.png"), ("--like none.png", "No such file")),
    (("--like", "text.png"), ("--like text.png", "no picture")),
    (("--like", "plain.png"), ("--like plain.png", "does not say how it was drawn")),
    (("--like", "wrong.png"), ("--like wrong.png", "does not say how it was drawn")),
    (("--like", "good.png", "--seed", 3), ("--seed", "leave one")),
    (("--like", "good.png"), ("--version gone", "no such run")),
])
def test_wrong_seeds_and_pictures_are_refused_in_words(run, flags, words):
    Path("text.png").write_text("no picture")
    for name, recipe in (("plain", None), ("wrong", {"version": "gone", "step": 1, "seed": 0, "number": 5, "count": 5}),
                         ("good", {"version": "gone", "step": 1, "seed": 0})):
        text = PngInfo()
        text.add_text("parameters", json.dumps(recipe))
        Image.new("RGB", (4, 4)).save(f"{name}.png", pnginfo=text)
    code, out, err = run(*flags, tiny=False)
    assert code == 2 and err.count("\n") <= 2 and "Traceback" not in err
    assert all(word in err for word in words), err
    assert not Path("samples").exists()
