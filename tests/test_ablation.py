"""The ablation command: how it handles runs that finish, fail or are interrupted.

Most tests replace main.py by a stub that only writes a run's files; the last one trains.
"""

import contextlib
import functools
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from conftest import Launched
from PIL import Image

import ablation
import main
import processes
import report
import trainer
from metrics import swd

BENCHMARKS = Path(ablation.__file__).parent

# Stands in for main.py: notes its arguments in calls.txt, and writes the files that the ablation reads.
STAND_IN = '''
import json, os, random, signal, sys, time
from pathlib import Path
argv = sys.argv[1:]
flag = lambda name, default=None: dict(zip(argv, argv[1:])).get("--" + name, default)          # the last one wins
with open("calls.txt", "a") as calls:
    calls.write(json.dumps({"argv": argv, "threads": os.environ.get("OMP_NUM_THREADS")}) + "\\n")
name = flag("version")
if flag("dry_run"):
    print("G parameters: " + ("1001" if flag("slae") == "true" else "1000"))
    print("D parameters: 500")
elif flag("mode") == "evaluate":
    scores = {"lpips": 0.5 + (flag("slae") == "true"), "lpips_std": 9.0, "protocol": "how", "source": "G_ema"}
    with open(Path(flag("log_path"), name, "metrics.jsonl"), "a") as log:
        log.write(json.dumps({"step": int(flag("pretrained_model")), **scores}) + "\\n")
elif flag("train") == "false":
    from PIL import Image
    other = "" if flag("metadata_sample") in (None, "mix") else "_metadata-" + flag("metadata_sample")
    folder = Path(flag("sample_path"), name, f"{int(flag('pretrained_model')):07d}_generated_seed0{other}")
    folder.mkdir(parents=True, exist_ok=True)
    noise = random.Random(name)
    for i in range(int(flag("num_samples"))):
        Image.frombytes("RGB", (64, 64), noise.randbytes(3 * 64 * 64)).save(folder / f"{i:06d}.png")
else:
    if name == os.environ.get("FAIL"):
        print("line one")
        sys.exit("error: --batch_size 9: the reason")
    if name == os.environ.get("HANG"):
        signal.signal(signal.SIGINT, signal.default_int_handler)        # ignored where the suite runs in the background
        try:
            Path("hanging").write_text("yes")
            time.sleep(600)
        except KeyboardInterrupt:
            Path("saved").touch()
            sys.exit(130)
    from PIL import Image
    step = int(flag("total_step"))
    if step == 10**9:                                                   # of --minutes, which are over at once
        step = int(flag("pretrained_model", 0)) + len(name)
    models, logs, samples = (Path(flag(kind), name) for kind in ("model_save_path", "log_path", "sample_path"))
    for folder in (models, logs, samples):
        folder.mkdir(parents=True, exist_ok=True)
    (models / "config.json").write_text(json.dumps({
        "version": name, "seed": flag("seed"), "pretrained_model": flag("pretrained_model"),
        "slae": flag("slae"), "metadata": flag("metadata") == "true",
        "vgg_weights": "random", "batch_size": 8, "recon": os.environ.get("RECON" + flag("slae", ""), "l1")}))
    (logs / "metrics.jsonl").write_text("".join(
        json.dumps({"step": i, "sec_per_step": s}) + "\\n" for i, s in ((1, 9.0), (2, 0.1), (3, 0.3), (4, 0.2))))
    Image.new("RGB", (66, 66), (ord(name[0]), 90, 90)).save(samples / f"{step:07d}_fake.png")
    every = int(flag("model_save_step", 1))
    for saved in [*range(every, step, every), step]:
        (models / f"{saved:07d}.pth").touch()
'''


class InThisProcess(processes.Children):
    """Runs the stand-in for main.py in this process, as to start a program takes longer than all that it does."""

    def run(self, name, command, log, capture=False, seconds=None):
        if command[1] != ablation.MAIN:
            return super().run(name, command, log, capture, seconds)
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as only_there:
            only_there.setattr(sys, "argv", [str(word) for word in command[1:]])
            runpy.run_path(str(ablation.MAIN))
        return out.getvalue()


