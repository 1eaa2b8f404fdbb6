"""`ifid`: the Fréchet distance within each class, in real evaluations of runs with classes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, SmallInception, gradient, lines, two_processes

import main
from dataset.decode import read_picture
from metrics import features
from metrics.features import Features, frechet_distance
from pretrained.feature_nets import FEATURE_NETS

COUNTS = {"cat": 9, "dog": 5, "eel": 1}
EVALUATE = ("--version", "a", "--mode", "evaluate", "--metrics", "ifid", "--num_eval", 15)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A folder with the pictures of COUNTS in classed/ and the run "a": three steps, so long that G tells the classes
    apart.
    """
    home = tmp_path_factory.mktemp("once")
    for number, (name, count) in enumerate(COUNTS.items()):
        (home / "classed" / name).mkdir(parents=True)
        for index in range(count):
            gradient(seed=10 * number + index).save(home / "classed" / name / f"{index}.png")
    with pytest.MonkeyPatch.context() as there:
        there.chdir(home)
        assert main.main([*TINY, "--g_attn", "none", "--arch", "resnet", "--dataset", "folder", "--image_path",
                          "classed", "--version", "a", "--total_step", "3", "--g_lr", "0.1"]) == 0
    return home


@pytest.fixture
def trained(run, once, tmp_path, small_inception):
    """Copy that folder; return `evaluate(*flags)` -> (the line of the evaluation, what it printed)."""
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)

    def evaluate(*flags):
        code, out, err = run(*EVALUATE, *flags, tiny=False)
        assert code == 0, err
        return lines("a")[-1], out

    return evaluate


def distance(real, fake):
    """The Fréchet distance of two sets of rows (N, D) by its definition."""
    real, fake = real.double(), fake.double()
    product = np.linalg.eigvals((torch.cov(real.T) @ torch.cov(fake.T)).numpy()).astype(complex)
    return float((real.mean(0) - fake.mean(0)).square().sum() + torch.cov(real.T).trace()
                 + torch.cov(fake.T).trace()) - 2 * float(np.sqrt(product).real.sum())


def rows_of(folder):
    """The features of the pictures in a folder (N, 16)."""
    pictures = torch.stack([read_picture(str(path), 32) for path in sorted(folder.glob("*.png"))])
    return SmallInception()(pictures)[0]


def by_definition(run, count, scale=1):
    """{class: distance} of its pictures to `count` samples that `--mode sample` writes, of features over `scale`."""
    run("--version", "a", "--train", "false", "--classes", "cat,dog", "--num_samples", count, tiny=False)
    samples = Path("samples/a/0000003_generated_seed0")
    return {name: distance(rows_of(Path("classed", name)) / scale, rows_of(samples / name) / scale)
            for name in ("cat", "dog")}


def test_it_is_the_distance_of_the_samples_of_each_class_to_its_pictures_the_table_has_the_mean_alone(run, trained):
    line, out = trained("--use_tensorboard", "true")
    head = next(row for row in Path("logs/scores.md").read_text().splitlines() if row.startswith("|"))
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["", "step", "ifid", "ifid_floor", "source", "date"]
    entry = json.loads(Path("logs/scores.jsonl").read_text())
    assert entry["ifid"] == line["ifid"] and entry["ifid_worst"] == line["ifid_worst"] and "by_class" not in entry
    page = Path("samples/a/index.html").read_text()
    assert '"by_class":[["ifid"' in page and '"classes":3' in page
    expected = by_definition(run, 7)
    assert line["by_class"]["ifid"] == pytest.approx(expected, rel=1e-3)
    assert line["ifid"] == pytest.approx(sum(expected.values()) / 2, rel=1e-3) and line["ifid_floor"] > 0
    worst, best = sorted(expected, key=expected.get, reverse=True)
    assert (line["ifid_worst"], line["ifid_best"]) == (worst, best)
    assert line["source"] == "G_ema, seed 0, labels of each class"
    assert f"ifid of 2 classes: worst {worst} ({line['by_class']['ifid'][worst]:.4g}), best {best} (" in out
    assert "leaves out 1 class: eel" in out and "warning: classes have fewer pictures" in out
    assert "7 samples of each of 2 classes at 32 px" in line["protocol"]
    assert "all 15 pictures of folder classed" in line["protocol"]
    assert "without 1 class of fewer than 2 pictures" in line["protocol"]
    assert "fewer than 16 pictures of a class" in line["protocol"]


