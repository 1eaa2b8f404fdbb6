"""The trainings on a lent GPU: what travels there, the commands, their time limit, what comes back."""

import io
import json
import re
import shlex
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gpu_pack
import gpu_results
import gpu_runs
from dataset.toy import draw_face
from parameter import as_json, parse, resolve
from pretrained import vgg

SCRIPT = Path(gpu_runs.__file__).with_name("gpu.sh")


def picture(size, seed=0, format="JPEG"):
    """An encoded picture of noise."""
    data = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(values).save(data, format)
    return data.getvalue()


def pack(tmp_path, *flags):
    assert gpu_runs.main(["pack", str(tmp_path / "pack"), *map(str, flags)]) == 0
    return tmp_path / "pack"


@pytest.fixture
def faces(tmp_path):
    """A zip of three CelebA pictures of half size, and one of the full size."""
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        archive.writestr("img/readme.txt", "no picture")
        for number in range(3):
            archive.writestr(f"img/{number}.jpg", picture((89, 109), number))
        archive.writestr("img/3.jpg", picture((178, 218)))
    return tmp_path / "faces.zip"


# ------------------------------------------------------------------------------------------------------------ pack


def test_faces_of_half_size_travel_as_they_are_and_lose_nothing_in_the_published_crop(tmp_path, faces):
    packed = pack(tmp_path, "--celeba", faces) / "celeba.zip"
    with zipfile.ZipFile(packed) as archive, zipfile.ZipFile(faces) as original:
        travelling = [archive.read(name) for name in archive.namelist()]
        assert travelling[:3] == [original.read(f"img/{number}.jpg") for number in range(3)]
        assert Image.open(io.BytesIO(travelling[3])).size == (89, 109)
    assert gpu_pack.unpack(packed, tmp_path / "pictures", gpu_runs.EXPERIMENTS["celeb"]) == 4
    first = min((tmp_path / "pictures").iterdir())
    whole = np.asarray(Image.open(io.BytesIO(travelling[0])))
    assert np.array_equal(np.asarray(Image.open(first)), whole[14:94, 4:84])


def test_paintings_travel_as_squares_and_the_small_set_is_spread_over_them(tmp_path, pictures):
    packed = pack(tmp_path, "--paintings", pictures) / "paintings.zip"
    with zipfile.ZipFile(packed) as archive:
        assert len(archive.namelist()) == 12
        assert all(Image.open(io.BytesIO(archive.read(name))).size == (256, 256) for name in archive.namelist())
    small = replace(gpu_runs.EXPERIMENTS["few100"], pictures=4)
    assert gpu_pack.unpack(packed, tmp_path / "few", small) == 4
    assert sorted(path.name for path in (tmp_path / "few").iterdir()) == [f"{n:04d}.jpg" for n in (0, 3, 6, 9)]
    for number in range(6):
        (pictures / f"{number}.png").unlink(missing_ok=True)
    packed = pack(tmp_path, "--paintings", pictures) / "paintings.zip"
    assert gpu_pack.unpack(packed, tmp_path / "few", small) == 4
    assert "0009.jpg" not in {path.name for path in (tmp_path / "few").iterdir()}, "pictures packed later replace them"