@pytest.fixture
def stand_in(tmp_path, pictures, monkeypatch):
    """An empty folder to work in, with a stand-in for main.py and a distance that takes no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "main.py").write_text(STAND_IN)
    monkeypatch.setattr(ablation, "MAIN", tmp_path / "main.py")
    monkeypatch.setattr(ablation, "Children", InThisProcess)
    quick = functools.partial(swd.sliced_wasserstein, count=256, directions=8)
    monkeypatch.setattr(swd, "sliced_wasserstein", quick)
    return tmp_path


@pytest.fixture
def stand_in_program(stand_in, monkeypatch):
    """The same, for what is to fail or hang, or several at once: a program of its own each time."""
    monkeypatch.setattr(ablation, "Children", processes.Children)
    return stand_in


def run(*flags):
    """The exit code of the ablation at the stand-in's size."""
    return ablation.main(["--image_path", "pictures", "--imsize", "64", "--steps", "4", "--seeds", "1",
                          "--samples", "10", "--points", "1", *map(str, flags)])


TWO = ("--variants", "baseline,+SLAE")


def calls(kind):
    """The recorded command lines of main.py that train, sample, evaluate, or only describe."""
    def kind_of(argv):
        kinds = {"--mode": "evaluate", "--dry_run": "describe", "--train": "sample"}
        return next((kind for flag, kind in kinds.items() if flag in argv), "train")

    lines = map(json.loads, Path("calls.txt").read_text().splitlines())
    return [line for line in lines if kind_of(line["argv"]) == kind]


def value(argv, flag):
    return argv[argv.index(flag) + 1]


def script(folder, text, name="score.py"):
    """A --score command that runs this Python text with real and fake as its arguments."""
    (folder / name).write_text(text)
    return f"{shlex.quote(sys.executable)} {name} {{real}} {{fake}}"


# ------------------------------------------------------------------------------------------------- with a stand-in


def test_one_command_trains_every_variant_seed_by_seed_and_writes_the_report_with_all_grids(stand_in, capsys):
    assert run("--seeds", 2, "--", "--g_conv_dim", "4") == 0
    trained = [call["argv"] for call in calls("train")]
    assert [value(argv, "--version") for argv in trained] == [
        f"{name}_seed{seed}" for seed in (0, 1) for name in ("baseline", "slae", "metadata", "both")]
    assert [(value(argv, "--slae"), value(argv, "--metadata")) for argv in trained[:4]] == [
        ("false", "false"), ("true", "false"), ("false", "true"), ("true", "true")]
    assert [value(argv, "--seed") for argv in trained] == ["0"] * 4 + ["1"] * 4
    assert all(value(argv, "--g_conv_dim") == "4" and value(argv, "--total_step") == "4" for argv in trained)
    assert {value(call["argv"], "--seed") for call in calls("sample")} == {"0"}
    text = Path("ablation/ablation.md").read_text()
    for part in ("--g_conv_dim 4", "imsize 64, 4 steps, seeds 0, 1", "12 real pictures, 10 drawn", "torch",
                 "cores", "random (untrained", "all settings are equal", "| floor: real against real |",
                 "![grids of baseline", "The same in every run: D parameters 500.",
                 "+SLAE against baseline: G parameters 1,000 -> 1,001 (+0.10 %)", "| 0.200 ± 0.000 |"):
        assert part in text
    assert len(re.findall(r"^- both against baseline: swd .* of 2 seeds", text, re.MULTILINE)) == 1
    assert "unfinished" not in text
    out = capsys.readouterr().out
    assert "| +metadata |" in out and "8 of 8: both_seed1: swd" in out
    assert sorted(os.listdir(".")) == ["ablation", "cache", "calls.txt", "main.py", "pictures"]
    real = [Image.open(path).size for path in Path("ablation/real").iterdir()]
    assert real == [(64, 64)] * 12, "cropped as in training"
    page = np.asarray(Image.open("ablation/ablation.png"))
    for name in ("slae_seed0", "metadata_seed0"):
        assert (page == (ord(name[0]), 90, 90)).all(2).sum() == 66 * 66
    assert (page == (ord("b"), 90, 90)).all(2).sum() == 2 * 66 * 66, "baseline and both"