def test_classes_of_another_folder_are_found_by_their_names(trained, tmp_path):
    shutil.copytree("classed", "other")
    for name in ("ant", "eel"):                         # the cats are the second class there
        shutil.copytree("classed/dog", f"other/{name}", dirs_exist_ok=True)
    other, out = trained("--real_dir", "other")
    of_other = other["by_class"]["ifid"]
    assert of_other.keys() == COUNTS.keys() and "leaves out" not in out and "5 samples of each" in other["protocol"]
    again, _ = trained("--num_eval", 10)
    assert of_other["cat"] == pytest.approx(again["by_class"]["ifid"]["cat"], rel=1e-6) != of_other["dog"]


def test_it_is_named_after_the_network_and_standardized_as_its_fd(run, trained, monkeypatch):
    monkeypatch.setitem(FEATURE_NETS, "clip", replace(FEATURE_NETS["inception"], standardize=True))
    line, _ = trained("--feature_net", "clip")
    assert line.keys() >= {"ifid_clip", "ifid_clip_floor", "ifid_clip_best"} and "ifid" not in line
    whole = Features.of_rows(torch.cat([rows_of(Path("classed", name)) for name in COUNTS]))
    expected = by_definition(run, 7, features.prepare_real(whole, standardize=True).scale)
    assert line["by_class"]["ifid_clip"] == pytest.approx(expected, rel=1e-3)
    monkeypatch.setattr(features, "MAX_ROWS", 7)        # then the features of each class are computed again
    assert trained("--feature_net", "clip")[0]["by_class"]["ifid_clip"] == pytest.approx(expected, rel=1e-3)


def test_without_classes_it_is_refused(run, trained, pictures, small_inception):
    flags = ("--dataset", "folder", "--image_path", pictures, "--arch", "resnet")
    run(*flags, "--version", "plain", "--total_step", 1, "--g_attn", "none")
    code, out, err = run(*EVALUATE, "--version", "plain", tiny=False)
    assert code == 2 and err.count("\n") == 1 and "--metrics ifid: this run has no classes; leave ifid out" in err
    assert not small_inception, "before any weights are asked for"
    code, _, err = run(*EVALUATE, "--real_dir", pictures, tiny=False)
    assert code == 3 and "--metrics ifid: all 12 pictures of folder pictures have no classes; put those of" in err
    code, _, err = run(*EVALUATE, "--fake_dir", pictures, "--real_dir", pictures, tiny=False)
    assert code == 2 and "ifid cannot be computed for --fake_dir" in err
    code, _, err = run(*flags, "--metric_step", 1, "--metrics", "ifid", "--total_step", 1)
    assert code == 2 and "ifid cannot be computed during training" in err
    assert not Path("logs/scores.md").exists()


def test_classes_of_one_picture_each_are_refused(run, trained):
    for name in ("cat", "dog", "eel"):
        (Path("one") / name).mkdir(parents=True)
        shutil.copy(f"classed/{name}/0.png", f"one/{name}")
    code, _, err = run(*EVALUATE, "--real_dir", "one", tiny=False)
    assert code == 3 and "--metrics ifid: no class has 2 real pictures" in err


@pytest.mark.parametrize(("M", "N"), [(40, 40), (9, 40), (40, 9), (5, 3)])
def test_few_pictures_give_the_same_distance_as_their_covariances(M, N):
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(M, 12, generator=generator), 1.5 * torch.randn(N, 12, generator=generator) + 0.2
    found = frechet_distance(Features.of_rows(real), Features.of_rows(fake))
    assert found == pytest.approx(distance(real, fake), rel=1e-4)
    assert frechet_distance(Features.of_rows(real), Features.of_rows(real)) == pytest.approx(0, abs=1e-5)
    some = replace(Features.of_rows(fake), rows=fake[:2])
    assert frechet_distance(Features.of_rows(real), some) == pytest.approx(found, rel=1e-4), "not of these rows alone"


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path, trained):
    script = tmp_path / "two.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import conftest, main
from metrics import features
from pretrained import inception
inception.load_inception = lambda weights: conftest.SmallInception()
features.MAX_ROWS = 7
sys.exit(main.main(sys.argv[1:]))
""")
    alone, _ = trained()
    two = two_processes(script, *EVALUATE, "--num_eval", 15, "--device", "cpu", "--precision", "fp32")
    assert two.returncode == 0, two.stderr
    shared = lines("a")[-1]
    assert len(lines("a")) == 3 and shared["protocol"] == alone["protocol"]
    assert shared["by_class"]["ifid"] == pytest.approx(alone["by_class"]["ifid"], rel=1e-4)