def test_a_zip_without_pictures_is_refused_when_it_is_packed(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    assert gpu_runs.main(["pack", str(tmp_path / "pack"), "--celeba", str(tmp_path / "empty.zip")]) == 3
    assert "it holds no picture" in capsys.readouterr().err and not any((tmp_path / "pack").iterdir())


def test_the_weights_travel_in_half_the_size_and_load(tmp_path):
    path = pack(tmp_path, "--vgg_weights", "random") / gpu_pack.WEIGHTS
    assert path.stat().st_size < 30_000_000
    before, after = (vgg.load_vgg(weights, "").state_dict() for weights in ("random", str(path)))
    assert all(torch.equal(after[name], before[name].half().float()) for name in before)


# -------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("argv", "code", "words"), [
    (["pack", "P", "--classes", "none.zip"], 3, "--classes none.zip"),
    (["OUT", "faces"], 2, "'celeb', 'few', 'few100', 'small', 'classes', 'large'"),
    (["OUT", "celeb", "--seconds", "soon"], 2, "--seconds: 'soon' is no whole number"),
    (["OUT", "celeb", "--pack", "nowhere"], 3, "gpu.sh pack"),
    (["OUT", "celeb", "--scores", "--metrics 'swd"], 2, "--scores"),
    (["pack", "P"], 2, "--celeba ZIP"),
    (["pack", "P", "--celeba", "none.zip"], 3, "--celeba none.zip"),
    (["pack", "P", "--paintings", "none"], 3, "--paintings: there is no folder none"),
    (["pack", str(gpu_pack.ROOT / "docs"), "--celeba", "none.zip"], 2, "git does not ignore"),
])
def test_mistakes_are_told_in_a_line(tmp_path, monkeypatch, capsys, argv, code, words):
    if "git" in words and not (gpu_pack.ROOT / ".git").exists():
        pytest.skip("no checkout")
    monkeypatch.chdir(tmp_path)
    assert gpu_runs.main(argv) == code
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not Path("OUT").exists()


def test_a_damaged_archive_is_named_and_leaves_no_half_of_the_pictures(tmp_path, faces):
    path = pack(tmp_path, "--celeba", faces) / "celeba.zip"
    path.write_bytes(path.read_bytes().replace(b"\xff\xd8", b"\0\0"))       # no JPEG begins any more
    with pytest.raises(gpu_pack.DataError, match=r"celeba.zip is damaged.*--celeba"):
        gpu_pack.unpack(path, tmp_path / "pictures", gpu_runs.EXPERIMENTS["celeb"])
    assert not (tmp_path / "pictures").exists()


def test_the_shell_command_hands_on_what_is_no_table(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"$@\"\n")
    python.chmod(0o755)
    for asked in (["OUT", "celeb", "--steps", "5"], ["pack", "P", "--celeba", "a b.zip"], ["--help"]):
        done = subprocess.run(["bash", SCRIPT, *asked], capture_output=True, text=True, env={"PYTHON": str(python)})
        assert done.stdout.split("gpu_runs.py ")[1] == " ".join(asked) + "\n"


# ------------------------------------------------------------------------------------------------------ the commands


MAIN = """
import json, pathlib, signal, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name = flags["--version"]
models, logs = (pathlib.Path(flags[flag], name) for flag in ("--model_save_path", "--log_path"))
models.mkdir(parents=True, exist_ok=True)
logs.mkdir(parents=True, exist_ok=True)
def save(step):
    (models / f"{step:07d}.pth").write_text("")
def told(number, frame):
    save(7)
    sys.exit(130)
if "--metric_step" in flags or "evaluate" in flags.values():
    with open(logs / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"step": 5, "fd_vgg16": 12.5, "protocol": "by hand"}) + "\\n")
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """call(experiment, what main.py does then, *flags) -> (exit code, the report), with nothing in the packed files."""
    (tmp_path / "pack").mkdir()
    for name in ("celeba.zip", "paintings.zip", "classes.zip", gpu_pack.WEIGHTS):
        with zipfile.ZipFile(tmp_path / "pack" / name, "w") as archive:
            archive.writestr("a.jpg", picture((89, 109)))
    for module in (gpu_pack, gpu_runs):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_runs, "LEAST", 1)
    monkeypatch.setattr(gpu_runs, "GRACE", 0.5)
    for name, experiment in gpu_runs.EXPERIMENTS.items():
        monkeypatch.setitem(gpu_runs.EXPERIMENTS, name, replace(experiment, reserve=0))

    def command(experiment, does, *flags):
        (tmp_path / "main.py").write_text(MAIN + does)
        code = gpu_runs.main([str(tmp_path / "out"), experiment, "--pack", str(tmp_path / "pack"),
                              "--runs", str(tmp_path / "runs"), *flags])
        return code, (tmp_path / "out/report.md").read_text(encoding="utf-8")

    return command


SAVE = 'save(int(flags["--total_step"])) if "--total_step" in flags else None'


def commands(report):
    """[(flags, exit code), ...] of a report's table."""
    return re.findall(r"^\| `(--version .*?)` \| .*? \| (.*?) \|$", report, re.M)