def test_the_real_pictures_are_padded_and_on_white_as_in_training(stand_in, pictures):
    Image.new("RGBA", (64, 32), (255, 0, 0, 128)).save(pictures / "0.png")
    assert run("--variants", "baseline", "--", "--fit", "pad", "--channels", "rgba") == 0
    with Image.open("ablation/real/000000.png") as picture:
        assert picture.mode == "RGB"
        assert set(picture.getcolors()) == {(32 * 64, (255, 255, 255)), (32 * 64, (255, 127, 127))}


def test_nearest_of_metadata_drawn_in_two_ways_is_two_columns():
    lines = [json.dumps({"step": 4, "nearest": value, "protocol": "how", "source": f"G_ema, seed 0, metadata {draw}"})
             for draw, value in (("bank", 0.5), ("gauss", 0.9))]
    assert report.scores_in(lines) == {"nearest": 0.5, "nearest_gauss": 0.9}


def test_a_score_added_later_is_all_that_is_done_and_the_same_command_again_does_nothing(stand_in, monkeypatch):
    assert run(*TWO) == 0
    before = Path("calls.txt").read_text()
    monkeypatch.setattr(swd, "sliced_wasserstein", None)           # calling it would raise
    score = script(stand_in, """
import json, os, sys
open("scored.txt", "a").write("x")
print("chatter")
real, fake = (len(os.listdir(folder)) for folder in sys.argv[1:])
print(json.dumps({"seen": real, "fd": fake + 0.5, "device": "cuda", "truncated": True}))
""")
    assert run(*TWO, "--score", score) == 0
    text = Path("ablation/ablation.md").read_text()
    assert "| 10.50 |" in text and "The same in every run: seen 12, " in text
    assert "device" not in text and "truncated" not in text, "they are no numbers"
    assert run(*TWO, "--score", score) == 0
    assert Path("calls.txt").read_text() == before and Path("scored.txt").read_text() == "xx"
    assert Path("ablation/ablation.md").read_text() == text
    shutil.rmtree("ablation/drawn")
    assert run(*TWO) == 0, "without --score its column is gone, and nothing is needed for that"


def test_all_draws_give_a_row_each_and_are_kept_apart(stand_in):
    assert run("--variants", "baseline,+metadata", "--all_draws", "true") == 0
    drawn = [call["argv"] for call in calls("sample")]
    assert [value(argv, "--metadata_sample") for argv in drawn[1:]] == ["mix", "bank", "gauss"]
    assert "--metadata_sample" not in drawn[0]
    assert len({value(argv, "--sample_path") for argv in drawn}) == 4
    text = Path("ablation/ablation.md").read_text()
    for draw in ("mix", "bank", "gauss"):
        assert f"- +metadata, {draw} against baseline: swd" in text
    assert run("--variants", "+metadata") == 0
    assert len(calls("sample")) == 4, "mix had been drawn and scored"


def test_scores_of_a_program_and_of_mode_evaluate_are_columns_and_what_is_not_found_is_left_out(stand_in, monkeypatch):
    asked = []
    monkeypatch.setattr(ablation.evaluate, "load", lambda config, place: asked.append(config.metrics))
    score = script(stand_in, """
import json, sys
print(json.dumps({"fd": 3.5, "kid": float("nan"), **({"precision": 0.5} if "baseline" in sys.argv[2] else {})}))""")
    pair = (*TWO, "--points", "2", "--score", score, "--evaluate", "lpips --backtrack_steps 9")
    assert run(*pair) == 0
    assert value(calls("evaluate")[0]["argv"], "--backtrack_steps") == "9"
    assert [value(call["argv"], "--pretrained_model") for call in calls("evaluate")] == ["4", "4"], "the last step"
    text = Path("ablation/ablation.md").read_text()
    assert "| fd " in text and "kid" not in text and Path("ablation/curves.png").exists()
    assert "lpips 0.500 -> 1.500 (+200 %), worse" in text and "lpips_std" not in text
    assert run(*pair) == 0
    assert len(calls("evaluate")) == 2, "nothing is evaluated twice"
    assert asked == [("lpips",)] * 2, "whether weights are missing is asked before anything is trained"


def scorer_of(folder, **columns):
    """A --score command: each column is an expression in `seed`, `both` (0 or 1) and `step` of what it scores."""
    return script(folder, f"""
import json, re, sys
name, step = re.search(r"([a-z]+_seed\\d+)/(\\d+)_generated", sys.argv[2]).groups()
values = dict(seed=int(name.partition("seed")[2]), both=int(name.startswith("both")), step=int(step))
print(json.dumps({{key: eval(text, values) for key, text in {columns!r}.items()}}))
""")


