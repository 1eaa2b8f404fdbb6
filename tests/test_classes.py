"""Runs with classes: every family, exact resuming, the same on two ranks, balanced sampling, samples by class."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_FASTGAN, assert_same_state, data_config, fill, gradient, identities, state
from PIL import Image

from data_loader import ByClass, real_batches
from dataset.images import Files
from errors import UsageError
from generate.classes import Classes, describe_changes, find_classes, lines_on_classes
from generate.latents import Latents
from parameter import parse, resolve
from training.recorder import by_classes

FAMILIES = {"dcgan": ("--conditional", "true"),
            "resnet": ("--arch", "resnet", "--adv_loss", "wgan-gp", "--d_iters", "2", "--accumulate", "2"),
            "fastgan": (*SMALL_FASTGAN, "--num_workers", "0", "--conditional", "true")}


@pytest.fixture
def classed(tmp_path):
    """A folder of three classes: cat 6 pictures, dog 2, eel 1."""
    for number, (name, count) in enumerate((("cat", 6), ("dog", 2), ("eel", 1))):
        (tmp_path / "classed" / name).mkdir(parents=True)
        for index in range(count):
            gradient(seed=10 * number + index).save(tmp_path / "classed" / name / f"{index}.png")
    return tmp_path / "classed"


@pytest.fixture
def trained(run, classed):
    """Train the run "a", or `version`, for so many steps on `classed`; return what it printed."""
    def train(*flags, steps=1, version="a"):
        code, out, err = run(*flags, "--dataset", "folder", "--image_path", classed, "--version", version,
                             "--total_step", steps, tiny="fastgan" not in flags)
        assert code == 0, err
        return out

    return train


@pytest.mark.parametrize("family", FAMILIES)
def test_four_steps_are_two_and_two_bit_for_bit_and_labels_reach_g_and_d(trained, family):
    flags = (*FAMILIES[family], "--balance", "true")
    out = trained(*flags, "--keep_checkpoints", 0, "--model_save_step", 1, steps=4)
    assert "classes: 3, of 1 (eel) to 6 (cat) pictures" in out and "class eel has one picture" in out
    trained(*flags, steps=2, version="b")
    assert "resuming 'b' from step 2" in trained(*flags, steps=4, version="b")
    before, after = state("a", 1), state("a", 4)
    assert_same_state(after, state("b", 4))
    assert after["classes"] == {"names": ["cat", "dog", "eel"], "counts": [6, 2, 1]}
    learned = {net: [name for name in before[net] if any(word in name for word in ("projection.table",
                                                                                   "scale", "shift"))
                     and name.endswith(("weight", "original")) and not before[net][name].equal(after[net][name])]
               for net in "GD"}
    assert learned["G"] and len(learned["D"]) == 1


def test_classes_are_used_where_they_are_asked_for(classed):
    for flags, used in (((), False), (("--conditional", "true"), True), (("--arch", "resnet"), True),
                        (("--arch", "resnet", "--conditional", "false"), False), (("--model", "fastgan"), False),
                        (("--model", "fastgan", "--conditional", "true"), True)):
        config = resolve(parse([*flags, "--dataset", "folder", "--image_path", str(classed)]))
        assert (find_classes(config, Files(classed, 64)) is not None) == used, flags


def test_flags_that_do_not_suit_the_classes_are_noted(classed):
    def notes(*flags, counts):
        config = resolve(parse(["--dataset", "folder", "--image_path", str(classed), "--conditional", "true", *flags]))
        return "".join(lines_on_classes(config, None, Classes(("a", "b", "c"), counts))[1:])

    assert notes(counts=(10, 30, 20)) == ""
    assert "--balance true" in notes(counts=(10, 31, 20)) and notes("--balance", "true", counts=(10, 31, 20)) == ""
    assert "--metadata false" in notes("--model", "fastgan", counts=(10, 10, 10))


def test_pictures_without_classes(run, pictures):
    flags = ("--dataset", "folder", "--image_path", pictures, "--total_step", 1)
    code, _, err = run("--conditional", "true", *flags)
    assert code == 3 and "has no labels" in err and "subfolder" in err and "dataset.json" in err
    code, out, _ = run("--arch", "resnet", "--version", "a", *flags)
    assert code == 0 and state("a", 1)["classes"] is None and "note: training without classes" not in out
    code, _, err = run("--arch", "resnet", "--balance", "true", *flags)
    assert code == 3 and "--balance true" in err and "has no labels" in err
    for command in (("--train", "false", "--version", "a"), ("--arch", "resnet", *flags)):
        code, _, err = run(*command, "--classes", "all", tiny=command[0] != "--train")
        assert code == 2 and "this run has no classes" in err


def test_a_picture_in_no_subfolder_is_named_as_it_keeps_the_others_from_being_classes(run, classed):
    gradient(seed=1).save(classed / "stray.png")
    flags = ("--dataset", "folder", "--image_path", classed, "--arch", "resnet")
    why = "1 of 10 pictures is in none of the 3 subfolders, such as stray.png"
    code, out, _ = run(*flags, "--dry_run")
    assert code == 0 and f"note: training without classes, as {why}" in out
    code, _, err = run(*flags, "--conditional", "true")
    assert code == 3 and why in err and err.count("\n") == 2


def test_other_classes_end_it_with_2_and_the_difference(run, classed, trained):
    trained("--arch", "resnet")
    fill(classed / "fox", 3)
    code, _, err = run("--dataset", "folder", "--image_path", classed, "--version", "a", "--total_step", 2)
    assert code == 2 and "4 classes, were 3; new: fox" in err and "--restart true" in err
    code, _, err = run("--dataset", "folder", "--image_path", classed, "--version", "a", "--conditional", "false",
                       "--dry_run")
    assert code == 2 and "no classes, were 3" in err and "Give --conditional true" in err
    gradient(seed=1).save(classed / "stray.png")
    code, _, err = run("--version", "a", "--dry_run", tiny=False)
    assert code == 2 and "(1 of 13 pictures is in none of the 4 subfolders, such as stray.png), or use" in err, err
    old = Classes(("a", "b"), (1, 1))
    words = "in another order: b is now 0, was 1, a is now 1, was 0"
    assert describe_changes(old, Classes(("b", "a"), (1, 1))) == words
    assert describe_changes(None, old) == "2 classes, were none" and describe_changes(old, old) is None


def test_pictures_of_other_classes_are_told_and_most_of_them_end_it_with_2(run, classed, trained):
    def label(*numbers):
        entries = [[f"cat/{place}.png", number] for place, number in enumerate(numbers)]
        (classed / "dataset.json").write_text(json.dumps({"labels": [*entries, ["dog/0.png", 1], ["dog/1.png", 1],
                                                                     ["eel/0.png", 0]]}))

    label(0, 0, 0, 1, 1, 1)
    trained("--arch", "resnet")
    label(0, 0, 1, 0, 1, 1)
    assert "note: 2 of 9 pictures have another class" in trained("--arch", "resnet", steps=2)
    label(1, 1, 0, 1, 0, 1)
    code, _, err = run("--version", "a", "--total_step", 3, tiny=False)
    assert code == 2 and "other classes (5 of 9 pictures have another class)" in err, "than in the newest checkpoint"
    assert "Give the pictures their old classes, or use another --version" in err


def test_a_broken_label_file_ends_it_with_3_before_any_work(run, classed):
    (classed / "dataset.json").write_text(json.dumps({"labels": [["cat/0.png", 0.5]]}))
    code, _, err = run("--dataset", "folder", "--image_path", classed, "--arch", "resnet", "--total_step", 1)
    assert code == 3 and "cat/0.png" in err and not Path("logs").exists() and not Path("cache").exists()
    code, out, _ = run("--dataset", "folder", "--image_path", classed, "--version", "a", "--total_step", 1)
    assert code == 0 and "classes:" not in out and state("a", 1)["classes"] is None, "without classes nobody asks"


# ---- the batches ----


def labels_of(folder, count, **changes):
    config = data_config(folder, **{"balance": False, **changes})
    dataset = Files(folder, config.imsize)
    batches = real_batches(config, dataset, 0, "cpu", labelled=True)
    taken = [next(batches) for _ in range(count)]
    return dataset, torch.cat([batch.images for batch in taken]), torch.cat([batch.labels for batch in taken])


@pytest.mark.parametrize("balance", [False, True])
def test_each_picture_comes_with_its_label(classed, balance):
    dataset, images, labels = labels_of(classed, 9, balance=balance)
    expected = {dataset[index].numpy().tobytes(): label for index, label in enumerate(dataset.labels.numbers)}
    pictures = identities(((images + 1) * 127.5).round().to(torch.uint8))
    assert len(expected) == 9 and [expected[picture] for picture in pictures] == labels.tolist()


def test_balanced_batches_have_all_classes_equally_often_and_all_their_pictures(classed):
    _, images, labels = labels_of(classed, 9, balance=True)
    assert labels.bincount().tolist() == [12, 12, 12]
    assert all(sorted(labels[turn:turn + 3].tolist()) == [0, 1, 2] for turn in range(0, 36, 3))
    cats = [image.numpy().tobytes() for image in images[labels == 0]]
    assert [cats.count(cat) for cat in set(cats)] == [2] * 6, "two epochs of the six"
    assert labels_of(classed, 9)[2].bincount().tolist() == [24, 8, 4], "as often as they are"


def test_balanced_sampling_keeps_no_order_of_past_epochs():
    order = ByClass(np.repeat([0, 1], 500), seed=7)
    tracemalloc.start()
    try:
        assert len({order[n] for n in range(0, 50_000, 250)}) > 150       # in 50 epochs, each of two orders of 4 KB
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 100_000


# ---- labels of fakes, grids ----


def test_labels_of_samples_are_as_frequent_as_in_the_data_those_of_training_uniform():
    torch.manual_seed(0)
    latents = Latents(4, classes=Classes(("a", "b", "c"), (600, 0, 200)))
    drawn = latents.sampling(4000, torch.Generator().manual_seed(0)).labels.bincount(minlength=3)
    assert drawn[1] == 0 and abs(drawn[0] - 3000) < 100
    trained_on = latents.training(4000).labels.bincount(minlength=3)
    assert trained_on[1] == 0 and abs(trained_on[0] - 2000) < 150


def test_batch_norm_statistics_are_taken_on_all_classes_equally_often_as_g_was_trained():
    latents = Latents(4, classes=Classes(("a", "b", "c"), (600, 0, 200)))
    inputs = latents.for_bn_stats(64, torch.Generator().manual_seed(0))
    assert inputs.labels.bincount().tolist() == [32, 0, 32] and inputs.labels[:8].bincount().tolist() == [4, 0, 4]
    assert torch.equal(inputs.z, latents.sampling(64, torch.Generator().manual_seed(0)).z)
    many = Latents(4, classes=Classes(tuple(map(str, range(1000))), (1,) * 1000))
    labels = many.for_bn_stats(256, torch.Generator().manual_seed(0)).labels
    assert len(labels.unique()) == 256 and 300 < labels[:64].float().mean() < 700, "a spread of more classes"


def test_a_grid_has_a_class_a_row():
    classes = Classes(tuple("abcdefghijkl"), (1,) * 12)
    rows = classes.rows(4).view(4, 4)
    assert (rows == rows[:, :1]).all() and rows[:, 0].tolist() == [0, 3, 6, 9], "a spread of many"
    assert classes.rows(2, ("l", "3"))[::2].tolist() == [11, 3]
    labels = Classes(("a", "b", "c"), (1, 1, 1)).rows(8)
    assert labels[by_classes(labels)][:6].tolist() == [0, 1, 2] * 2, "a record's few pictures show every class"
    assert Classes(("a", "b"), (1, 1)).rows(4)[::4].tolist() == [0, 0, 1, 1], "rows for each of few"
    assert Classes(("7", "3"), (1, 1)).choose(("7",)) == [0], "a name goes before a number"
    with pytest.raises(UsageError, match="--classes b: has no pictures, so G cannot learn it"):
        Classes(("a", "b"), (1, 0)).rows(2, ("b",))
    with pytest.raises(UsageError, match="give the number of one with a comma"):
        Classes(("a, b", "c"), (1, 1)).choose(("a",))
    with pytest.raises(UsageError, match="--classes z: there is no such class; this run has a, b"):
        Classes(("a", "b"), (1, 1)).choose(("z",))


def test_captions_name_the_class_or_the_two_that_an_image_is_between():
    classes = Classes(("a", "b\n", "c"), (1, 1, 1))
    assert classes.captions(torch.tensor([2, 1])) == ("c", "b\\n")
    assert Classes(("a", "Zoë"), (1, 1)).captions(torch.tensor([0, 1])) == ("a", "1: Zoë"), "pictures lack letters"
    assert classes.captions(torch.tensor([[0.25, 0.75, 0], [0, 0, 1.]])) == ("75% b\\n, 25% a", "100% c")


def test_classes_are_asked_for_by_name_or_number():
    assert Classes(("a", "b", "tabby"), (1, 1, 1)).choose(("2", "0", "tabby")) == [2, 0], "each once"
    classes = Classes(("cat", "7", "dog"), (1, 1, 1))
    assert classes.choose(("7", "0", "dog")) == [1, 0, 2]
    for name, words in (("", "an empty name"), ("all", "all goes alone"), ("0-2", "without ranges"), ("3", "no such")):
        with pytest.raises(UsageError, match=words):
            classes.choose(("cat", name))
    many = Classes(tuple(map(str, range(90))), (1,) * 90)
    assert many.suffix(("7", "3")) == "_classes7-3" and many.suffix(("all",)).startswith("_classes90_")


def test_folders_of_classes_are_safe():
    classes = Classes(("a/b", "..", "Cat", "cat", "", "fine", "2_Cat", "half \ud83d", "猫" * 120), (1,) * 9)
    assert classes.folder_names(range(9)) == [
        "a_b", "1", "2_Cat_", "3_cat", "4", "fine", "2_Cat", "half _", "猫" * 50]
    assert classes.folder_names([8, 2]) == ["猫" * 50, "2_Cat_"], "whichever are asked for"


# ---- from a checkpoint ----


def test_samples_of_classes_are_in_folders_and_depend_on_the_class(run, trained, classed, tmp_path):
    trained("--arch", "resnet", "--g_lr", "0.1", steps=3)                  # the tables of the classes differ then
    dry = [run(*flags, "--version", "a", "--dry_run", tiny=tiny)[1].splitlines() for tiny, *flags in (
        (True, "--dataset", "folder", "--image_path", classed, "--arch", "resnet"), (False, "--train", "false"))]
    parameters = [[line for line in lines if " parameters: " in line] for lines in dry]
    assert len(parameters[0]) == 2 and parameters[0] == parameters[1], "with those of the classes"
    for part in classed.rglob("*.png"):
        part.unlink()                                   # neither the data nor flags are needed
    code, out, _ = run("--version", "a", "--train", "false", "--num_samples", 3, "--classes", "dog,0", tiny=False)
    folder = tmp_path / "samples/a/0000003_generated_seed0"
    assert code == 0 and "3 pictures of step 3 of each of 2 classes" in out
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png")) == [
        f"{name}/{number:06d}.png" for name in ("cat", "dog") for number in range(3)]
    cat, dog = (np.asarray(Image.open(folder / name / "000001.png")) for name in ("cat", "dog"))
    assert (cat != dog).any()
    grid = f"{folder}_classes1-0.png"
    assert Image.open(grid).width > Image.open(grid).height, "two rows of three"
    code, out, _ = run("--version", "a", "--train", "false", "--num_samples", 2, "--classes", "cat", tiny=False)
    assert code == 0 and "2 pictures of step 3 of class cat" in out and "; 4 of earlier calls are still there" in out
    assert Path(grid).exists() and Path(f"{folder}_classes0.png").exists(), "of either call"
    code, _, err = run("--version", "a", "--mode", "evaluate", "--metrics", "kid", "--classes", "cat", tiny=False)
    assert code == 2 and "--classes cat: has no effect with --mode evaluate" in err
    for more in ((), ("--dry_run",)):
        code, _, err = run("--version", "a", "--train", "false", "--classes", "cow", *more, tiny=False)
        assert code == 2 and "--classes cow" in err
    assert code == 2 and "--classes cow" in err and "cat, dog, eel" in err


def test_a_video_walks_between_classes_and_styles_mix(run, trained):
    trained(*FAMILIES["fastgan"])
    for names, numbers in (("cat,eel", "0-2"), ("all", "0-1-2")):
        code, _, err = run("--version", "a", "--mode", "interpolate", "--num_frames", 6, "--classes", names, tiny=False)
        assert code == 0 and Path(f"samples/a/0000001_interpolation_seed0_classes{numbers}.webp").exists(), err
    assert run("--version", "a", "--mode", "style_mix", tiny=False)[0] == 0


def test_truncated_samples_are_others_are_named_and_never_the_best(run, trained, tmp_path, small_inception):
    trained("--arch", "resnet")
    assert run("--version", "a", "--train", "false", "--num_samples", 2, "--truncation", "0.5", tiny=False)[0] == 0
    assert run("--version", "a", "--train", "false", "--num_samples", 2, tiny=False)[0] == 0
    paths = [tmp_path / f"samples/a/0000001_generated_seed0{suffix}/000001.png" for suffix in ("", "_truncation0.5")]
    whole, truncated = (np.asarray(Image.open(path)) for path in paths)
    assert (whole != truncated).any()
    latents, generator = Latents(64, truncation=0.5), torch.Generator().manual_seed(0)
    z = latents.sampling(100, generator).z
    assert z.abs().max() <= 0.5 and 0.25 < z.std() < 0.3, "uniform would be 0.29"
    assert latents.source(0) == "G_ema, seed 0, truncation 0.5"
    evaluate = ("--version", "a", "--mode", "evaluate", "--metrics", "fid", "--num_eval", 8)
    code, out, _ = run(*evaluate, "--truncation", "0.5", tiny=False)
    assert code == 0 and "labels as in the data, truncation 0.5" in out
    assert not (tmp_path / "models/a/best.pth").exists()
    assert run(*evaluate, tiny=False)[0] == 0 and (tmp_path / "models/a/best.pth").exists()
    code, _, err = run("--truncation", "1", "--total_step", 1)
    assert code == 2 and "--truncation" in err and "--mode train" in err


def test_G_ema_is_G_until_ema_start(trained):
    trained("--ema_start", 2, "--keep_checkpoints", 0, "--model_save_step", 1, steps=3)
    for step, same in ((2, True), (3, False)):
        at = state("a", step)
        assert at["G"]["to_rgb.weight"].equal(at["G_ema"]["to_rgb.weight"]) == same