@pytest.mark.parametrize("name", gpu_runs.EXPERIMENTS)
def test_main_takes_every_command(call, name, monkeypatch):
    monkeypatch.setattr(gpu_runs, "_version", lambda package: None)
    code, report = call(name, SAVE)
    assert code == 0
    shared = re.search(r"^`main.py (.*)` with$", report, re.M)[1]
    for flags, _ in commands(report):
        config = resolve(parse(shlex.split(f"{shared} {flags}")))
        assert config.dataset == "folder" and config.cache_path == "runs/" + name + "/cache"
        assert "swd" in config.metrics or (config.mode == "train" and config.metric_step)


def test_slices_of_equal_steps_in_turn_and_a_later_call_goes_on(call):
    def trained(report):
        return [tuple(re.search(r"--version (\S+).* --total_step (\d+)", flags).groups())
                for flags, _ in commands(report) if "--total_step" in flags]

    _, report = call("few", SAVE)
    assert trained(report) == [(name, step) for step in ("3000", "6000") for name in ("baseline", "both")]
    assert "nothing is left of an earlier call" in report
    _, report = call("few", SAVE)
    assert trained(report) == [(name, step) for step in ("9000", "12000") for name in ("baseline", "both")]
    assert "from an earlier call: baseline at step 6,000, both at step 6,000" in report
    _, report = call("celeb", SAVE)
    assert trained(report) == [("sagan_celeb", "300000")]
    _, report = call("large", SAVE)
    assert trained(report) == [("published", "40000"), ("gpu", "10000")], "equally many pictures"
    assert "| gpu | 0 | 40,000 |" in report and "A step of gpu counts as 4" in report


def test_at_the_end_of_the_time_a_run_is_told_to_save_and_what_there_is_comes_back(call, tmp_path):
    code, report = call("celeb", 'signal.signal(signal.SIGINT, told)\nif "--total_step" in flags: time.sleep(60)',
                        "--seconds", "2")
    assert code == 0
    assert [code for _, code in commands(report)] == ["130", "no time was left"]
    assert "| sagan_celeb | 0 | 7 |" in report and "| 5 | sagan_celeb | 12.50 |" in report and "- by hand" in report
    assert json.loads((tmp_path / "out/metrics_sagan_celeb.jsonl").read_text())["fd_vgg16"] == 12.5


def test_a_signal_lets_the_run_save_and_ends_the_call_with_its_report(call):
    code, report = call("few", "import os\nsignal.signal(signal.SIGINT, told)\nos.kill(os.getppid(), signal.SIGTERM)\n"
                        "time.sleep(60)")
    assert code == 143 and [code for _, code in commands(report)] == ["130"] and "| baseline | 0 | 7 |" in report


def test_a_run_that_does_not_end_is_killed(call):
    _, report = call("celeb", "signal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)", "--seconds", "2")
    assert [code for _, code in commands(report)] == ["137"]


def test_a_run_that_fails_hands_on_its_code_and_its_words_and_is_tried_without_scores(call):
    code, report = call("few", 'print("no such weights")\nsys.exit("--metric_step" in flags and 3)')
    assert code == 3 and "`no such weights`" in report and "tried without scores" in report
    assert [code for _, code in commands(report)] == ["3", *["0"] * 4]
    assert not any("--metric_step" in flags for flags, _ in commands(report)[1:])


# ------------------------------------------------------------------------------------------------------ what comes back