PAIR = ("--variants", "baseline,both")


@pytest.mark.soak
def test_each_run_is_scored_at_several_steps_in_tables_and_curves(stand_in, capsys):
    score = scorer_of(stand_in, vgg_kid="10 * seed + 8 - step - both + 0.1 * seed * both", nearest="0.9")
    assert run(*PAIR, "--seeds", 3, "--points", 2, "--score", score) == 0
    assert [value(call["argv"], "--pretrained_model") for call in calls("sample")[:4]] == ["2", "4"] * 2
    assert {(value(call["argv"], "--model_save_step"), value(call["argv"], "--keep_checkpoints"))
            for call in calls("train")} == {("2", "0")}
    assert sorted(path.name for path in Path("ablation/models/both_seed1").glob("*.pth")) == ["0000004.pth"]
    text = Path("ablation/ablation.md").read_text()
    # differences of -1, -0.9, -0.8: their mean -0.9, Student's t of two degrees of freedom 4.303
    assert "both against baseline: vgg_kid 14.00 -> 13.10 (-6.4 %), better; better in 3 of 3 seeds; paired " \
           "difference -0.90, 95 % interval -1.15 to -0.65 (**excludes 0**)" in text
    table = text.partition("`vgg_kid` by step:\n\n")[2].splitlines()
    assert table[0] == "| step | baseline | both |"
    assert table[2:4] == ["| 2 | 16.00 | **15.10 [-1.15, -0.65]** |", "| 4 | 14.00 | **13.10 [-1.15, -0.65]** |"]
    assert "![scores by step](curves.png)" in text and Image.open("ablation/curves.png").width > 500
    assert "![paired differences](differences.png)" in text and Image.open("ablation/differences.png").width > 500
    shutil.rmtree("ablation/drawn")
    assert run(*PAIR, "--seeds", 3, "--points", 2, "--score", score + " again") == 3
    assert "to train baseline_seed0 again, delete ablation/models/baseline_seed0" in capsys.readouterr().err
    shutil.rmtree("ablation/models")
    before = Path("calls.txt").read_text()
    assert run(*PAIR, "--seeds", 3, "--points", 2, "--score", score) == 0
    assert Path("calls.txt").read_text() == before, "what has been scored needs neither checkpoints nor pictures"


def test_runs_of_equal_time_are_scored_by_the_minute(stand_in, monkeypatch, capsys):
    def run_for(minutes, *flags):
        return ablation.main(["--image_path", "pictures", "--imsize", "64", "--minutes", minutes, "--points", "2",
                              "--seeds", "1", "--samples", "10", *TWO, *flags])

    assert run_for("5") == 0
    filled, trained = [[call["argv"] for call in calls("train")][part] for part in (slice(2), slice(2, None))]
    assert [(value(argv, "--version"), value(argv, "--slae")) for argv in filled] == [
        ("caches", "false"), ("caches", "true")]
    assert not list(Path("ablation").glob("*/caches"))
    assert [value(argv, "--version") for argv in trained] == ["baseline_seed0"] * 2 + ["slae_seed0"] * 2
    assert [value(argv, "--pretrained_model") if "--pretrained_model" in argv else None for argv in trained] == [
        None, "14", None, "10"]
    text = Path("ablation/ablation.md").read_text()
    for part in ("imsize 64, 5 minutes", "but for `metadata`, `slae` all settings are equal", "`swd` by minute:",
                 "| 2.5 |", "+SLAE against baseline: steps 28 -> 20 (-29 %)", "up to minute 5"):
        assert part in text
    assert sorted(path.name for path in Path("ablation/models").glob("*/*.pth")) == ["0000020.pth", "0000028.pth"]
    shutil.rmtree("ablation/models/baseline_seed0")     # what was drawn can be scored without
    assert run_for("5", "--score", script(stand_in, "print('{\"fd\": 1}')")) == 0

    # interrupted between the points: what the run had reached at the first one is kept, what it trained after it is not
    record = json.loads(Path("ablation/ablation.json").read_text())
    del record["reached"]["slae_seed0"]["5"], record["scores"]["slae_seed0, minute 5, 10 pictures"]
    Path("ablation/ablation.json").write_text(json.dumps(record))
    assert run_for("5") == 0
    (again,) = [call["argv"] for call in calls("train")][6:]            # none of the run whose models are gone
    assert (value(again, "--version"), value(again, "--pretrained_model")) == ("slae_seed0", "10")
    assert run("--out", "ablation", *TWO) == 2
    assert "an ablation with other minutes: 5 in 2 points, now (none)" in capsys.readouterr().err

    monkeypatch.setenv("HANG", "baseline_seed0")
    monkeypatch.setattr(ablation, "Children", processes.Children)
    assert run_for("0.06", "--out", "short") == 1 and Path("saved").exists(), "asked to save and end"
    assert "trained no step from minute 0 to 0.03; give more --minutes" in capsys.readouterr().err


