"""The picture of the plain way and this program after equal wall time."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import fill, gradient
from PIL import Image
from stand_ins import smooth

import side_by_side

GOOD = """sh -c 'echo "{\\"kid\\": 1.5}"' {real} {fake}"""


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """compare(*flags) -> exit code, with trainings that only leave pictures; `trained` has their sides, in order."""
    fill(tmp_path / "pictures", 64)
    base = ["--image_path", str(tmp_path / "pictures"), "--out", str(tmp_path / "out")]

    def plain(self, began):
        compare.trained.append("plain")
        (self.out / "plain").mkdir()
        gradient().save(self.out / "plain.png")
        return 3

    def main(self, words, log, seconds=None):
        folder = self.out / "sample/ours/0000005_generated_seed0"
        if seconds is None:
            folder.mkdir(parents=True)
            for path in (folder / "0.png", folder.with_suffix(".png")):
                gradient().save(path)
        else:
            compare.trained.append("ours")

    def compare(*flags, minutes="2"):
        return side_by_side.main([*base, "--minutes", minutes, *flags])

    monkeypatch.setattr(side_by_side.Comparison, "_train_plain", plain)
    monkeypatch.setattr(side_by_side.Comparison, "_main", main)
    compare.trained, compare.out = [], tmp_path / "out"
    compare.record = lambda: json.loads((compare.out / "side_by_side.json").read_text())
    return compare


def test_of_too_few_pictures_the_plain_side_says_what_it_needs(compare, capsys):
    next((compare.out.parent / "pictures").iterdir()).unlink()
    assert compare("--", "--preset", "cpu") == 3
    assert "63 pictures: the plain side needs 64" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "message"), [
    ((), "--minutes"), (("--minutes", "1", "--score", "echo {real}"), "must name both folders"),
    *((("--minutes", minutes), "no number of minutes over 0") for minutes in ("0", "-1", "nan")),
    (("--minutes", "1", "--", "--wandb", "true"), "--wandb true: has no effect with --mode sample"),
    (("--minutes", "1", "--", "--restart", "true"), "--restart true: is for training"),
    (("--minutes", "1", "--", "--metric_step", "9", "--num_eval", "99"), "--num_eval 99: has no effect"),
    (("--minutes", "1", "--", "--nothing", "9"), "--nothing"),
])
def test_mistakes_are_named(pictures, tmp_path, capsys, flags, message):
    assert side_by_side.main(["--image_path", str(pictures), "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_pictures_that_are_drawn_never_become_training_pictures(pictures, capsys):
    for out in (pictures, pictures / "deeper" / "out"):
        assert side_by_side.main(["--image_path", str(pictures), "--out", str(out), "--minutes", "1"]) == 2
        assert "lies in --image_path" in capsys.readouterr().err and not (pictures / "deeper").exists()


def test_a_score_that_fails_or_comes_later_costs_no_training(compare):
    assert compare("--score", "sh -c 'exit 7' {real} {fake}") == 7
    assert compare("--score", GOOD) == 0
    assert compare("--score", GOOD, "--real", str(compare.out)) == 0
    assert compare.trained == ["plain", "ours"]
    for side in ("plain", "ours"):
        assert compare.record()[side]["scores"] == {
            f"{GOOD} with {real}": {"kid": 1.5} for real in (compare.out.parent / "pictures", compare.out)}
    assert Image.open(compare.out / "side_by_side.png").width > 100


def test_what_an_interrupted_call_left_is_drawn_anew(compare):
    assert compare() == 0
    record = compare.record()
    del record["plain"], record["ours"]
    (compare.out / "side_by_side.json").write_text(json.dumps(record))
    (compare.out / "ours" / "old.png").touch()
    assert compare() == 0 and compare.trained == ["plain", "ours"] * 2
    assert [path.name for path in (compare.out / "ours").iterdir()] == ["0.png"]


@pytest.mark.parametrize(("flags", "name"), [
    (("--seed", "1"), "seed"), (("--samples", "100"), "samples"), (("--model", "fastgan"), "model"),
    (("--", "--preset", "cpu"), "flags after --"), (("more",), "pictures in --image_path"), (("3",), "minutes")])
def test_sides_of_other_settings_are_not_taken_over(compare, capsys, flags, name):
    assert compare() == 0
    if flags == ("more",):
        fill(compare.out.parent / "pictures", 65)
        flags = ()
    assert (compare(minutes="3") if flags == ("3",) else compare(*flags)) == 2
    assert f"holds a comparison with other {name}: " in capsys.readouterr().err
    assert compare.trained == ["plain", "ours"]


@pytest.mark.parametrize("text", ['{"plain": {"steps": 5, "scores": {}}}', "{", "[1]"])
def test_a_record_without_settings_is_not_taken_for_one_of_these(compare, capsys, text):
    compare.out.mkdir()
    (compare.out / "side_by_side.json").write_text(text)
    assert compare() == 3 and "side_by_side.json cannot be read" in capsys.readouterr().err
    assert not compare.trained


def test_what_is_in_the_folder_of_something_else_is_not_deleted(compare, capsys):
    fill(compare.out / "ours", 1)
    assert compare() == 2 and "holds ours/ of something else" in capsys.readouterr().err
    assert (compare.out / "ours" / "000.png").exists() and not compare.trained


def test_a_signal_ends_the_comparison_and_what_it_runs(monkeypatch, compare, capsys):
    def killed(self, words, log, seconds=None):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        self.children.run("main.py", ["sleep", "60"], log, seconds=seconds)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(side_by_side.Comparison, "_main", killed)
    began = time.monotonic()
    assert compare() == 143 and time.monotonic() - began < 30, "the child has ended, too"
    assert "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert compare.record()["plain"]["steps"] == 3 and "ours" not in compare.record()


def test_two_calls_cannot_write_into_one_folder(compare, capsys):
    compare.out.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys; file = open(sys.argv[1], 'w');"
                               "fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()",
                               compare.out / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    assert compare() == 6 and not compare.trained
    holder.communicate()


def test_the_plain_side_has_no_noise_for_metadata(tmp_path):
    fill(tmp_path / "pictures", 8)
    parsed = SimpleNamespace(image_path=str(tmp_path / "pictures"), out=tmp_path / "out", model="fastgan", seed=0,
                             minutes=1, samples=64)
    config = side_by_side.Comparison(parsed, []).config
    assert not config.metadata and config.recon == "lpips", "as published"


@pytest.mark.soak
def test_both_sides_train_and_are_shown_and_nothing_is_trained_twice(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, picture in enumerate(smooth(64, 64)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(pictures / f"{number}.png")
    flags = ["--minutes", "0.2", "--image_path", str(pictures), "--samples", "64", "--out", str(tmp_path / "out"),
             "--", "--preset", "cpu", "--num_workers", "0", "--cache_path", str(tmp_path / "cache")]
    assert side_by_side.main(flags) == 0
    record = json.loads((tmp_path / "out/side_by_side.json").read_text())
    assert record["plain"]["steps"] > 0 and record["ours"]["steps"] > 0
    for side in ("plain", "ours"):
        assert len(list((tmp_path / "out" / side).iterdir())) == 64
    assert Image.open(tmp_path / "out/side_by_side.png").width > 1000
    capsys.readouterr()
    assert side_by_side.main(flags) == 0
    assert "training" not in capsys.readouterr().out