def test_a_curve_needs_two_steps_and_a_line_in_the_making_is_left_for_later(tmp_path):
    lines = [{"step": 1, "sec_per_step": 9.0},
             {"step": 5, "fd": 3.0, "fd_std": 1, "fd_floor": 1.5, "swd": 1.0, "protocol": "p"},
             {"step": 6, "sec_per_step": 0.5}, {"step": 10, "fd": 2.0, "protocol": "p"}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 15, "protoc')
    log = gpu_results.Log(path)
    assert log.scores == {5: {"fd": 3.0, "swd": 1.0}, 10: {"fd": 2.0}} and log.floors == {"fd_floor": 1.5}
    assert log.median("sec_per_step") == "0.500"
    assert gpu_results.by_step({"both": log.scores}) == {5: {"both": {0: {"fd": 3.0}}}, 10: {"both": {0: {"fd": 2.0}}}}
    assert not gpu_results.by_step({"both": {5: {"fd": 3.0}}})


def test_the_first_grid_comes_back_before_the_other_run_has_one(call, tmp_path):
    samples = tmp_path / "runs/few/samples/baseline"
    samples.mkdir(parents=True)
    (samples / "0001500_fake.png").write_bytes(picture((64, 64), format="PNG"))
    call("few", SAVE)
    alone = Image.open(tmp_path / "out/grids.png").size
    (samples.with_name("both")).mkdir()
    (samples.with_name("both") / "0001500_fake.png").write_bytes(picture((64, 64), format="PNG"))
    call("few", SAVE)
    assert Image.open(tmp_path / "out/grids.png").size > alone


def test_the_zip_of_pages_keeps_to_its_size_with_the_newest_record_in_it(call, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_results, "PAGES", 400_000)
    samples, models = (tmp_path / "runs/celeb" / kind / "sagan_celeb" for kind in ("samples", "models"))
    samples.mkdir(parents=True)
    models.mkdir(parents=True)
    (models / "config.json").write_text(as_json(resolve(parse(["--version", "sagan_celeb"]))))
    for step in range(1, 7):
        for kind in ("fake", "attn_g16"):
            (samples / f"{step:07d}_{kind}.png").write_bytes(picture((160, 160), step, "PNG"))    # 77 kB
    code, report = call("celeb", SAVE)
    assert code == 0 and "failed" not in report
    path = tmp_path / "out/pages.zip"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        shown = archive.read("sagan_celeb/index.html").decode()
    assert {"index.html", "sagan_celeb/0000006_fake.png", "sagan_celeb/0000006_attn_g16.png"} <= set(names)
    assert path.stat().st_size < 400_000 + 200_000 and len(names) < 14
    assert '"steps":[1,2,4,6]' in shown


# ------------------------------------------------------------------------------------------------------- rehearsal


@pytest.mark.soak
@pytest.mark.parametrize("name", ["celeb", "few100", "small", "classes", "large"])
def test_rehearsal(tmp_path, name):
    """The real commands at a tiny size: everything comes back, within the limits, and a second call goes on."""
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for number in range(40):
            face = Image.fromarray(draw_face(number, 128))
            face.save(drawn / f"{number}.png")
            face.resize((89, 109)).save(drawn / "face.jpg")
            archive.write(drawn / "face.jpg", f"{number % 2}/{number}.jpg")
    (drawn / "face.jpg").unlink()
    folder = pack(tmp_path, "--celeba", tmp_path / "faces.zip", "--paintings", drawn, "--classes",
                  tmp_path / "faces.zip", "--vgg_weights", "random")
    for steps, begun in ((12, "nothing is left"), (24, "from an earlier call"))[:1 + (name not in ("few100", "small"))]:
        done = subprocess.run(["bash", SCRIPT, tmp_path / "out", name, "--rehearsal", "--steps", str(steps), "--pack",
                               folder, "--runs", tmp_path / "runs"], capture_output=True, text=True,
                              env={**gpu_runs.os.environ, "PYTHON": sys.executable})
        report = (tmp_path / "out/report.md").read_text(encoding="utf-8")
        assert done.returncode == 0, done.stdout + done.stderr
        assert begun in report and "A rehearsal" in report and "failed" not in report
        assert all(f"| {run} | {steps - 12} | {steps} |" in report for run in gpu_runs.EXPERIMENTS[name].runs)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    expected = {"report.md", "curves.png", "grids.png", "pages.zip"} | ({"attention.png"} if name != "small" else set())
    assert expected <= {path.name for path in files}
    assert ("flatter it" in report) == (name == "small")
    assert len(files) <= 7 and all(re.fullmatch(r"[\w.-]+", path.name) for path in files)
    assert max(path.stat().st_size for path in files) < 16 * 2**20