@pytest.mark.soak
def test_seeds_are_added_until_the_interval_excludes_zero(stand_in, capsys):
    # differences 5, -1, -1, -1, -1.3, ...: the interval excludes 0 with none of them for the first 11 seeds
    score = scorer_of(stand_in, kid="10 + both * (1 if seed < 2 else 1 + seed / 100) * (seed != 0 or -1)")
    assert run(*PAIR, "--seeds", 2, "--until", "kid", "--most", 9, "--score", score) == 0
    seeds = [value(call["argv"], "--seed") for call in calls("train")]
    found = Path("ablation/ablation.md").read_text()
    assert "(**excludes 0**)" in found.partition("kid 1")[2].splitlines()[0] and "Seeds were added while" in found
    assert 2 < len(seeds) / 2 < 9 and "seed 2: the interval of kid includes 0 for both" in capsys.readouterr().out
    before = Path("calls.txt").read_text()
    assert run(*PAIR, "--seeds", 2, "--until", "kid", "--most", 9, "--score", score) == 0
    assert Path("calls.txt").read_text() == before, "the same seeds again"
    assert run(*PAIR, "--seeds", 9, "--until", "kid", "--score", score) == 0
    assert "Seeds were added" not in Path("ablation/ablation.md").read_text(), "all were asked for"
    assert run(*PAIR, "--seeds", 2, "--until", "fid", "--score", score) == 2
    assert "--until fid: no such column; there are swd, kid" in capsys.readouterr().err
    assert run("--variants", "both", "--until", "kid", "--score", score) == 2
    score = scorer_of(stand_in, kid="10 + both * (-1) ** seed")
    assert run(*PAIR, "--until", "kid", "--most", 3, "--out", "limit", "--score", score) == 0
    assert "seeds 0, 1, 2" in Path("limit/ablation.md").read_text()


def test_a_run_that_fails_ends_the_command_with_its_code_and_last_words(stand_in_program, capsys, monkeypatch):
    monkeypatch.setenv("FAIL", "slae_seed0")
    assert run(*TWO, "--", "--batch_size", "9") == 1
    err = capsys.readouterr().err
    assert "    error: --batch_size 9: the reason\nerror: slae_seed0 ended with exit code 1" in err
    assert "Traceback" not in err and "unfinished: 1 of 2" in Path("ablation/ablation.md").read_text()
    monkeypatch.delenv("FAIL")
    assert run(*TWO, "--", "--batch_size", "9") == 0
    names = [value(call["argv"], "--version") for call in calls("train")]
    assert names.count("baseline_seed0") == 1 and names.count("slae_seed0") == 2


def test_wrong_flags_are_found_before_anything_is_trained(stand_in_program, capsys):
    (stand_in_program / "main.py").write_text("import sys\nprint('error: unknown flag --widht')\nsys.exit(2)")
    assert run("--", "--widht", "4") == 2
    assert "unknown flag --widht" in capsys.readouterr().err
    assert not Path("ablation/ablation.json").exists(), "other flags are welcome there"


def test_a_score_program_that_prints_no_object_is_named(stand_in_program, capsys):
    assert run("--score", script(stand_in_program, "print('fd 12')")) == 1
    assert "its last line must be a JSON object, but is 'fd 12'" in capsys.readouterr().err
    assert run("--score", script(stand_in_program, "import sys\nsys.exit(7)")) == 7
    assert run("--score", script(stand_in_program, "print('{\"swd\": 1}')")) == 2
    assert "'swd' is the name of another column" in capsys.readouterr().err
    assert len(calls("train")) == 1


def test_runs_that_differ_in_more_than_the_two_flags_are_told_of(stand_in, monkeypatch):
    monkeypatch.setenv("RECONtrue", "lpips")
    assert run(*TWO) == 0
    assert "**the runs differ in more than they should: recon**" in Path("ablation/ablation.md").read_text()
    config = next(Path("ablation/models").glob("*/config.json"))        # of a version without this flag
    config.write_text(json.dumps({name: value for name, value in json.loads(config.read_text()).items()
                                  if name != "recon"}))
    assert run(*TWO) == 0
    assert "than they should" not in Path("ablation/ablation.md").read_text()


@pytest.mark.soak
def test_several_trainings_at_once_share_the_cores(stand_in_program, monkeypatch):
    monkeypatch.setattr(processes, "cores", lambda: 6)
    assert run(*TWO, "--jobs", 3) == 0
    assert {call["threads"] for call in calls("train")} == {"2"}
    assert "3 trainings at once" in Path("ablation/ablation.md").read_text()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert run("--variants", "baseline", "--jobs", 2, "--out", "b") == 0
    assert calls("train")[-1]["threads"] == "5"


@pytest.mark.skipif(os.name != "posix", reason="sends signals, locks folders")
def test_at_work_it_turns_a_second_one_away_and_hands_a_signal_on_once(stand_in, monkeypatch, capsys):
    monkeypatch.setenv("HANG", "slae_seed0")
    Path("program.py").write_text(
        f"import os, sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "reading, writing = os.pipe(); os.dup2(writing, 1); os.close(reading)\n"     # as `| head` does; it ends nothing
        "import ablation; from metrics import swd; from pathlib import Path; from functools import partial\n"
        "ablation.MAIN = Path('main.py').resolve()\n"
        "swd.sliced_wasserstein = partial(swd.sliced_wasserstein, count=64, directions=4)\n"
        "ablation.console.run(ablation.main)")
    running = Launched("--image_path", "pictures", "--imsize", 64, "--steps", 4, "--seeds", 1, "--samples", 10,
                       "--points", 1, "--jobs", 2, *TWO, script=Path("program.py").absolute())
    running.wait_for("ablation/ablation.md")
    running.wait_for("hanging")
    assert run(*TWO) == 6
    assert "writes into ablation; wait for it, or use another --out" in capsys.readouterr().err
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait(30) == 143
    err = running.err.read_text()
    assert "the same command goes on" in err and "Traceback" not in err
    assert Path("saved").exists(), "the training was asked to save, not killed"
    monkeypatch.delenv("HANG")
    before = len(calls("train"))
    assert run(*TWO) == 0
    assert "slae_seed0" in [value(call["argv"], "--version") for call in calls("train")[before:]]
    assert [value(call["argv"], "--version") for call in calls("train")].count("baseline_seed0") == 1


def test_a_folder_of_another_ablation_is_not_mixed_with_this_one(stand_in, pictures, capsys):
    assert run("--variants", "baseline") == 0
    assert run("--variants", "baseline", "--", "--g_conv_dim", "8") == 2
    assert "other flags after --: (none), now --g_conv_dim 8" in capsys.readouterr().err
    (pictures / "3.png").unlink()
    assert run("--variants", "baseline") == 2
    assert "other pictures in --image_path" in capsys.readouterr().err


def test_a_variant_of_ones_own_is_compared_with_the_baseline(stand_in, capsys):
    narrow = ("--variants", "baseline", "--variant", "narrow=--slae false --z_dim 64")
    assert run(*narrow, "--", "--z_dim", "128") == 0
    argv = [call["argv"] for call in calls("train")][-1]
    assert value(argv, "--version") == "narrow_seed0"
    assert [argv[i + 1] for i, word in enumerate(argv) if word == "--z_dim"] == ["128", "64"], "the last one wins"
    text = Path("ablation/ablation.md").read_text()
    assert "- narrow against baseline: swd" in text and "differ in more than they should" not in text
    assert run(*narrow[:3], "narrow=--z_dim 32", "--", "--z_dim", "128") == 2
    assert "other flags of narrow: --slae false --z_dim 64, now --z_dim 32" in capsys.readouterr().err


def test_more_steps_go_on_and_are_scored_anew(stand_in):
    assert run("--variants", "baseline") == 0
    assert run("--variants", "baseline", "--steps", 8) == 0
    assert [value(call["argv"], "--total_step") for call in calls("train")] == ["4", "8"]
    assert [value(call["argv"], "--pretrained_model") for call in calls("sample")] == ["4", "8"]
    assert "8 steps" in Path("ablation/ablation.md").read_text()


def test_points_that_a_run_has_passed_are_refused_before_it_trains_on(stand_in, capsys):
    assert run("--variants", "baseline") == 0
    before = Path("calls.txt").read_text()
    other = ("--variants", "baseline", "--steps", 6, "--points", 2)
    assert run(*other) == 3
    assert "the pictures of step 3 are gone" in capsys.readouterr().err and Path("calls.txt").read_text() == before
    shutil.rmtree("ablation/models/baseline_seed0")
    assert run(*other) == 0
    assert "baseline_seed0, step 4, 10 pictures" not in json.loads(Path("ablation/ablation.json").read_text())["scores"]


def test_all_variants_reconstruct_alike_though_only_some_download_vgg16(stand_in):
    assert run(*PAIR) == 0
    assert [value(call["argv"], "--recon") for call in calls("train")] == ["lpips"] * 2
    assert run(*PAIR, "--out", "l1", "--", "--preset", "cpu") == 0
    assert "--recon" not in calls("train")[-1]["argv"], "the preset's l1 stays"


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_a_closed_terminal_does_not_end_one_under_nohup_and_a_copied_signal_does_not_kill(monkeypatch):
    children, killed = processes.Children(1), []
    monkeypatch.setattr(children, "stop", lambda kill=False: killed.append(kill))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with children.signals_handled():
            os.kill(os.getpid(), signal.SIGHUP)
            assert killed == [] and children.signal is None
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert killed == [False], "a copy"
            monkeypatch.setattr(processes, "FORWARDED", -1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert killed == [False, True]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_picture_that_cannot_be_read_is_left_out_as_in_training(stand_in, pictures):
    (pictures / "3.png").write_bytes((pictures / "3.png").read_bytes()[:60])
    assert run("--variants", "baseline") == 0
    assert "11 real pictures" in Path("ablation/ablation.md").read_text()


def test_a_damaged_record_is_named(stand_in, capsys):
    assert run("--variants", "baseline") == 0
    for damage in ("{", "[1]"):
        Path("ablation/ablation.json").write_text(damage)
        assert run("--variants", "baseline") == 3
        assert "ablation.json cannot be read" in capsys.readouterr().err
    Path("ablation/ablation.json").unlink()
    timed = ["--image_path", "pictures", "--minutes", "5", "--variants", "baseline"]
    assert ablation.main(timed) == 3, "its runs would be trained again"
    assert "ablation.json is gone" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "code", "message"), [
    (("--variants", "baseline,+SLEA"), 2, "did you mean +SLAE?"),
    (("--seeds", "0"), 2, "--seeds: '0' is no whole number of at least 1"),
    (("--minutes", "5"), 2, "--minutes: not allowed with argument --steps"),
    (("--score", "echo {real}"), 2, "must name both folders"),
    (("--score", "no_such_program {real} {fake}"), 2, "there is no program no_such_program"),
    (("--score", f"{shlex.quote(sys.executable)} score.py {{real}} {{fake}}"), 2, "there is no file score.py"),
    (("--image_path", "nowhere"), 3, "there is no folder nowhere; set --image_path to"),
    (("--out", "pictures/out"), 2, "lies in --image_path"),
    (("--", "--total_step", "9"), 2, "--total_step after --: the ablation sets it"),
    (("--", "--imsize=64"), 2, "give --imsize before the --"),
    (("--", "--wandb", "true"), 2, "--wandb true: has no effect with --mode sample"),
    (("--", "--restart", "true"), 2, "--restart after --: the ablation sets it"),
    (("--until", "kid"), 2, "--until kid: needs a --score or --evaluate that has this column"),
    (("--evaluate", "lpips --version x"), 2, "--version in --evaluate: the ablation sets it"),
    (("--evaluate", "lpisp"), 2, "'lpisp' is not one of"),
    (("--evaluate", "swd"), 2, "swd is a column of every ablation"),
    (("--evaluate", "share"), 3, "--metrics without share"),
    (("--", "--metrics", "kid"), 2, "give --evaluate before the --"),
    (("--variant", "wide"), 2, "'wide' is not NAME=FLAGS"),
    (("--variant", "wide=--seed 3"), 2, "--seed in --variant wide: the ablation sets it"),
    (("--variant", "Both=--z_dim 3"), 2, "take another name"),
    (("--variant", "x=--slae=false --total_step=3"), 2, "--total_step in --variant x"),
    (("--width", "9"), 2, "unrecognized arguments: --width"),
])
def test_mistakes_are_named(stand_in, capsys, flags, code, message):
    assert run(*flags) == code
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and len(err.splitlines()) <= 2
    assert not Path("calls.txt").exists()


# -------------------------------------------------------------------------------------------------- the real thing


SMALLEST = ("--g_conv_dim", "4", "--d_conv_dim", "4", "--recon", "l1", "--batch_size", "4", "--num_workers", "0",
            "--device", "cpu")


def assert_reported(text, *parts):
    for part in ("G parameters", "s/step", "settings are equal", "| floor: real against real |", *parts):
        assert part in text
    assert "unfinished" not in text


class RealInThisProcess:
    """Stands in for `processes.Children`: runs the command lines of main.py in this process."""

    signal = None

    def __init__(self, jobs):
        pass

    def run(self, name, command, log, capture=False, seconds=None):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main.main([str(word) for word in command[2:]]) == 0, name
        return out.getvalue()

    def check(self):
        pass

    stop = check

    signals_handled = contextlib.nullcontext


class OneByOne:
    """Stands in for ThreadPoolExecutor: only the main thread can set the signal handlers of a training."""

    def __init__(self, jobs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, work, *arguments):
        future = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.mark.soak
def test_two_variants_of_a_small_model(tmp_path, pictures, monkeypatch):
    """What main.py prints, saves and calls its files is what the ablation looks for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablation, "Children", RealInThisProcess)
    monkeypatch.setattr(ablation, "ThreadPoolExecutor", OneByOne)
    monkeypatch.setattr(trainer, "BN_STATS_IMAGES", 16)
    monkeypatch.setattr(swd, "sliced_wasserstein", functools.partial(swd.sliced_wasserstein, count=256, directions=8))
    assert ablation.main(["--image_path", "pictures", "--imsize", "64", "--steps", "1", "--seeds", "1", "--samples",
                          "8", *TWO, "--", *SMALLEST]) == 0
    assert_reported(Path("ablation/ablation.md").read_text(), "- +SLAE against baseline: swd",
                    "12 real pictures, 8 drawn")
    for name in ("baseline_seed0", "slae_seed0"):
        assert Path("ablation/models", name, "0000001.pth").exists()
    assert Image.open("ablation/ablation.png").width > 1000


@pytest.mark.soak
def test_two_variants_of_the_real_model(tmp_path, pictures):
    command = [sys.executable, BENCHMARKS / "ablation.py", "--image_path", "pictures", "--imsize", "64",
               "--steps", "2", "--seeds", "1", "--samples", "32", "--variants", "baseline,both", "--",
               *SMALLEST, "--vgg_weights", "random"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_reported((tmp_path / "ablation/ablation.md").read_text(), "- both against baseline: swd",
                    "random (untrained")
    for name in ("baseline_seed0", "both_seed0"):
        assert (tmp_path / "ablation/models" / name / "0000002.pth").exists()
    assert Image.open(tmp_path / "ablation/ablation.png").width > 1000


def test_another_model_has_arms_of_its_own(stand_in, capsys):
    assert run("--model", "sagan", "--variant", "plain=--g_attn none --d_attn none", "--", "--preset", "cpu") == 0
    trained = [call["argv"] for call in calls("train")]
    assert [value(argv, "--version") for argv in trained] == ["baseline_seed0", "plain_seed0"]
    assert [value(argv, "--model") for argv in trained] == ["sagan", "sagan"]
    assert "--slae" not in trained[0] and value(trained[1], "--g_attn") == "none"
    text = Path("ablation/ablation.md").read_text()
    assert text.startswith("# Ablation of sagan") and "paper claims" not in text
    assert run("--model", "sagan", "--variants", "both") == 2
    assert "--variants: are those of fastgan" in capsys.readouterr().err
